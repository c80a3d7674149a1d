"""python -m qkernels tune: times the int8 GEMM's tiles on this machine's GPU and keeps the fastest of each shape.

Writes one JSON file for each kind of GPU (see triton/common/tuning.py). Later runs read it instead of the built-in
table. Nothing else in the package ever measures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .triton.common.gemm_configs import Tile

SHAPES = "6144x4096,4096x4096,28672x4096,4096x14336"  # the linear layers of Llama-8B, N x K
ROUNDS = 7


def candidates(arch: int, m: int, n: int, k: int, multiprocessors: int) -> Iterator[tuple[Tile, int]]:
    """Tiles of every table that an architecture can run, each with a stage more and less, and parts of K."""
    from .triton.common import configs, gemm_configs

    tiles: dict[Tile, None] = {}
    for table in gemm_configs.GEMM_TILES.values():
        for tile in (tile for row in table for tile in row):
            for stages in (tile.stages, tile.stages - 1, tile.stages + 1):
                tiles[tile._replace(stages=stages)] = None
                tiles[tile._replace(stages=stages, tma=False)] = None
    for tile in tiles:
        if tile.block_m > max(32, 2 * configs.power_of_two(m)) or tile.block_n > max(32, 2 * configs.power_of_two(n)):
            continue
        if gemm_configs.gemm_fault(arch, tile) is not None:
            continue
        count = configs.ceil_div(m, tile.block_m) * configs.ceil_div(n, tile.block_n)
        for splits in (1, 2, 4, 8):
            if splits == 1 or (not tile.tma and count * splits <= 2 * multiprocessors and k >= splits * tile.block_k):
                yield tile, splits


def microseconds(call: Callable[[int], None], sets: int) -> float:
    """Of one call: the median over replays of a CUDA graph of ``sets`` calls, each on operands of its own."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(sets):
            call(number)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / sets)
    return statistics.median(times[1:])


def tune_shape(m: int, n: int, k: int, end: float) -> tuple[Tile, int, float, float]:
    """The fastest tile and parts of K, its microseconds, and those of the built-in choice; tries none after ``end``."""
    from .triton import int8_gemm
    from .triton.common import gemm_configs

    device = torch.device("cuda", torch.cuda.current_device())
    arch, multiprocessors, _ = int8_gemm.gpu(device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    moved = n * k + m * k + 2 * m * n
    sets = max(2, min(64, 4 * cache // moved + 1))
    padded = gemm_configs.ceil_16(k)

    def codes(rows: int) -> list[Tensor]:
        return [torch.randint(-127, 128, (rows, padded), dtype=torch.int8, device=device) for _ in range(sets)]

    a, b = codes(m), codes(n)
    epilogue = int8_gemm.Epilogue(torch.rand(m, device=device), torch.rand(n, device=device))
    how = int8_gemm.how_of(epilogue)

    def times(tile: Tile, splits: int, out: Tensor) -> float:
        return microseconds(
            lambda number: int8_gemm.run(a[number], b[number], out, tile, splits, multiprocessors, epilogue, how),
            sets,
        )

    built_in = gemm_configs.int8_mm(arch, m, n, k, multiprocessors)
    expected, out = (torch.empty(m, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    before = times(*built_in, expected)
    best, least = built_in, before
    for tile, splits in candidates(arch, m, n, padded, multiprocessors):
        if (tile, splits) == built_in:
            continue
        if time.monotonic() > end:
            break
        time_taken = times(tile, splits, out)
        if not torch.equal(out, expected):
            raise RuntimeError(f"{tile}, {splits} parts: wrong values at M = {m}, N = {n}, K = {k}; please report this")
        if time_taken < least:
            best, least = (tile, splits), time_taken
    return *best, least, before


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    pairs = [part.lower().split("x") for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(text)
    return [(int(n), int(k)) for n, k in pairs]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m qkernels tune", description=__doc__)
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="NxK,NxK,… of the weights (default: %(default)s)")
    parser.add_argument(
        "--rows", type=numbers, default="16,32,64,128,256,512,1024,4096", help="M,M,…, one of each class of M"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="try no further tile after this time")
    parser.add_argument("--print", action="store_true", help="print the file in the end")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: torch finds no GPU; nothing was measured")
        return 2
    import triton

    from .triton import int8_gemm
    from .triton.common import gemm_configs, tuning

    device = torch.device("cuda", torch.cuda.current_device())
    arch, _, name = int8_gemm.gpu(device)
    ends = (*gemm_configs.GEMM_ROWS, None)
    rows = []
    start = time.monotonic()
    print(f"{name}, sm_{arch}. Each tile is compiled once, so the first shape takes minutes.", flush=True)
    print("      M      N      K   built-in µs  best µs   TOPS  tile", flush=True)
    path, end = tuning.path_of(name), start + 60 * options.minutes
    for n, k in options.shapes:
        for m in options.rows:
            if time.monotonic() > end:
                continue
            tile, splits, best, before = tune_shape(m, n, k, end)
            print(
                f"{m:7}{n:7}{k:7}{before:14.1f}{best:9.1f}{2e-6 * m * n * k / best:7.0f}  "
                f"{tuple(tile)}, {splits} parts",
                flush=True,
            )
            rows.append(
                {
                    "m_up_to": ends[gemm_configs.class_of(m, gemm_configs.GEMM_ROWS)],
                    "n": n,
                    "k": gemm_configs.ceil_16(k),
                    "tile": tile._asdict(),
                    "splits": splits,
                    "microseconds": round(best, 2),
                    "built_in_microseconds": round(before, 2),
                }
            )
            path = tuning.save(name, rows, {"arch": arch, "torch": torch.__version__, "triton": triton.__version__})
    count = f"{len(rows)} of {len(options.shapes) * len(options.rows)} shapes"
    print(f"{path}: {count} in {time.monotonic() - start:.0f} s")
    if options.print and rows:
        print(path.read_text())
    return 0
