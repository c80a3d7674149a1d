"""Tiles of the int8 and int4 GEMMs: pure functions of the GPU's architecture and the shape of a product."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ... import layouts
from ...reference.int4_gemm import MAX_GROUP
from .configs import TILE_SIZE, ceil_div, power_of_two


class Tile(NamedTuple):
    """How the int8 GEMM cuts [M, K] x [K, N]: elements of a tile, its warps, and the tiles of K in flight.

    swap: the weight is on the rows of the tensor cores' instruction, which are 64 on sm_90. tma: as many programs run
    as there are multiprocessors, and TMA feeds them. It needs an output whose rows are multiples of 16 bytes.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False
    tma: bool = False


GEMM_ROWS = (16, 32, 64, 128, 256, 512, 1024)  # the ends of the classes of M; the last class has none
GEMM_COLUMNS = (1536, 5120, 12288)  # the same of N
# Bytes of shared memory that a block can have.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# With up to 64 rows of a, reading the weight takes the time: there are as many blocks as multiprocessors, each with 40
# KiB or more in flight. With more rows arithmetic takes it: the tile is the largest of which there are enough.
_M16 = Tile(16, 32, 256, 4, 6, swap=True)
_M16_WIDE = Tile(16, 64, 256, 4, 5, swap=True)
_M32 = Tile(32, 32, 256, 4, 5, swap=True)
_M32_WIDE = Tile(32, 64, 256, 4, 5, swap=True)
_M64 = Tile(64, 64, 128, 4, 6, swap=True)
_HOPPER = Tile(128, 256, 128, 8, 4, tma=True)
_HOPPER_SQUARE = Tile(128, 128, 128, 8, 4, tma=True)
# A row for each class of M, a column for each of N.
_SM90: list[tuple[Tile, ...]] = [
    (_M16, _M16, _M16_WIDE, _M16_WIDE),
    (_M32, _M32, _M32_WIDE, _M32_WIDE),
    (_M64, _M64, _M64, Tile(64, 128, 128, 4, 5, swap=True)),
    (Tile(64, 64, 128, 4, 6),) * 2 + (Tile(64, 128, 128, 4, 5), _HOPPER_SQUARE),
    (Tile(64, 64, 128, 4, 6), Tile(128, 64, 128, 4, 5), _HOPPER_SQUARE, _HOPPER),
    (Tile(64, 128, 128, 4, 5), _HOPPER_SQUARE, _HOPPER, _HOPPER),
    (_HOPPER_SQUARE, _HOPPER, _HOPPER, _HOPPER),
    (_HOPPER_SQUARE, _HOPPER, _HOPPER, _HOPPER),
]
_AMPERE = Tile(128, 256, 64, 8, 4)
_AMPERE_SQUARE = Tile(128, 128, 64, 4, 4)
_SM80: list[tuple[Tile, ...]] = [
    (_M16, _M16, _M16_WIDE, _M16_WIDE),
    (_M32, _M32, _M32_WIDE, _M32_WIDE),
    (_M64, _M64, _M64, _M64),
    (Tile(64, 64, 128, 4, 4),) * 2 + (Tile(64, 128, 64, 4, 6), _AMPERE_SQUARE),
    (Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 6), _AMPERE_SQUARE, _AMPERE),
    (Tile(64, 128, 64, 4, 6), _AMPERE_SQUARE, _AMPERE, _AMPERE),
    (_AMPERE_SQUARE, _AMPERE, _AMPERE, _AMPERE),
    (_AMPERE_SQUARE, _AMPERE, _AMPERE, _AMPERE),
]
# 99 KiB of shared memory.
_ADA_SQUARE = Tile(128, 128, 64, 4, 4)
_SM89: list[tuple[Tile, ...]] = [
    (_M16, _M16, _M16_WIDE._replace(stages=4), _M16_WIDE._replace(stages=4)),
    (_M32, _M32, _M32_WIDE._replace(stages=4), _M32_WIDE._replace(stages=4)),
    (_M64._replace(stages=5),) * 4,
    (Tile(64, 64, 128, 4, 4),) * 2 + (Tile(64, 128, 64, 4, 6), _ADA_SQUARE),
    (Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 6), _ADA_SQUARE, _ADA_SQUARE),
    (Tile(64, 128, 64, 4, 6), _ADA_SQUARE, _ADA_SQUARE, _ADA_SQUARE),
    (_ADA_SQUARE,) * 4,
    (_ADA_SQUARE,) * 4,
]
GEMM_TILES = {80: _SM80, 86: _SM89, 89: _SM89, 90: _SM90, 100: _SM80, 120: _SM89}


def gemm_arch(arch: int) -> int:
    """The architecture of the tables that has a GPU's code and limits: 87 has 163 KiB as 80, 103 and 110 are as 100."""
    known = {87: 80, 88: 89, 101: 100, 103: 100, 110: 100, 121: 120}
    return arch if arch in GEMM_TILES else known.get(arch, 89)


def class_of(size: int, ends: tuple[int, ...]) -> int:
    return next((at for at, end in enumerate(ends) if size <= end), len(ends))


def ceil_16(n: int) -> int:
    return ceil_div(n, 16) * 16


def gemm_tile(arch: int, m: int, n: int) -> Tile:
    return GEMM_TILES[gemm_arch(arch)][class_of(m, GEMM_ROWS)][class_of(n, GEMM_COLUMNS)]


def persistent(tile: Tile, out_bytes: int) -> tuple[int, int]:
    """In how many parts the persistent kernel writes a tile, and its stages: both take shared memory at once."""
    parts = 2 if tile.block_n == 256 else 1
    return parts, tile.stages if out_bytes * tile.block_m * tile.block_n // parts <= 32 << 10 else tile.stages - 1


def is_full(tile: Tile) -> bool:
    """Whether every thread holds 128 sums. Its registers have no room for more."""
    return tile.block_m * tile.block_n == 128 * 32 * tile.warps


def gemm_parts(tile: Tile, wide: bool) -> int:
    """In how many parts the other kernel finishes a tile. ``wide``: in int64."""
    return 1 if tile.swap or not is_full(tile) else 4 if wide else 2


def gemm_shared(tile: Tile, out_bytes: int) -> int:
    """Bytes of shared memory that a tile takes at most."""
    stage = (tile.block_m + tile.block_n) * tile.block_k
    output = tile.block_m * tile.block_n * out_bytes
    if tile.tma:
        parts, stages = persistent(tile, out_bytes)
        return max(stages * stage + output // parts + 1024, tile.stages * stage, output)
    return max(tile.stages * stage, output)


def gemm_fault(arch: int, tile: Tile) -> str | None:
    """Why the kernels cannot run with a tile on an architecture, or None."""
    arch = gemm_arch(arch)
    for name in ("block_m", "block_n", "block_k"):
        size = getattr(tile, name)
        if size != power_of_two(size) or not 16 <= size <= (256 if name != "block_k" else 512):
            return f"{name}: got {size}; accepted: a power of two from 16 to {256 if name != 'block_k' else 512}"
    if tile.block_k < 32:
        return f"block_k: got {tile.block_k}; accepted: at least 32, the depth of one instruction"
    if tile.warps not in (4, 8):
        return f"warps: got {tile.warps}; accepted: 4 or 8"
    if not 2 <= tile.stages <= 8:
        return f"stages: got {tile.stages}; accepted: 2 to 8"
    if tile.block_m * tile.block_n > 128 * 32 * tile.warps:
        return f"warps: got {tile.warps}; accepted: at most 128 sums of the tile for each thread"
    if tile.tma and (arch != 90 or tile.swap or tile.block_k > 128):
        return "tma: got True; accepted: on sm_90, without swap, block_k at most 128"
    if (need := gemm_shared(tile, 4)) > SHARED_BYTES[arch]:
        return f"stages: got {tile.stages}, {need} bytes of shared memory; accepted: up to {SHARED_BYTES[arch]}"
    return None


# What a block reads in a microsecond (half of what a multiprocessor can read), and what a second kernel costs.
_BYTES_PER_MICROSECOND = 60_000
_JOIN_MICROSECONDS = 3.0


def gemm_splits(tile: Tile, m: int, n: int, k: int, multiprocessors: int) -> int:
    """Parts of K of the int8 product."""
    tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n)
    return parts_of_k(tiles, tile.block_m + tile.block_n, k, 2 * tile.block_k, multiprocessors)


def parts_of_k(tiles: int, bytes_of_k: int, k: int, least: int, multiprocessors: int) -> int:
    """Into how many parts K is cut, a power of two: as many as save more time than it takes to add them up.

    A part is at least ``least`` long. A tile reads ``bytes_of_k`` for each k.
    """
    microseconds = bytes_of_k * k / _BYTES_PER_MICROSECOND
    best, shortest = 1, microseconds
    splits = 2
    while tiles * splits <= multiprocessors and k >= splits * least:
        time = microseconds / splits + _JOIN_MICROSECONDS * (1 + splits / 16)
        if time < shortest:
            best, shortest = splits, time
        splits *= 2
    return best


def share_of_k(k: int, splits: int, block_k: int) -> int:
    """The length of each part of K: whole blocks, or all of K."""
    return k if splits == 1 else ceil_div(ceil_div(k, splits), block_k) * block_k


# The share of peak speed that tiles of an area reach, as vendors and other projects publish it. Not measured here.
_EFFICIENCY = {128 * 256: 1.0, 128 * 128: 0.9, 64 * 128: 0.75, 64 * 64: 0.6}


def tile_by_waves(arch: int, m: int, n: int, multiprocessors: int) -> Tile:
    """The tile whose waves over the multiprocessors end first. The table's own tile wins a tie.

    1024 × 6144 makes 192 tiles of 128 × 256, which keep 132 multiprocessors busy for 73 % of two waves, but 384 of
    128 × 128: 97 % of three.
    """

    def time(tile: Tile) -> float:
        waves = ceil_div(ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n), multiprocessors)
        area = tile.block_m * tile.block_n
        return waves * area / _EFFICIENCY[area]

    own = gemm_tile(arch, m, n)
    every = {tile: None for row in GEMM_TILES[gemm_arch(arch)] for tile in row if not tile.swap}
    return own if own.swap else min((own, *every), key=time)


@functools.lru_cache(4096)
def int8_mm(arch: int, m: int, n: int, k: int, multiprocessors: int) -> tuple[Tile, int]:
    """Tile of an int8 product, and parts of K."""
    tile = tile_by_waves(arch, m, n, multiprocessors)
    if n % 16 and is_full(tile):  # each stored element needs its own address, and there is no room for those
        tile = tile._replace(block_n=min(tile.block_n, 128), warps=8)
    return tile, gemm_splits(tile, m, n, k, multiprocessors)


class Int4Tile(NamedTuple):
    """How the int4 linear layer cuts [M, K] x [K, N].

    block_k: k of a step, two to a byte of the weight. A group size may call for less. swap: the weight is on the rows
    of the instruction, so that it comes from registers on sm_90 too, whose own instruction has 64 rows. Without swap
    sm_90 takes the instruction of the other GPUs where x has few rows. Floats are faster so, as bytes are read four at
    a time.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = True


INT4_ROWS = (16, 32, 64, 128)  # the ends of the classes of M; the last class has none
# A tile for each class of M. With up to 64 rows reading the weight takes the time, as for int8. With more rows
# arithmetic takes it. From INT4_DEQUANTIZED rows on, floating activations are left to another kernel.
_INT4_ON_8 = (
    Int4Tile(16, 64, 256, 4, 5),
    Int4Tile(32, 64, 256, 4, 4),
    Int4Tile(64, 64, 128, 4, 5),
    Int4Tile(128, 64, 128, 4, 4),
    Int4Tile(128, 128, 128, 8, 3),
)
_INT4_ON_16 = (
    Int4Tile(16, 64, 256, 4, 4, swap=False),
    Int4Tile(32, 64, 128, 4, 5, swap=False),
    Int4Tile(64, 64, 128, 4, 4),
    Int4Tile(64, 64, 128, 4, 4),
    Int4Tile(64, 64, 128, 4, 4),
)
# fp32 is three bf16, each an operand of its own.
_INT4_ON_32 = (Int4Tile(16, 64, 128, 4, 4, swap=False), *(Int4Tile(32, 64, 128, 4, 3, swap=False),) * 4)
INT4_TILES = {1: _INT4_ON_8, 2: _INT4_ON_16, 4: _INT4_ON_32}  # by the bytes of an element of x
# From this many rows on, the weight is written out in x's dtype and cuBLAS multiplies. With fewer rows int4 kernels win
# on every GPU that others measured; at 256 rows they have lost.
INT4_DEQUANTIZED = 128


def int4_shared(tile: Int4Tile, x_bytes: int) -> int:
    """Bytes of shared memory that a tile takes at most."""
    stage = tile.block_m * tile.block_k * x_bytes + tile.block_n * tile.block_k // 2
    terms = 3 * tile.block_m * tile.block_k * 2 if x_bytes == 4 else 0  # of a step, beside what is in flight
    return max(tile.stages * stage + terms, tile.block_m * tile.block_n * 4)


def int4_fault(arch: int, tile: Int4Tile, x_bytes: int) -> str | None:
    """Why the kernel cannot run with a tile on an architecture, or None."""
    for name, least, most in (("block_m", 16, 256), ("block_n", 16, 256), ("block_k", 128, 512)):
        size = getattr(tile, name)
        if size != power_of_two(size) or not least <= size <= most:
            return f"{name}: got {size}; accepted: a power of two from {least} to {most}"
    if tile.warps not in (4, 8):
        return f"warps: got {tile.warps}; accepted: 4 or 8"
    if not 2 <= tile.stages <= 8:
        return f"stages: got {tile.stages}; accepted: 2 to 8"
    if tile.block_m * tile.block_n > 64 * 32 * tile.warps:
        return f"warps: got {tile.warps}; accepted: at most 64 sums of the tile for each thread, and as many of a group"
    if (need := int4_shared(tile, x_bytes)) > SHARED_BYTES[gemm_arch(arch)]:
        return (
            f"stages: got {tile.stages}, {need} bytes of shared memory; accepted: up to {SHARED_BYTES[gemm_arch(arch)]}"
        )
    return None


@functools.lru_cache(4096)
def int4_linear(
    arch: int, m: int, n: int, k: int, group_size: int, x_bytes: int, multiprocessors: int
) -> tuple[Int4Tile, int]:
    """Tile of a product by int4 weights, and parts of K."""
    tile = INT4_TILES[x_bytes][class_of(m, INT4_ROWS)]
    if n <= GEMM_COLUMNS[1] and tile.block_m == 16:  # else there are fewer tiles than multiprocessors
        tile = tile._replace(block_n=32)
    if gemm_arch(arch) == 100 and x_bytes == 2 and tile.swap:
        tile = tile._replace(block_n=32)  # its own instruction has 64 rows, and would get the codes byte by byte
    if SHARED_BYTES[gemm_arch(arch)] > 128 << 10:
        tile = tile._replace(stages=tile.stages + 1)
    tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n)
    bytes_of_k = tile.block_m * x_bytes + tile.block_n // 2
    least = max(2 * tile.block_k, group_size if group_size < k else 0)
    return tile, parts_of_k(tiles, bytes_of_k, k, least, multiprocessors)


class KLoop(NamedTuple):
    """The int4 kernel's loop over K. The two codes of a byte are ``half`` apart in K.

    add: when the sums of a group are added to those of the output. That is at the "end" of the kernel (one group),
    after a "span" of several steps, after each "piece" of a step, or after each of its "halves". With "codes" the
    layout's halves do not divide the group size, and every code is fetched by itself. A step is ``pieces`` loads of
    ``width`` bytes of a row. ``span``: the k whose sum is one number, a group or MAX_GROUP of it. ``steps``: the steps
    of a span.
    """

    add: str
    half: int
    width: int
    pieces: int
    span: int
    steps: int


@functools.lru_cache(4096)
def int4_k_loop(group_size: int, k: int, block_k: int, integer: bool) -> KLoop:
    half = layouts.half_of(group_size, k)
    depth = 32 if integer else 16  # of one instruction
    span = min(group_size, MAX_GROUP) if integer else group_size
    if group_size == k:
        return KLoop("end" if span == k else "span", half, block_k // 2, 1, span, ceil_div(span, block_k))
    if half >= depth and group_size == half:
        return KLoop("halves", half, half, max(1, block_k // (4 * half)), span, 1)
    if half >= depth and group_size % (2 * half) == 0 and span == group_size:
        width = half
        while group_size % (4 * width) == 0 and 4 * width <= block_k:
            width *= 2
        if group_size == 2 * width:
            return KLoop("piece", half, width, block_k // (2 * width), span, 1)
        return KLoop("span", half, width, 1, span, group_size // (2 * width))
    return KLoop("codes", half, max(32, min(block_k, power_of_two(span))), 1, span, 1)


def int4_shares(loop: KLoop, k: int, group_size: int, splits: int) -> tuple[int, int]:
    """The units of work along K, and how many of them a part takes. A unit is a step, or with "codes" a span."""
    if loop.add == "codes":
        total = k // group_size * ceil_div(group_size, loop.span)
    else:
        total = ceil_div(k, 2 * loop.width * loop.pieces)
    share = ceil_div(total, splits)
    return total, ceil_div(share, loop.steps) * loop.steps if loop.add == "span" else share


def int4_x_sums(spans: int, span: int) -> dict[str, int]:
    """Tile of the kernel that sums x by spans: several short ones, or pieces of a long one."""
    width = min(power_of_two(span), TILE_SIZE)
    return {"SPANS": min(power_of_two(spans), TILE_SIZE // width), "WIDTH": width}


INT4_DEQUANTIZE = {"BLOCK_N": 32, "WIDTH": 64}  # of the kernel that writes the weight out: rows by bytes
