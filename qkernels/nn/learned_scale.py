"""Learned scales: how a scale follows from its parameter, how it gets its gradient, and what moves its start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops.autograd import transformed
from ..ops.fake_quantize import fake_quantize, fake_quantize_learned
from .ranges import block_magnitude

MSE_BITS = 4  # up to this width a learned scale starts from the smallest squared error, above it from the range
LOG_LIMIT = math.log(1024)  # a learned scale stays within this factor of its start
NOISE = 1.5  # a batch, above all a small one, may have this many times the mean magnitude so far by chance


def learned_scale(start: Tensor, log_scale: Tensor, limits: tuple[float, float], steps: int) -> Tensor:
    """start·exp(log_scale/sqrt(steps)), without a gradient."""
    return (log_scale.detach().float() * steps**-0.5).clamp_(*limits).exp_() * start


def slope(start: Tensor, steps: int) -> Tensor:
    """What makes a scale's gradient that of log_scale, by multiplication; FakeQuantize's docstring says why."""
    return start.reciprocal().mul_(2 * steps**-0.5)


def learns_now(log_scale: Tensor) -> bool:
    """Whether a call has to pass a gradient on to log_scale, outside of torch.func's transforms."""
    return torch.is_grad_enabled() and log_scale.requires_grad and not transformed()


def trained_scale(start: Tensor, log_scale: Tensor, limits: tuple[float, float], steps: int) -> Tensor:
    """``learned_scale``, with log_scale's gradient if it is wanted, in operations that torch.func can transform."""
    scale = learned_scale(start, log_scale, limits, steps)
    if not (learns_now(log_scale) or transformed()):
        return scale
    return scale + (log_scale - log_scale.detach()).float() * slope(start, steps)  # the value of the added term is zero


def keep_inside(zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    """Brings a learned zero point back into the range that an optimizer may have moved it out of."""
    if zero_point is not None and zero_point.requires_grad and not transformed() and not torch.compiler.is_compiling():
        # .data hides the write from autograd: an earlier call in the same step may have saved the tensor for backward.
        zero_point.data.clamp_(quant_min, quant_max)


def unmoved(zero_point: Tensor | None) -> Tensor | None:
    """A zero point that a backward pass may save: another call in the same step may move the quantizer's own.

    It is for a frozen log_scale; ``fake_quantize_learned`` keeps a copy of its own.
    """
    return None if zero_point is None else zero_point.clone()


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
    keep_inside(zero_point, quant_min, quant_max)
    if numel is None:
        numel = x.shape[-feature_dims:].numel()  # type: ignore[operator]
    rule: dict[str, Any] = {
        "quant_min": quant_min,
        "quant_max": quant_max,
        "grad_factor": (numel * steps) ** -0.5 if numel else 1.0,
        "straight_through": straight_through,
        "ewgs_delta": ewgs_delta,
    }
    if not learns_now(log_scale):
        return fake_quantize(x, trained_scale(start, log_scale, log_limits, steps), unmoved(zero_point), **rule)
    scale = learned_scale(start, log_scale, log_limits, steps)
    return fake_quantize_learned(x, scale, zero_point, (log_scale, slope(start, steps)), **rule)


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
