"""Minima and maxima of the elements that share a channel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .granularity import Granularity
from .launch import launch
from .numerics import highest, lowest, widen
from .reductions import partials_at, regroup, results_at, tile_at

INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["repetitions", "steps", "low_ptr", "high_ptr"])
def range_kernel(
    x_ptr, low_ptr, high_ptr, runs, repetitions, width, steps,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    height = repetitions if COLUMNS else runs
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    low = tl.full([ROWS, COLS], INF, dtype)
    high = tl.full([ROWS, COLS], -INF, dtype)
    step = 0
    while step < steps:
        row, col = tile_at(step, steps, COLUMNS, ROWS, COLS)
        here = (row < height) & (col < width)
        x = widen(tl.load(x_ptr + row * width + col, mask=here))
        low = tl.minimum(low, tl.where(here, x, INF), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.where(here, x, -INF), propagate_nan=tl.PropagateNan.ALL)
        step += 1
    at, exists = results_at(height, width, COLUMNS, ROWS, COLS)
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    tl.store(low_ptr + at, lowest(low, AXIS), mask=exists)
    tl.store(high_ptr + at, highest(high, AXIS), mask=exists)


def range_partials(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, int, int]]:
    """Partial minima and maxima [2, outer · period · inner] of a dense, non-empty x, and (outer, period, inner)."""
    cut = configs.cut(granularity, x.numel())
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(2, cut.outer * cut.period * cut.inner, dtype=dtype, device=x.device)
    launch(range_kernel, cut.grid, x, *partial.unbind(), *cut.sizes, **cut.tile)
    return regroup(partial, cut, granularity, lambda part, dims: torch.stack((part[0].amin(dims), part[1].amax(dims))))


@triton.jit
def join_ranges(low_ptr, high_ptr, channel, outer, period, inner, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Minima and maxima of CHANNELS channels from their partial ones."""
    dtype: tl.constexpr = low_ptr.dtype.element_ty
    low = tl.full([CHANNELS, PARTS], INF, dtype)
    high = tl.full([CHANNELS, PARTS], -INF, dtype)
    first = 0
    while first < outer * inner:
        at, here = partials_at(first, channel, outer, period, inner, PARTS)
        low = tl.minimum(low, tl.load(low_ptr + at, mask=here, other=INF), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.load(high_ptr + at, mask=here, other=-INF), propagate_nan=tl.PropagateNan.ALL)
        first += PARTS
    return lowest(low, 1), highest(high, 1)
