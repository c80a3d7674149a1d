"""Learned scales: how a scale follows from its parameter, how it gets its gradient, and what moves its start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import checks
from ..ops.autograd import entered, transformed
from ..ops.fake_quantize import fake_quantize
from .ranges import block_magnitude

MSE_BITS = 4  # up to this width a learned scale starts from the smallest squared error, above it from the range
LOG_LIMIT = math.log(1024)  # a learned scale stays within this factor of its start
NOISE = 1.5  # a batch, above all a small one, may have this many times the mean magnitude so far by chance


def learned_scale(start: Tensor, log_scale: Tensor, limits: tuple[float, float], steps: int) -> Tensor:
    """start·exp(log_scale/sqrt(steps)), without a gradient."""
    return (log_scale.detach().float() * steps**-0.5).clamp_(*limits).exp_() * start


class _TrainedScale(Function):
    """``learned_scale`` with the gradient that the docstring of FakeQuantize explains, in few small operations."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, log_scale: Tensor, limits: tuple[float, float], steps: int) -> Tensor:
        ctx.save_for_backward(2 * steps**-0.5 / start)
        ctx.dtype = log_scale.dtype
        return learned_scale(start, log_scale, limits, steps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return None, (grad * slope).to(ctx.dtype), None, None


_with_gradient = entered(_TrainedScale)


def trained_scale(start: Tensor, log_scale: Tensor, limits: tuple[float, float], steps: int) -> Tensor:
    """``learned_scale``, with log_scale's gradient if it is wanted."""
    if transformed():
        # The same gradient in operations that torch.func can transform. The value of the added term is zero.
        scale = learned_scale(start, log_scale, limits, steps)
        return scale + (log_scale - log_scale.detach()).float() * (2 * steps**-0.5 / start)
    if torch.is_grad_enabled() and log_scale.requires_grad:
        return _with_gradient(start, log_scale, limits, steps)  # type: ignore[no-any-return]
    return learned_scale(start, log_scale, limits, steps)


def keep_inside(zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    """Brings a learned zero point back into the range that an optimizer may have moved it out of."""
    if zero_point is not None and zero_point.requires_grad and not transformed() and not torch.compiler.is_compiling():
        # .data hides the write from autograd: an earlier call in the same step may have saved the tensor for backward.
        zero_point.data.clamp_(quant_min, quant_max)


def learned(
    x: Tensor,
    start: Tensor,
    log_scale: Tensor,
    log_limits: tuple[float, float],
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    steps: int,
    feature_dims: int | None,
    numel: int | None,
    straight_through: str,
    ewgs_delta: float,
) -> Tensor:
    """fake_quantize with a learned scale and LSQ's gradient factor 1/sqrt(elements per scale·steps)."""
    checks.dense("x", x)
    scale = trained_scale(start, log_scale, log_limits, steps)
    keep_inside(zero_point, quant_min, quant_max)
    if numel is None:
        numel = x.shape[-feature_dims:].numel()  # type: ignore[operator]
    return fake_quantize(
        x,
        scale,
        zero_point,
        quant_min=quant_min,
        quant_max=quant_max,
        grad_factor=(numel * steps) ** -0.5 if numel else 1.0,
        straight_through=straight_through,
        ewgs_delta=ewgs_delta,
    )


@torch.no_grad()
def pace(x: Tensor, start: Tensor, magnitude: Tensor, share: float, formula: float, in_place: bool) -> Tensor:
    """Moves the start of a learned scale in proportion to x's mean magnitude, which was ``magnitude`` at that start.

    share: at 1 the start follows fully. Below 1 it moves by that share of the excess of the batch's magnitude over its
    noise. A channel that was all zero so far starts by LSQ's formula. in_place: start and magnitude are updated too.
    """
    if x.numel() == 0:
        return start
    now = block_magnitude(x, start.shape)
    if share < 1:
        now = torch.where(magnitude <= 0, now, magnitude + share * (now - NOISE * magnitude).clamp(min=0))
    ratio = now / magnitude
    # The last bits of a sum depend on the number of threads: so small a change does not count as a move.
    counts = now.isfinite() & (now > 0) & ~((ratio - 1).abs() < 1e-5)
    moved = torch.where(magnitude > 0, start * ratio, torch.where(magnitude == 0, now * formula, start))
    moved = torch.where(counts, moved, start)
    if in_place:
        start.copy_(moved)
        magnitude.copy_(torch.where(counts | ((magnitude < 0) & now.isfinite()), now, magnitude))
    return moved
