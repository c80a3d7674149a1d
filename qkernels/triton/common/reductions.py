"""Reductions over the elements that share a channel: how tiles move over x, and where partial results are.

Every reduction has two stages, so that its result does not depend on the order in which blocks run. In the first stage
tiles move over x as a matrix (see ``Cut``) and leave partial results [outer, period, inner]. In the second stage a
kernel joins the partial results of each channel in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from .configs import Cut
from .granularity import Granularity, View


@triton.jit
def tile_at(step, steps, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, COLS] of this program's tile at one of its steps, down columns or along rows.

    The step is multiplied in int32: with one product in int64 the sums took 96 registers on sm_90, so they take 80.
    """
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    stays, moves = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if COLUMNS:
        return moves * (steps * ROWS) + step * ROWS + row, stays * COLS + col
    else:
        return stays * ROWS + row, moves * (steps * COLS) + step * COLS + col


@triton.jit
def results_at(height, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Places of this program's partial results, one for each column or row of its tile, and which of them exist."""
    if COLUMNS:
        out = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
        return tl.program_id(1).to(tl.int64) * width + out, out < width
    else:
        out = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        return out * tl.num_programs(1) + tl.program_id(1), out < height


@triton.jit
def partials_at(first, channel, outer, period, inner, PARTS: tl.constexpr):
    """Places of PARTS partial results of each channel from its ``first`` on, and which of them exist."""
    part = first + tl.arange(0, PARTS)[None, :]
    at = ((part // inner).to(tl.int64) * period + channel[:, None]) * inner + part % inner
    return at, (part < outer * inner) & (channel[:, None] < period)


def regroup(
    partial: Tensor, cut: Cut, granularity: Granularity, join: Callable[[Tensor, list[int]], Tensor]
) -> tuple[Tensor, tuple[int, int, int]]:
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
