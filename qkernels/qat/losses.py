"""Losses for what quantization costs, each usable alone in a training loop; ``qk.QuantLoss`` adds them up.

Those of weights (``weight_error``, ``dampening``, ``bin_regularization``, ``kurtosis``) and ``activation_range`` look
at the model alone. The others compare its output with that of another forward pass, which they run. None moves a range,
a running statistic or a random generator. Weights are what the next forward pass quantizes (what a parametrization
computes, say), and a weight that several layers share counts once. Each loss is a scalar of fp32, of fp64 for fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .model_losses import (
    activation_range,
    bin_regularization,
    check_weights,
    dampening,
    kurtosis,
    learned_inputs,
    weight_error,
)
from .output_losses import check_divergence, chosen_layers, consistency, distillation, divergence, layer_outputs
from .spec import check_type

__all__ = [
    "Term",
    "activation_range",
    "bin_regularization",
    "consistency",
    "dampening",
    "distillation",
    "divergence",
    "kurtosis",
    "layer_outputs",
    "weight_error",
]


ACCEPTED = "a finite number of at least 0, a function of the step that returns one, or a qk.losses.Term"
Weight = float | Callable[[int], float]


class Term:
    """How a loss counts in a ``QuantLoss``, where a bare weight does not say enough.

    Args:
        weight: a number of at least 0, or a function of the step that returns one, such as
            ``lambda step: min(step / 1000, 1) * 0.1``. Where it is 0 the loss is not computed.
        every: the loss counts at each step that this number divides, and not at all at others.
        options: arguments of the function of that name in ``qk.losses``, such as ``temperature=4``.

    Raises:
        TypeError: every is no int, or weight neither a number nor a function.
        ValueError: every is below 1, or weight negative or not finite.
    """

    def __init__(self, weight: Weight = 1.0, *, every: int = 1, **options: Any) -> None:
        check_type("every", every, int, "a whole number of at least 1")
        if every < 1:
            raise ValueError(f"every: got {every}; accepted: a whole number of at least 1")
        if not callable(weight):
            check_factor("weight", weight)
        self.weight, self.every, self.options = weight, every, options


def check_term(name: str, model: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuses what the loss ``name`` would refuse of a prepared model and of its options."""
    if name in ("weight_error", "dampening", "bin_regularization", "kurtosis"):
        check_weights(model, name)
    elif name == "activation_range":
        learned_inputs(model)
    elif name == "layer_outputs":
        chosen_layers(model, **options)
    else:
        check_divergence(options.get("measure", "kl"), options.get("temperature", 1.0))


def check_factor(name: str, weight: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"{name}: got {weight!r}; accepted: {ACCEPTED}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name}: got a weight of {weight}; accepted: {ACCEPTED}")
