"""int8 and int4 GEMM throughput on this machine's CPU against its peers: `python -m qkernels bench gemm`.

Every contestant is checked before it is timed. Weights rotate over copies beyond the last-level cache (--hot: one
copy), contestants alternate in blocks, and the figures stand beside two ceilings that are measured first: integer dot
products that touch registers only, and memory read end to end. On a GPU: gpu/gemm.py.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import torch
from ceilings import cache_bytes, ceilings
from laps import alternate, check, machine
from shapes import INT4, Case, arguments, cases_of, flat, positive, shapes_of
from torch import Tensor

import qkernels as qk

CHECKED_ROWS = 16
MAX_COPIES = 8


# The contestants of a scheme, built for one of ``copies`` of the weights; scale is that of the groups of int4 codes.
# None: this machine does not have it.

Contestants = dict[str, peers.Call | None]


def raw(a: Tensor, w: Tensor, scale: Tensor | None, threads: int, copies: int) -> Contestants:
    return {
        "qkernels": lambda: qk.int8_mm(a, w.t()),
        "torch._int_mm": peers.find("torch._int_mm", lambda: lambda: torch._int_mm(a, w.t())),
    }


def scaled(a: Tensor, w: Tensor, scale: Tensor | None, threads: int, copies: int) -> Contestants:
    row, column = (torch.full(shape, 0.01) for shape in ((a.shape[0], 1), (1, w.shape[0])))

    def rescaled() -> Tensor:
        return torch._int_mm(a, w.t()).float().mul_(column).mul_(row)

    return {
        "qkernels": lambda: qk.int8_scaled_mm(a, w.t(), row, column, out_dtype=torch.float32),
        "torch._int_mm and rescale": peers.find("torch._int_mm and rescale", lambda: rescaled),
    }


def dynamic(x: Tensor, w: Tensor, scale: Tensor | None, threads: int, copies: int) -> Contestants:
    packed = qk.PackedInt8.from_float(w)
    return {"qkernels": lambda: qk.int8_linear(x, packed), **peers.int8_linear(x, w, threads, copies)}


def grouped(act_bits: int) -> Callable[[Tensor, Tensor, Tensor | None, int, int], Contestants]:
    def build(x: Tensor, q: Tensor, scale: Tensor | None, threads: int, copies: int) -> Contestants:
        assert scale is not None
        packed = qk.PackedInt4.from_quantized(q, scale)
        return {
            "qkernels": lambda: qk.int4_linear(x, packed, act_bits=act_bits),
            **peers.int4_linear(x, q, scale, threads, act_bits, copies),
        }

    return build


SCHEMES: dict[str, Callable[[Tensor, Tensor, Tensor | None, int, int], Contestants]] = {
    "raw": raw,
    "scaled": scaled,
    "dynamic": dynamic,
    "w4a8": grouped(8),
    "w4a16": grouped(16),
}
# Accepted error of ours and of the peers: what 8 bits of activation and of weight cost, fp32 sums, bf16 operands.
TOLERANCES = {
    "raw": (0.0, 0.0),
    "scaled": (1e-6, 1e-6),
    "dynamic": (0.02, 0.03),
    "w4a8": (0.02, 0.03),
    "w4a16": (2e-5, 0.01),
}
FLOAT = ("fp32", "bf16", "torch int4pack")  # contestants that the ceiling of integer products says nothing about


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Activations, weight, and the scales of a weight of int4 codes."""
    m, n, k = case.shape
    if case.group_size is not None:
        return torch.randn(m, k), *peers.int4_weight(n, k, case.group_size)
    if case.scheme == "dynamic":
        return torch.randn(m, k), torch.randn(n, k) / k**0.5, None
    a, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    return a, w, None


def expected_rows(scheme: str, x: Tensor, w: Tensor, scale: Tensor | None) -> Tensor:
    """The product of the first rows in fp64."""
    weight = (w if scale is None else peers.dequantized(w, scale)).double()
    y = x[:CHECKED_ROWS].double() @ weight.t()
    return y * 0.01 * 0.01 if scheme == "scaled" else y


def rotating(calls: list[peers.Call]) -> peers.Call:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def weight_bytes(case: Case) -> int:
    """Codes, two to a byte in int4, and the fp32 scales of their groups."""
    _, n, k = case.shape
    return -(-n * k // 2) + 4 * n * case.groups if case.scheme in INT4 else n * k


def least_bytes(case: Case) -> int:
    """Each operand read once, the output written once."""
    m, n, k = case.shape
    return weight_bytes(case) + m * k * (1 if case.scheme in ("raw", "scaled") else 4) + 4 * m * n


def measure(case: Case, threads: int, ceiling: dict[str, float], hot: bool, blocks: int) -> dict[str, Any]:
    x, w, scale = operands(case)
    copies = 1 if hot else min(MAX_COPIES, max(1, -(-2 * cache_bytes() // weight_bytes(case))))
    built = [SCHEMES[case.scheme](x, w.clone(), scale, threads, copies) for _ in range(copies)]
    expected = expected_rows(case.scheme, x, w, scale)
    calls: dict[str, peers.Call] = {}
    for name in built[0]:
        turns = [contestants[name] for contestants in built]
        found = [call for call in turns if call is not None]
        if len(found) < copies:
            continue
        tolerance = TOLERANCES[case.scheme][name != "qkernels"]
        check(name, torch.as_tensor(found[0]())[:CHECKED_ROWS], expected, tolerance)
        calls[name] = rotating(found)
    seconds = alternate(calls, blocks)
    ops, moved = 2 * case.shape.m * case.shape.n * case.shape.k, least_bytes(case)
    row: dict[str, Any] = {
        "scheme": case.scheme,
        "group_size": case.group_size,
        **case.shape._asdict(),
        "threads": threads,
        "copies": copies,
        "bytes": moved,
        "contestants": {},
    }
    for name, times in seconds.items():
        figures = {**times, "tops": ops / times["median"] / 1e12, "gb_per_second": moved / times["median"] / 1e9}
        if ceiling and case.scheme != "w4a16" and name not in FLOAT:
            shortest = max(ops / ceiling["ops_per_second"], moved / ceiling["bytes_per_second"])
            figures["share_of_ops_ceiling"] = ops / ceiling["ops_per_second"] / times["median"]
            figures["share_of_roofline"] = shortest / times["median"]
        elif ceiling and case.scheme == "w4a16" and name not in ("fp32", "bf16"):
            figures["share_of_roofline"] = moved / ceiling["bytes_per_second"] / times["median"]
        row["contestants"][name] = figures
    return row


def lines_of(row: dict[str, Any]) -> Iterator[str]:
    size = f"{row['m']}×{row['n']}×{row['k']}"
    ours = row["contestants"]["qkernels"]["median"]
    group_size = "" if row["group_size"] is None else row["group_size"]
    for name, f in row["contestants"].items():
        low, middle, high = (1e3 * f[key] for key in ("p20", "median", "p80"))
        shares = [f"{100 * f[key]:.0f} %" if key in f else "" for key in ("share_of_ops_ceiling", "share_of_roofline")]
        yield (
            f"{row['scheme']:<8}{group_size:>5}  {size:<18}{row['threads']:>2}  {name:<26}"
            f"{middle:>10.4g}  {f'{low:.4g}–{high:.4g}':<18}"
            f"{f['tops']:>8.3f}{f['gb_per_second']:>8.1f}{shares[0]:>7}{shares[1]:>7}{f['median'] / ours:>8.2f}"
        )


HEADER = (
    f"{'scheme':<8}{'group':>5}  {'M×N×K':<18}{'th':>2}  {'contestant':<26}{'ms':>10}  {'p20–p80':<18}{'TOPS':>8}"
    f"{'GB/s':>8}{'ops':>7}{'roof':>7}{'/ours':>8}"
)


def scheme_of(row: dict[str, Any]) -> str:
    """As plots name it."""
    if row["group_size"] is None:
        return str(row["scheme"])
    return f"{row['scheme']}, " + ("a scale per row" if row["group_size"] == -1 else f"groups of {row['group_size']}")


def save(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gemm.json").write_text(json.dumps(result, indent=1) + "\n")
    columns = ["median", "p20", "p80", "tops", "gb_per_second", "share_of_ops_ceiling", "share_of_roofline"]
    with (folder / "gemm.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scheme", "group_size", "m", "n", "k", "threads", "contestant", *columns])
        for row in result["rows"]:
            for name, figures in row["contestants"].items():
                where = [row[key] for key in ("scheme", "group_size", "m", "n", "k", "threads")]
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
            groups.setdefault(f"{scheme_of(row)}, {weight}", []).append(row)
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
            if ceiling and members[0]["scheme"] != "w4a16":
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
        for scheme in dict.fromkeys(map(scheme_of, rows)):
            at = [(2 * row["m"] * row["n"] * row["k"] / row["bytes"], row) for row in rows if scheme_of(row) == scheme]
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
    parser = arguments("python -m qkernels bench gemm", __doc__, list(SCHEMES), [1, 4, 16, 64, 256, 1024])
    parser.add_argument("--threads", type=positive, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--blocks", type=positive, default=3, help="of 0.12 s, in which contestants take turns")
    parser.add_argument("--hot", action="store_true", help="one copy of the weights, which may stay in the cache")
    parser.add_argument("--out", type=Path, help="a folder for gemm.json, gemm.csv and, with matplotlib, plots")
    options = parser.parse_args(argv)
    try:
        shapes = shapes_of(options.shapes, options.rows)
    except (OSError, ValueError) as error:
        print(f"bench gemm: {error}", file=sys.stderr)
        return 2
    cases, left_out = cases_of(flat(options.schemes), flat(options.group_sizes), shapes)
    if not cases:
        print("bench gemm: nothing to time:", *left_out, sep="\n", file=sys.stderr)
        return 2
    work = list(itertools.product(options.threads, cases))
    result: dict[str, Any] = {"machine": machine(), "shapes": options.shapes, "ceilings": {}, "rows": []}
    say: Callable[[str], Any] = print
    progress: Any = work
    try:
        from tqdm import tqdm
    except ImportError:
        pass
    else:
        say, progress = tqdm.write, tqdm(work, unit="shape", disable=None)
    say(f"{result['machine']['cpu']}, {result['machine']['path']}; {'one copy' if options.hot else 'rotating copies'}")
    say(
        "ops, roof: share of the ceiling of integer dot products and of what it and the memory's bandwidth allow "
        "(w4a16: the bandwidth alone)"
    )
    for reason in left_out:
        say(f"left out: {reason}")
    say(HEADER)
    for threads, case in progress:
        torch.set_num_threads(threads)
        if str(threads) not in result["ceilings"]:
            ceiling = result["ceilings"][str(threads)] = ceilings(threads)
            if ceiling:
                ops, memory = ceiling["ops_per_second"] / 1e12, ceiling["bytes_per_second"] / 1e9
                say(f"ceilings of {threads} threads: {ops:.3f} TOPS, {memory:.1f} GB/s")
        row = measure(case, threads, result["ceilings"][str(threads)], options.hot, options.blocks)
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
