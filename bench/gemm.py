"""int8 GEMM throughput on this machine's CPU against its peers: `python -m qkernels bench gemm`. On a GPU: gpu/gemm.py.

Every contestant is checked before it is timed. Weights rotate over copies beyond the last-level cache (--hot: one
copy), contestants alternate in blocks, and the figures stand beside two ceilings that are measured first: integer dot
products that touch registers only, and memory read end to end.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import mmap
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers
import torch
from laps import alternate, check, machine
from shapes import Shape, positive, shapes_of
from torch import Tensor

import qkernels as qk

CHECKED_ROWS = 16
MAX_COPIES = 8
BLOCKS = 3


# The contestants of a scheme, built for one copy of the weights; None: this machine does not have it.

Contestants = dict[str, peers.Call | None]


def raw(a: Tensor, w: Tensor, threads: int) -> Contestants:
    return {
        "qkernels": lambda: qk.int8_mm(a, w.t()),
        "torch._int_mm": peers.find("torch._int_mm", lambda: lambda: torch._int_mm(a, w.t())),
    }


def scaled(a: Tensor, w: Tensor, threads: int) -> Contestants:
    row, column = (torch.full(shape, 0.01) for shape in ((a.shape[0], 1), (1, w.shape[0])))

    def rescaled() -> Tensor:
        return torch._int_mm(a, w.t()).float().mul_(column).mul_(row)

    return {
        "qkernels": lambda: qk.int8_scaled_mm(a, w.t(), row, column, out_dtype=torch.float32),
        "torch._int_mm and rescale": peers.find("torch._int_mm and rescale", lambda: rescaled),
    }


def dynamic(x: Tensor, w: Tensor, threads: int) -> Contestants:
    packed = qk.PackedInt8.from_float(w)
    return {"qkernels": lambda: qk.int8_linear(x, packed), **peers.int8_linear(x, w, threads)}


SCHEMES: dict[str, Callable[[Tensor, Tensor, int], Contestants]] = {"raw": raw, "scaled": scaled, "dynamic": dynamic}


def operands(scheme: str, shape: Shape) -> tuple[Tensor, Tensor]:
    if scheme == "dynamic":
        return torch.randn(shape.m, shape.k), torch.randn(shape.n, shape.k) / shape.k**0.5
    a, w = (torch.randint(-127, 128, (rows, shape.k), dtype=torch.int8) for rows in (shape.m, shape.n))
    return a, w


def expected_rows(scheme: str, x: Tensor, w: Tensor) -> Tensor:
    y = x[:CHECKED_ROWS].double() @ w.double().t()
    return y * 0.01 * 0.01 if scheme == "scaled" else y


def cache_bytes() -> int:
    """Of the largest cache that a core sees; 32 MiB where the system does not say."""
    sizes = [
        int(file.read_text().strip().removesuffix("K")) << 10
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 << 20)


def rotating(calls: list[peers.Call]) -> peers.Call:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def least_bytes(scheme: str, shape: Shape) -> int:
    """Each operand read once, the output written once."""
    return shape.n * shape.k + shape.m * shape.k * (4 if scheme == "dynamic" else 1) + 4 * shape.m * shape.n


def ceilings(threads: int) -> dict[str, float]:
    """Operations per second of dot products in registers, bytes per second of memory read end to end."""
    host = qk.library.host
    if host is None:
        return {}
    area = mmap.mmap(-1, max(256 << 20, 4 * cache_bytes()))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as packed weights have them
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(area, dtype=torch.uint8).fill_(1)
    part = memory.numel() // threads // 64 * 64

    def best(call: Callable[[int], float]) -> float:
        with ThreadPoolExecutor(threads) as pool:
            return max(sum(pool.map(call, range(threads))) for _ in range(5))

    return {
        "ops_per_second": best(lambda thread: host.dot_ceiling(0.05)),
        "bytes_per_second": best(lambda thread: host.read_ceiling(memory.data_ptr() + thread * part, part)),
    }


def measure(scheme: str, shape: Shape, threads: int, ceiling: dict[str, float], hot: bool) -> dict[str, Any]:
    x, w = operands(scheme, shape)
    copies = 1 if hot else min(MAX_COPIES, max(1, -(-2 * cache_bytes() // w.numel())))
    built = [SCHEMES[scheme](x, w.clone(), threads) for _ in range(copies)]
    expected = expected_rows(scheme, x, w)
    calls: dict[str, peers.Call] = {}
    for name in built[0]:
        turns = [contestants[name] for contestants in built]
        found = [call for call in turns if call is not None]
        if len(found) < copies:
            continue
        own = name == "qkernels"
        tolerance = {"raw": 0.0, "scaled": 1e-6}.get(scheme, 0.02 if own else 0.03)
        check(name, torch.as_tensor(found[0]())[:CHECKED_ROWS], expected, tolerance)
        calls[name] = rotating(found)
    seconds = alternate(calls, BLOCKS)
    ops, moved = 2 * shape.m * shape.n * shape.k, least_bytes(scheme, shape)
    row: dict[str, Any] = {"scheme": scheme, **shape._asdict(), "threads": threads, "copies": copies, "contestants": {}}
    for name, times in seconds.items():
        figures = {**times, "tops": ops / times["median"] / 1e12, "gb_per_second": moved / times["median"] / 1e9}
        if ceiling and name not in ("fp32", "bf16"):
            shortest = max(ops / ceiling["ops_per_second"], moved / ceiling["bytes_per_second"])
            figures["share_of_ops_ceiling"] = ops / ceiling["ops_per_second"] / times["median"]
            figures["share_of_roofline"] = shortest / times["median"]
        row["contestants"][name] = figures
    return row


def lines_of(row: dict[str, Any]) -> Iterator[str]:
    size = f"{row['m']}×{row['n']}×{row['k']}"
    ours = row["contestants"]["qkernels"]["median"]
    for name, f in row["contestants"].items():
        low, middle, high = (1e3 * f[key] for key in ("p20", "median", "p80"))
        shares = [f"{100 * f[key]:.0f} %" if key in f else "" for key in ("share_of_ops_ceiling", "share_of_roofline")]
        yield (
            f"{row['scheme']:<8}{size:<18}{row['threads']:>2}  {name:<26}{middle:>10.4g}  {f'{low:.4g}–{high:.4g}':<18}"
            f"{f['tops']:>8.3f}{f['gb_per_second']:>8.1f}{shares[0]:>7}{shares[1]:>7}{f['median'] / ours:>8.2f}"
        )


HEADER = (
    f"{'scheme':<8}{'M×N×K':<18}{'th':>2}  {'contestant':<26}{'ms':>10}  {'p20–p80':<18}{'TOPS':>8}{'GB/s':>8}"
    f"{'ops':>7}{'roof':>7}{'/ours':>8}"
)


def save(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gemm.json").write_text(json.dumps(result, indent=1) + "\n")
    columns = ["median", "p20", "p80", "tops", "gb_per_second", "share_of_ops_ceiling", "share_of_roofline"]
    with (folder / "gemm.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scheme", "m", "n", "k", "threads", "contestant", *columns])
        for row in result["rows"]:
            for name, figures in row["contestants"].items():
                where = [row[key] for key in ("scheme", "m", "n", "k", "threads")]
                writer.writerow([*where, name, *(figures.get(key, "") for key in columns)])


def plot(folder: Path, result: dict[str, Any]) -> None:
    """Per thread count: throughput against M, a panel for each scheme and weight, and the roofline of our kernels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for threads, ceiling in result["ceilings"].items():
        rows = [row for row in result["rows"] if str(row["threads"]) == threads]
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            weight = "M = N = K" if result["shapes"] == "square" else f"{row['n']}×{row['k']}"
            groups.setdefault(f"{row['scheme']}, {weight}", []).append(row)
        across = min(3, len(groups))
        down = -(-len(groups) // across)
        figure, axes = plt.subplots(down, across, figsize=(5.5 * across, 4 * down), squeeze=False)
        for axis in axes.flat[len(groups) :]:
            axis.set_visible(False)
        for axis, (title, members) in zip(axes.flat, groups.items(), strict=False):
            points: dict[str, list[tuple[int, float]]] = {}
            for row in members:
                for name, figures in row["contestants"].items():
                    points.setdefault(name, []).append((row["m"], figures["tops"]))
            for name, line in points.items():
                axis.plot(
                    *zip(*sorted(line), strict=True), marker="o", label=name, zorder=3 if name == "qkernels" else 2
                )
            if ceiling:
                axis.axhline(ceiling["ops_per_second"] / 1e12, color="grey", linestyle="--", linewidth=0.8)
            axis.set(title=title, xscale="log", xlabel="M", ylabel="TOPS", ylim=(0, None))
            axis.legend(fontsize=7)
        figure.suptitle(f"{result['machine']['cpu']}, {threads} threads")
        figure.tight_layout()
        figure.savefig(folder / f"gemm-throughput-{threads}t.png", dpi=90)
        plt.close(figure)
        if not ceiling:
            continue
        figure, axis = plt.subplots(figsize=(7, 5))
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            at = [
                (2 * row["m"] * row["n"] * row["k"] / least_bytes(scheme, Shape(row["m"], row["n"], row["k"])), row)
                for row in rows
                if row["scheme"] == scheme
            ]
            tops = [row["contestants"]["qkernels"]["tops"] for _, row in at]
            axis.scatter([intensity for intensity, _ in at], tops, label=scheme, zorder=3)
        peak, bandwidth = ceiling["ops_per_second"] / 1e12, ceiling["bytes_per_second"] / 1e12
        ridge = peak / bandwidth
        axis.plot([1, ridge, max(8192.0, 2 * ridge)], [bandwidth, peak, peak], color="grey")
        axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TOPS", title="roofline")
        axis.legend()
        figure.tight_layout()
        figure.savefig(folder / f"gemm-roofline-{threads}t.png", dpi=90)
        plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m qkernels bench gemm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", default="llama", help="llama (Llama-8B's layers), square, or a CSV of M,N,K")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="M of llama")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="default: all")
    parser.add_argument("--threads", type=positive, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--hot", action="store_true", help="one copy of the weights, which may stay in the cache")
    parser.add_argument("--out", type=Path, help="a folder for gemm.json, gemm.csv and, with matplotlib, plots")
    options = parser.parse_args(argv)
    try:
        shapes = shapes_of(options.shapes, options.rows)
    except (OSError, ValueError) as error:
        print(f"bench gemm: {error}", file=sys.stderr)
        return 2
    work = list(itertools.product(options.threads, options.schemes, shapes))
    result: dict[str, Any] = {"machine": machine(), "shapes": options.shapes, "ceilings": {}, "rows": []}
    say: Callable[[str], Any] = print
    progress: Any = work
    try:
        from tqdm import tqdm
    except ImportError:
        pass
    else:
        say, progress = tqdm.write, tqdm(work, unit="shape", disable=not sys.stderr.isatty())
    say(f"{result['machine']['cpu']}, {result['machine']['path']}; {'one copy' if options.hot else 'rotating copies'}")
    say("ops, roof: share of the dot-product ceiling and of what it and the memory's bandwidth allow")
    say(HEADER)
    for threads, scheme, shape in progress:
        torch.set_num_threads(threads)
        if str(threads) not in result["ceilings"]:
            ceiling = result["ceilings"][str(threads)] = ceilings(threads)
            if ceiling:
                ops, memory = ceiling["ops_per_second"] / 1e12, ceiling["bytes_per_second"] / 1e9
                say(f"ceilings of {threads} threads: {ops:.3f} TOPS, {memory:.1f} GB/s")
        row = measure(scheme, shape, threads, result["ceilings"][str(threads)], options.hot)
        result["rows"].append(row)
        for line in lines_of(row):
            say(line)
        if options.out:
            save(options.out, result)
    for name, reason in peers.missing.items():
        say(f"missing peer: {name}: {reason}")
    if options.out:
        try:
            plot(options.out, result)
        except ImportError:
            say("no plots: matplotlib is missing; run: pip install matplotlib")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
