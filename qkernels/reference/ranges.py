"""Ranges of blocks of a tensor, and the scales and zero points that cover them, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def qparams_of_range(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and int32 zero point that cover [low, high] and zero.

    Symmetric: scale = max(|low|, |high|) / ((quant_max − quant_min) // 2), so that neither end is ever clipped, and
    the zero point is the middle code. Asymmetric: scale = (high − low) / (quant_max − quant_min), even if high − low is
    beyond the dtype, and the zero point is quant_min − round(low / scale). A scale is at least eps and at least the
    smallest normal fp32.
    """
    low, high = within_reach(low.clamp(max=0)), within_reach(high.clamp(min=0))
    floor = max(eps, torch.finfo(torch.float32).tiny)
    if symmetric:
        half = (quant_max - quant_min) // 2
        scale = (torch.maximum(-low, high) / half).clamp(min=floor)
        return scale, torch.full_like(scale, quant_max - half, dtype=torch.int32)
    scale = step_of(low, high, quant_max - quant_min).clamp(min=floor)
    zero_point = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(quant_min).to(torch.int32)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A positive scale rounded to dtype, at least the smallest that quantizers take; in fp16 its smallest subnormal."""
    info = torch.finfo(dtype)
    return scale.to(dtype).clamp(min=max(info.tiny * info.eps, torch.finfo(torch.float32).tiny))


def within_reach(end: Tensor) -> Tensor:
    """The end of a range; a finite one is clamped to four roundings below the dtype's largest number.

    Without the clamp a multiple of a scale that was rounded up could be infinite although the end is finite.
    """
    top = torch.finfo(end.dtype).max * (1 - 2.0**-22)
    return torch.where(end.isinf(), end, end.clamp(-top, top))


def step_of(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """(high − low) / steps, as half the range over half the steps: the bits are the same, and nothing overflows."""
    return (high * 0.5 - low * 0.5) / (steps * 0.5)


def range_of(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block of x, one block for each element of ``stats``; a NaN in it makes both NaN."""
    if x.numel() == 0:
        return torch.full_like(stats, torch.inf), torch.full_like(stats, -torch.inf)
    x = x.detach().float()
    if stats.numel() == 1:
        return x.amin().reshape(stats.shape), x.amax().reshape(stats.shape)
    split = [n for p, size in zip(stats.shape, x.shape, strict=True) for n in (p, size // p)]
    blocks = x.reshape(split)
    inner = tuple(range(1, len(split), 2))
    return blocks.amin(inner), blocks.amax(inner)
