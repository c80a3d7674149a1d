"""Moves scales after the range of the tensor that they quantize, in plain torch."""

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

    They go the share ``up`` of the way if the range's scale is larger, else the share ``down``. They stay if x is
    empty, all zero or has a range that is not finite.
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
    """Scale and zero point as ``follow_range`` moves them, as new tensors; x is not empty."""
    low, high = range_of(x, scale)
    s, z = qparams_of_range(low, high, quant_min, quant_max, symmetric, 0.0)
    known = low.isfinite() & high.isfinite() & ((low != 0) | (high != 0))
    part = torch.where(known, torch.where(s > scale, up, down), 0.0)
    return _moved(scale, s, part), None if zero_point is None else _moved(zero_point.view_as(scale), z, part).view_as(
        zero_point
    )


def _moved(old: Tensor, new: Tensor, part: Tensor) -> Tensor:
    start = old.float()
    between = torch.where(part == 1, new, start + part * (new - start))
    return torch.where(part == 0, old, between.to(old.dtype))
