"""The backward pass of learned scales in Triton: dx bit for bit as the reference; sums in a fixed order, no atomics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from .common.granularity import unsupported_granularity
from .common.sums import learnable_backward


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    return unsupported_granularity(args[1], args[2])


def fake_quantize_learnable_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    lsq: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    terms = "lsq" if lsq else "clip"
    return learnable_backward(terms, grad, x, scale, zero_point, quant_min, quant_max, grad_factor)


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
    return learnable_backward(
        straight_through, grad, x, scale, zero_point, quant_min, quant_max, grad_factor, delta=ewgs_delta
    )
