"""Quantizers by name, at a width that each takes."""

from qkernels.nn import FakeQuantize
from qkernels.nn.quantizer_rules import QUANTIZERS, RULES

WEIGHTS = [name for name, rule in RULES.items() if rule.weights]
INPUTS = [name for name, rule in RULES.items() if rule.inputs]
KEEPING = [name for name in QUANTIZERS if name != "dynamic"]  # those that keep a scale
NEW = [name for name in QUANTIZERS if name not in ("lsq", "minmax", "ema", "dynamic")]
WITHOUT_INTEGERS = ("dorefa", "nf4", "apot", "po2", "kmeans", "midrise")


def width(name, bits=4):
    return min(max(bits, RULES[name].lowest), RULES[name].highest)


def made(name, shape=None, bits=4, **options):
    return FakeQuantize(bits=width(name, bits), quantizer=name, shape=shape, **options)
