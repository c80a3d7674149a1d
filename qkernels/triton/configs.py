"""Tiles: pure functions of the shape of a call, so that each can be compiled for every GPU without having one."""

from __future__ import annotations

from typing import Any

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
