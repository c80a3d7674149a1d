"""The straight-through variants of the learnable backward in Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference import straight_through as reference
from ..reference.fake_quantize import check, check_grad
from .common.granularity import unsupported_granularity
from .common.sums import backward


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernel does not take a call of ``op``, or None."""
    return unsupported_granularity(args[1], args[2])


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
    check(x, scale, zero_point, quant_min, quant_max)
    check_grad(grad, x)
    reference.check_variant(straight_through, ewgs_delta, reference.WITH_TERMS)
    return backward(straight_through, grad, x, scale, zero_point, quant_min, quant_max, grad_factor, delta=ewgs_delta)
