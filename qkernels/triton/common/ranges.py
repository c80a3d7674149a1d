"""Reductions over the elements that share a channel: how they are cut into tiles, and minima and maxima.

Every reduction has two stages, so that its result does not depend on the order in which blocks run: tiles leave
partial results [outer, period, inner] (see ``Cut``), and a second kernel joins those of each channel in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Cut
from .granularity import Granularity, View
from .launch import launch
from .numerics import highest, lowest, widen

INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def row_tile(ROWS: tl.constexpr, COLS: tl.constexpr):
    """Numbers of the runs of a tile and of the elements in them."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return rows, tl.arange(0, COLS)[None, :]


@triton.jit
def column_tile(COLS: tl.constexpr):
    """Numbers of the columns of a tile of whole rows."""
    return tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]


@triton.jit(do_not_specialize=["pieces", "steps", "low_ptr", "high_ptr"])
def range_rows_kernel(
    x_ptr, low_ptr, high_ptr, runs, inner, pieces, steps,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Minimum and maximum of ``steps`` · COLS elements of each of ROWS runs."""
    run, col = row_tile(ROWS, COLS)
    first = tl.program_id(1).to(tl.int64) * (steps * COLS)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    low = tl.full([ROWS, COLS], INF, dtype)
    high = tl.full([ROWS, COLS], -INF, dtype)
    step = 0
    while step < steps:
        at = first + step * COLS + col
        here = (run < runs) & (at < inner)
        x = widen(tl.load(x_ptr + run * inner + at, mask=here))
        low = tl.minimum(low, tl.where(here, x, INF), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.where(here, x, -INF), propagate_nan=tl.PropagateNan.ALL)
        step += 1
    out = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = out * pieces + tl.program_id(1)
    tl.store(low_ptr + at, lowest(low, 1), mask=out < runs)
    tl.store(high_ptr + at, highest(high, 1), mask=out < runs)


@triton.jit(do_not_specialize=["outer", "steps", "low_ptr", "high_ptr"])
def range_columns_kernel(
    x_ptr, low_ptr, high_ptr, outer, width, steps,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Minimum and maximum of ``steps`` · ROWS rows of each of COLS columns."""
    col = column_tile(COLS)
    first = tl.program_id(1).to(tl.int64) * (steps * ROWS)
    row = tl.arange(0, ROWS)[:, None]
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    low = tl.full([ROWS, COLS], INF, dtype)
    high = tl.full([ROWS, COLS], -INF, dtype)
    step = 0
    while step < steps:
        at = first + step * ROWS + row
        here = (at < outer) & (col < width)
        x = widen(tl.load(x_ptr + at * width + col, mask=here))
        low = tl.minimum(low, tl.where(here, x, INF), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.where(here, x, -INF), propagate_nan=tl.PropagateNan.ALL)
        step += 1
    out = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    at = tl.program_id(1).to(tl.int64) * width + out
    tl.store(low_ptr + at, lowest(low, 0), mask=out < width)
    tl.store(high_ptr + at, highest(high, 0), mask=out < width)


def range_partials(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, int, int]]:
    """Partial minima and maxima [2, outer · period · inner] of a dense, non-empty x, and (outer, period, inner)."""
    cut = configs.cut(granularity, x.numel())
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(2, cut.outer * cut.period * cut.inner, dtype=dtype, device=x.device)
    low, high = partial.unbind()
    if cut.columns:
        tile = {"ROWS": cut.rows, "COLS": cut.cols}
        launch(range_columns_kernel, cut.grid, x, low, high, cut.height, cut.width, cut.steps, **tile)
    else:
        sizes = (granularity.runs, cut.length, cut.inner, cut.steps)
        launch(range_rows_kernel, cut.grid, x, low, high, *sizes, ROWS=cut.rows, COLS=cut.cols)
    return regroup(partial, cut, granularity, lambda part, dims: torch.stack((part[0].amin(dims), part[1].amax(dims))))


def regroup(partial: Tensor, cut: Cut, granularity: Granularity, join) -> tuple[Tensor, tuple[int, int, int]]:
    """Partial results in the order of scale's elements, where their place in the period is not that already."""
    if granularity.digits == 1:
        return partial, (cut.outer, cut.period, cut.inner)
    view: View = granularity.view
    digits = [view.size1, view.size2, view.size3, view.size4, view.size5]
    sizes = (cut.outer, cut.period // math.prod(digits), *digits, cut.inner)
    strides = (0, view.stride0, view.stride1, view.stride2, view.stride3, view.stride4, view.stride5, 0)
    joined = join(partial.view(2, *sizes), [dim for dim in range(8) if strides[dim] == 0])
    kept = sorted((stride for stride in strides if stride), reverse=True)
    order = [[stride for stride in strides if stride].index(stride) + 1 for stride in kept]
    return joined.permute(0, *order).reshape(2, -1), (1, granularity.channels, 1)


@triton.jit
def join_ranges(low_ptr, high_ptr, channel, outer, period, inner, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Minima and maxima of CHANNELS channels from their partial ones."""
    dtype: tl.constexpr = low_ptr.dtype.element_ty
    low = tl.full([CHANNELS, PARTS], INF, dtype)
    high = tl.full([CHANNELS, PARTS], -INF, dtype)
    first = 0
    while first < outer * inner:
        part = first + tl.arange(0, PARTS)[None, :]
        at = ((part // inner).to(tl.int64) * period + channel[:, None]) * inner + part % inner
        here = (part < outer * inner) & (channel[:, None] < period)
        low = tl.minimum(low, tl.load(low_ptr + at, mask=here, other=INF), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.load(high_ptr + at, mask=here, other=-INF), propagate_nan=tl.PropagateNan.ALL)
        first += PARTS
    return lowest(low, 1), highest(high, 1)
