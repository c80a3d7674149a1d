"""The straight-through variants of the learnable backward in Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from . import granularity
from .sums import backward


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernel does not take a call of ``op``, or None."""
    return granularity.unsupported(args[1], args[2])


def fake_quantize_straight_through_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    straight_through: str,
    ewgs_delta: float,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    checks.straight_through(straight_through, ewgs_delta, checks.WITH_TERMS)
    return backward(straight_through, grad, x, scale, zero_point, quant_min, quant_max, grad_factor, delta=ewgs_delta)
