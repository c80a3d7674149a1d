"""Scales that follow the range of what they quantize, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .ranges import qparams_of_range, range_of


def follow_range(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    up: float,
    down: float,
) -> None:
    """Moves scale and zero point, in place, towards those of the range of the elements that share them.

    They go ``up`` of the way where that is the larger scale, else ``down`` of it; of zeros alone, of a range that is
    not finite and of an empty x they stay.
    """
    checks.follow_range(x, scale, zero_point, quant_min, quant_max, up, down)
    if x.numel() == 0:
        return
    new_scale, new_zero_point = followed(x, scale, zero_point, quant_min, quant_max, symmetric, up, down)
    scale.copy_(new_scale)
    if zero_point is not None and new_zero_point is not None:
        zero_point.copy_(new_zero_point)


def followed(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    up: float,
    down: float,
) -> tuple[Tensor, Tensor | None]:
    """What ``follow_range`` makes of scale and zero point, of an x that is not empty."""
    low, high = range_of(x, scale)
    s, z = qparams_of_range(low, high, quant_min, quant_max, symmetric, 0.0)
    known = low.isfinite() & high.isfinite() & ((low != 0) | (high != 0))
    part = torch.where(known, torch.where(s > scale, up, down), 0.0)
    return _moved(scale, s, part), None if zero_point is None else _moved(zero_point, z, part)


def _moved(old: Tensor, new: Tensor, part: Tensor) -> Tensor:
    start = old.float()
    between = torch.where(part == 1, new, start + part * (new - start))
    return torch.where(part == 0, old, between.to(old.dtype))
