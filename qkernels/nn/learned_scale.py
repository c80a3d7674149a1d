"""Scales that are learned: how one is made of its parameter, how its gradient comes, and what moves its start."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..ops.autograd import transformed
from ..ops.fake_quantize import fake_quantize
from .ranges import block_magnitude

NOISE = 1.5  # times the mean magnitude so far: what a batch may have by chance, as the smallest ones do


def learned_scale(start: Tensor, log_scale: Tensor, limits: tuple[float, float], steps: int) -> Tensor:
    """start·exp(log_scale/sqrt(steps)), without a gradient."""
    return start * (log_scale.detach().float() * steps**-0.5).clamp(*limits).exp()


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
) -> Tensor:
    """fake_quantize by a learned scale, with LSQ's gradient factor 1/sqrt(elements per scale·steps)."""
    checks.dense("x", x)
    scale = learned_scale(start, log_scale, log_limits, steps)
    if transformed() or (torch.is_grad_enabled() and log_scale.requires_grad):
        # The class's docstring says why this is the gradient. The value of the added term is zero.
        scale = scale + (log_scale - log_scale.detach()).float() * (2 * steps**-0.5 / start)
    if zero_point is not None and zero_point.requires_grad and not transformed() and not torch.compiler.is_compiling():
        # Through .data: another call of this module in the same step may have saved it for the backward pass.
        zero_point.data.clamp_(quant_min, quant_max)
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
    )


@torch.no_grad()
def pace(x: Tensor, start: Tensor, magnitude: Tensor, share: float, formula: float, in_place: bool) -> Tensor:
    """The start of a learned scale, moved as x's mean magnitude has moved since.

    share: 1, or less: it moves that share of what the magnitude of a batch is above its noise. What was zeros so far
    starts by LSQ's formula. in_place: start and magnitude are changed too.
    """
    if x.numel() == 0:
        return start
    now = block_magnitude(x, start.shape)
    if share < 1:
        now = torch.where(magnitude <= 0, now, magnitude + share * (now - NOISE * magnitude).clamp(min=0))
    ratio = now / magnitude
    # Sums differ in their last bits with the number of threads, which is no move.
    counts = now.isfinite() & (now > 0) & ~((ratio - 1).abs() < 1e-5)
    moved = torch.where(magnitude > 0, start * ratio, torch.where(magnitude == 0, now * formula, start))
    moved = torch.where(counts, moved, start)
    if in_place:
        start.copy_(moved)
        magnitude.copy_(torch.where(counts | ((magnitude < 0) & now.isfinite()), now, magnitude))
    return moved
