"""What each quantizer accepts: widths, kinds of tensor, zero points, and ways of the gradient."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .. import checks
from ..ops.dynamic import range_of_bits

WAYS = ("clip", *checks.VARIANTS)
_LEARNED = ("lsq", *(way for way in WAYS if way != "lsq"))
_PASSES = ("pass", *(way for way in WAYS if way != "pass"))


@dataclass(frozen=True)
class Rule:
    """What one quantizer accepts; the first of several values is the default."""

    lowest: int = 2
    highest: int = 8
    weights: bool = True
    inputs: bool = True
    symmetric: tuple[bool, ...] = (True, False)
    straight_through: tuple[str, ...] = WAYS


RULES = {
    "lsq": Rule(straight_through=_LEARNED),
    "minmax": Rule(),
    "ema": Rule(straight_through=("clip",)),
    "dynamic": Rule(straight_through=("clip",)),
    "lsq+": Rule(symmetric=(False,), straight_through=_LEARNED),
    "pact": Rule(weights=False, symmetric=(False,), straight_through=("pact",)),
    "ewgs": Rule(straight_through=("ewgs",)),
    "stochastic": Rule(straight_through=("clip",)),
    "dorefa": Rule(inputs=False, symmetric=(True,), straight_through=("clip",)),
    "ternary": Rule(highest=2, inputs=False, symmetric=(True,), straight_through=_PASSES),
    "nf4": Rule(lowest=4, highest=4, symmetric=(True,), straight_through=("clip",)),
    "apot": Rule(lowest=3, symmetric=(True,), straight_through=("clip",)),
    "po2": Rule(symmetric=(True,), straight_through=("clip",)),
    "kmeans": Rule(inputs=False, symmetric=(True,), straight_through=("pass",)),
    "midrise": Rule(symmetric=(True,), straight_through=("clip",)),
}
QUANTIZERS = tuple(RULES)


def resolve(quantizer: str, bits: int, symmetric: bool | None, straight_through: str | None) -> tuple[bool, str]:
    """``symmetric`` and ``straight_through`` with the defaults filled in.

    Raises:
        ValueError: an unknown name, or values that do not go together.
    """
    if quantizer not in RULES:
        raise ValueError(
            f"quantizer: got {quantizer!r}; accepted: {', '.join(QUANTIZERS)}{nearest(quantizer, QUANTIZERS)}"
        )
    rule = RULES[quantizer]
    check_bits(quantizer, bits)
    if symmetric is None:
        symmetric = rule.symmetric[0]
    if symmetric not in rule.symmetric:
        raise ValueError(f'symmetric: got {symmetric} with quantizer="{quantizer}"; accepted: {rule.symmetric[0]}')
    if straight_through is None:
        straight_through = rule.straight_through[0]
    if straight_through not in WAYS:
        raise ValueError(
            f"straight_through: got {straight_through!r}; accepted: {', '.join(WAYS)}{nearest(straight_through, WAYS)}"
        )
    if straight_through not in rule.straight_through:
        raise ValueError(
            f'straight_through: got {straight_through!r} with quantizer="{quantizer}"; accepted: '
            f"{rule.straight_through[0]!r}"
        )
    return symmetric, straight_through


def check_bits(quantizer: str, bits: int) -> None:
    range_of_bits(bits)
    rule = RULES[quantizer]
    if not rule.lowest <= bits <= rule.highest:
        accepted = f"{rule.lowest} to {rule.highest}" if rule.lowest < rule.highest else f"{rule.lowest}"
        raise ValueError(f'bits: got {bits} with quantizer="{quantizer}"; accepted: {accepted}')


def check_tensor(quantizer: str, is_weight: bool) -> None:
    rule = RULES[quantizer]
    if is_weight and not rule.weights:
        raise ValueError(f'quantizer: got "{quantizer}" for a weight; accepted: {_names(weights=True)}')
    if not is_weight and not rule.inputs:
        raise ValueError(
            f'quantizer: got "{quantizer}" for an input (no shape); accepted: {_names(weights=False)}, or the shape of '
            "a weight"
        )


def nearest(name: Any, known: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name; empty if no known one is like it, in capitals or not."""
    known = list(known)
    lower = [each.lower() for each in known]
    close = difflib.get_close_matches(str(name).lower(), lower, n=1)
    return f"; did you mean {known[lower.index(close[0])]!r}?" if close else ""


def _names(weights: bool) -> str:
    return ", ".join(name for name, rule in RULES.items() if (rule.weights if weights else rule.inputs))
