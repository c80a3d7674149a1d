"""Tiles as pure functions of the shape of a call: a test compiles each of them for every GPU, and needs none."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .granularity import COLUMN, LONG, NUMBERS, ONE, SHORT, TILE, Granularity


def block(granularity: Granularity, numel: int) -> int:
    """Elements of a block of 128 threads: fewer where elements have scales of their own or there are few blocks."""
    inner = granularity.view.inner
    tiles = inner >= 8 and inner & (inner - 1) == 0
    short = granularity.channels > 1 and inner < 2048 and not tiles
    return 1024 if short or numel < 1 << 18 else 2048


@functools.lru_cache(4096)
def by_granularity(granularity: Granularity, block: int, zero_point: int | None = None) -> dict[str, Any]:
    """The constexprs by which a kernel that takes x in blocks of ``block`` elements finds their scales.

    ``zero_point`` is 0 for none, 1 for one per scale, 2 for one in all, and None for a kernel without ZERO_POINT. The
    result is cached: callers must not change it.
    """
    view = granularity.view
    mode, inner = SHORT, 1
    if granularity.channels == 1:
        mode = ONE
    elif view.inner == 1:
        mode = COLUMN
    elif 8 <= view.inner <= block and view.inner & (view.inner - 1) == 0:
        mode, inner = TILE, view.inner
    elif view.inner >= block:
        mode = LONG
    wrap = 0 if view.period == granularity.runs else 1 if view.period >= block else 2
    kinds = {} if zero_point is None else {"ZERO_POINT": zero_point}
    return {**kinds, "MODE": mode.value, "DIGITS": granularity.digits, "WRAP": wrap, "BLOCK": block, "INNER": inner}


@functools.cache
def by_numbers(block: int) -> dict[str, Any]:
    """The same where scale and zero point are numbers."""
    return {"ZERO_POINT": 0, "MODE": NUMBERS.value, "DIGITS": 1, "WRAP": 0, "BLOCK": block, "INNER": 1}


class Cut(NamedTuple):
    """How a reduction cuts x: a matrix, the tiles that move over it, and the partial results that they leave.

    Where runs are long the matrix is [runs, elements of a run]. A tile of ``rows`` by ``cols`` moves ``steps`` times
    along its rows, and every run leaves ``inner`` partial results. With ``columns`` the matrix is [repetitions of the
    period, elements of a period]. A tile moves ``steps`` times down its columns, and every column leaves ``outer`` of
    them. Either way the partial results are [outer, period, inner].
    """

    columns: bool
    rows: int
    cols: int
    steps: int
    grid: tuple[int, int]
    outer: int
    period: int
    inner: int
    height: int
    width: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The kernels' runs, repetitions, width and steps: the height is one of the first two.

        Kernels are not compiled anew for other repetitions, as of batches. What divides the runs does decide how wide
        loads are, where a run is one element.
        """
        return (1, self.height, self.width, self.steps) if self.columns else (self.height, 1, self.width, self.steps)

    @property
    def tile(self) -> dict[str, Any]:
        """The kernels' constexprs."""
        return {"COLUMNS": self.columns, "ROWS": self.rows, "COLS": self.cols}


TILE_SIZE = 2048  # elements of a tile: 16 in each of 128 threads
ONE_PASS = 16384  # longest row whose elements stay in registers between finding its range and quantizing it
# The limit on registers that some kernels name: all that a thread can have. Without it ptxas spills one or two of their
# registers so that more blocks run at once.
UNSPILLED = 255


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(4096)
def cut(granularity: Granularity, numel: int) -> Cut:
    """Long runs, and runs that hardly repeat, are reduced along themselves; short ones that repeat, by columns."""
    view, runs = granularity.view, granularity.runs
    length = numel if granularity.channels == 1 else view.inner
    height, width = runs // view.period, view.period * view.inner
    # A tile moves up to 16 times as long as a thousand programs remain to fill a GPU. It moves more often where a grid
    # could not hold the programs.
    most = max(1, min(16, numel // (TILE_SIZE * 1024)), numel // (TILE_SIZE * 32768))
    if granularity.channels > 1 and height >= 8 and length < 256:
        cols = min(power_of_two(width), 128)
        rows = min(TILE_SIZE // cols, power_of_two(height))
        steps = min(most, ceil_div(height, rows))
        outer = ceil_div(height, rows * steps)
        grid = (ceil_div(width, cols), outer)
        return Cut(True, rows, cols, steps, grid, outer, view.period, view.inner, height, width)
    cols = min(power_of_two(length), TILE_SIZE)
    rows = min(TILE_SIZE // cols, power_of_two(runs))
    steps = min(most, ceil_div(length, cols))
    pieces = ceil_div(length, cols * steps)
    grid = (ceil_div(runs, rows), pieces)
    return Cut(False, rows, cols, steps, grid, height, view.period, pieces, runs, length)


def join(outer: int, period: int, inner: int) -> dict[str, int]:
    """Tile of the kernels that join partial results: channels by results. There are three, each compiled anew."""
    parts = next(parts for parts in (16, 128, 1024) if outer * inner <= parts or parts == 1024)
    return {"CHANNELS": 1024 // parts, "PARTS": parts, "maxnreg": UNSPILLED}


def rows_in_registers(rows: int, length: int, least: int = 1) -> dict[str, int]:
    """Tile of the kernels that keep whole rows in registers. Its rows have at least ``least`` elements."""
    cols = max(power_of_two(length), least)
    return {"ROWS": min(max(1, TILE_SIZE // cols), power_of_two(rows)), "COLS": cols}


def warps(elements: int) -> int:
    """Warps that give each thread at most 16 elements, as far as a block can have them."""
    return max(1, min(32, elements // 512))


def codebook_sums(inner: int) -> tuple[int, int]:
    """Tile of a program that sums over runs of ``inner`` elements: runs, and elements of a run."""
    columns = min(TILE_SIZE, power_of_two(inner))
    return TILE_SIZE // columns, columns


def errors_block(length: int) -> int:
    """Elements of a channel on which a program tries all candidates."""
    return min(4096, max(128, power_of_two(length)))


LONG_TILE = 4096  # elements of a tile that moves along a row too long for registers
BACKWARD_ROW = 4096  # longest row of the norm's backward pass that stays in registers: 8192 spills on sm_90


def group_tile(groups: int, group_size: int, most: int) -> tuple[bool, dict[str, int]]:
    """Whether a tile holds whole groups, and the tile: as many of ``groups`` as fit in ``most`` elements."""
    size = power_of_two(group_size)
    whole = size <= most
    count, size = (min(power_of_two(groups), most // size), size) if whole else (1, LONG_TILE)
    return whole, {"BLOCK_GROUPS": count, "BLOCK_SIZE": size, "num_warps": min(warps(count * size), 16)}


def norm_tile(length: int, group_size: int) -> tuple[bool, dict[str, int]]:
    """Whether a row is one tile, and the tile. A longer row is cut into tiles of up to LONG_TILE elements."""
    groups = length // group_size
    whole, tile = group_tile(groups, group_size, ONE_PASS)
    if whole and tile["BLOCK_GROUPS"] >= groups:
        return True, tile
    return False, {**group_tile(groups, group_size, LONG_TILE)[1], "maxnreg": UNSPILLED}


def norm_backward(rows: int, length: int) -> tuple[int, int, dict[str, int]]:
    """Elements of a block, rows per program, and options. Every GPU runs 512 programs, so that sums are the same."""
    block, config = power_of_two(length), {}
    if block > BACKWARD_ROW:
        block, config = min(TILE_SIZE, BACKWARD_ROW), {"maxnreg": UNSPILLED}
    return block, ceil_div(rows, 512), {"num_warps": warps(block), **config}


def product_tile(groups: int, group_size: int) -> tuple[bool, dict[str, int]]:
    """As ``group_tile``. Groups of up to 16384 elements are whole; short groups share a tile of 2048."""
    return group_tile(groups, group_size, max(TILE_SIZE, min(power_of_two(group_size), ONE_PASS)))


def product_backward(group_size: int) -> dict[str, int]:
    """A tile of 2048 elements, of one group or several."""
    size = min(power_of_two(group_size), TILE_SIZE)
    return {"BLOCK_GROUPS": TILE_SIZE // size, "BLOCK_SIZE": size}


def transposed_tile(rows: int, columns: int) -> dict[str, int]:
    """Tile of the kernels that make codes of a matrix and of its transpose: both are accessed in whole sectors."""
    tall, wide = min(64, power_of_two(rows)), max(4, min(64, power_of_two(columns)))
    return {"BLOCK_ROWS": tall, "BLOCK_COLUMNS": wide, "num_warps": max(1, tall * wide // 512)}


def quantize_rows(length: int) -> dict[str, int]:
    """Tile of the kernel that makes int8 codes of a row, padded to ``length``: the row, or 8192 elements of it."""
    block = min(max(power_of_two(length), 128), 2 * LONG_TILE)
    return {"BLOCK": block, "num_warps": warps(block), "maxnreg": UNSPILLED}
