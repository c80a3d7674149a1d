"""Tiles: pure functions of the shape of a call, so that each can be compiled for every GPU without having one."""

from __future__ import annotations

from typing import Any

import triton

from .granularity import COLUMN, LONG, NUMBERS, ONE, SHORT, TILE, Granularity


def pointwise(numel: int) -> int:
    """Elements of a block. 16 or 32 for each of 128 threads; less where that would leave most of a GPU idle."""
    return 4096 if numel >= 1 << 22 else 1024


def walk(granularity: Granularity, block: int) -> dict[str, Any]:
    """The constexprs by which a kernel that takes x in blocks of ``block`` elements finds their parameters."""
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
    return {"MODE": mode.value, "DIGITS": granularity.digits, "WRAP": wrap, "BLOCK": block, "INNER": inner}


def by_numbers(block: int) -> dict[str, Any]:
    return {"MODE": NUMBERS.value, "DIGITS": 1, "WRAP": 0, "BLOCK": block, "INNER": 1}


# The fused dynamic kernels: elements for each thread, 16 in general, keep a row in registers without spilling.
WHOLE_ROW = 16384


def warps(elements: int) -> int:
    """Warps for a tile at 16 elements a thread; 16 warps at most."""
    return min(max(elements // 512, 1), 16)


def group_tile(groups: int, group_size: int, most: int) -> tuple[bool, dict[str, int]]:
    """Whether a tile holds whole groups, and the tile: as many of ``groups`` as fit in ``most`` elements."""
    size = triton.next_power_of_2(group_size)
    if size > most:
        return False, {"BLOCK_GROUPS": 1, "BLOCK_SIZE": 4096, "num_warps": warps(4096)}
    count = min(triton.next_power_of_2(groups), most // size)
    return True, {"BLOCK_GROUPS": count, "BLOCK_SIZE": size, "num_warps": warps(count * size)}


def norm_tile(length: int, group_size: int) -> tuple[bool, dict[str, int]]:
    """Whether a row is one tile, and the tile. A longer row goes by tiles of up to 4096 elements."""
    groups = length // group_size
    whole, tile = group_tile(groups, group_size, WHOLE_ROW)
    if whole and tile["BLOCK_GROUPS"] >= groups:
        return True, tile
    return False, group_tile(groups, group_size, 4096)[1]


def norm_backward(rows: int, length: int) -> tuple[int, int, dict[str, int]]:
    """Elements of a block, rows for each program, and warps. 512 programs on every GPU, so that sums are the same."""
    block = triton.next_power_of_2(length)
    if block > 8192:  # five values for each element do not stay in registers
        block = 2048
    return block, triton.cdiv(rows, 512), {"num_warps": warps(block)}


def product_tile(groups: int, group_size: int) -> tuple[bool, dict[str, int]]:
    """As ``group_tile``: groups of up to 16384 elements whole, short ones together in 2048."""
    return group_tile(groups, group_size, max(2048, min(triton.next_power_of_2(group_size), WHOLE_ROW)))


def product_backward(group_size: int) -> dict[str, int]:
    """A tile of 2048 elements, of one group or several."""
    size = min(triton.next_power_of_2(group_size), 2048)
    return {"BLOCK_GROUPS": 2048 // size, "BLOCK_SIZE": size, "num_warps": 4}
