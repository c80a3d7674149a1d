"""Prints, as Markdown, what each case must move, the time that takes at best, and the time that is the goal.

    python bench/gpu/predict.py > FILE      # the computed part of results/<device>/predicted.md

All of it is computed from sizes, from ceilings that others have published and from peers' published times: nothing
here was measured by us.
"""

from __future__ import annotations

import argparse
import math

import gemm
from cases import CASES
from shapes import LLAMA_8B, Case, Shape  # gemm knows where they are

SHAPE = (16384, 8192)
ROWS = (1, 16, 64, 1024, 8192)
GROUP_SIZE = 128
START = 2e-6  # seconds until a kernel's first bytes arrive and after its last leave: no short kernel goes below that
SMALL_M_SHARE = 0.75  # of copy bandwidth, beside START, of an int8 product of up to 64 rows
# Marlin on an H200, one row, groups of 128 (TileOPs#1874): 8192 x 8192 in 20.3 us, 8192 x 16384 in 38.1 us. The line
# through both is 2.5 us and 1.94 TB/s.
MARLIN_START, MARLIN_RATE = 2.5e-6, 1.94e12


def share(name: str, size: int) -> float:
    """Of copy bandwidth, as a goal: halves with a channel per row have twice the arithmetic to a byte."""
    return 0.85 if size == 2 and "per channel" in name else 0.9


def against_aten(name: str) -> str:
    if not name.startswith("LSQ forward"):
        return ""
    return "2.0" if "per channel" in name else "1.9"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bandwidth", type=float, default=4.3e12, help="copy bandwidth, bytes per second (H200: 4.3e12)"
    )
    parser.add_argument("--int8", type=float, default=1.16e15, help="int8 operations per second (H200: 1.16e15)")
    parser.add_argument("--bf16", type=float, default=0.763e15, help="bf16 operations per second (H200: 0.763e15)")
    options = parser.parse_args()
    predict_fake_quant(options.bandwidth)
    predict_int8(options.int8, options.bf16, options.bandwidth)
    predict_int4(options.bf16, options.bandwidth)


def predict_fake_quant(bandwidth: float) -> None:
    print(
        f"## Fake quantization\n\n{SHAPE[0]}×{SHAPE[1]}, {bandwidth / 1e12:.1f} TB/s of copy bandwidth; fp32 / half. "
        "ATen's bytes are those of its source (masks of a\nbyte per element, two passes per channel, learnable "
        "backward through full-size temporaries). The goal is a share of copy\nbandwidth, and nowhere more time than "
        "torch.compile takes.\n"
    )
    print(
        "| case | bytes/element | floor µs | goal, of copy | goal µs | ATen bytes/element | ATen/ours by bytes | goal |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        moved = [case.moved(size) for size in (4, 2)]
        floors = [1e6 * math.prod(SHAPE) * m / bandwidth for m in moved]
        shares = [share(case.name, size) for size in (4, 2)]
        aten = [case.aten_moves(size) for size in (4, 2)] if case.aten_moves else []
        row = [
            " / ".join(f"{m:.4g}" for m in moved),
            " / ".join(f"{floor:.0f}" for floor in floors),
            " / ".join(f"{s:.0%}" for s in shares),
            " / ".join(f"{floor / s:.0f}" for floor, s in zip(floors, shares, strict=True)),
            " / ".join(f"{a:.4g}" for a in aten),
            " / ".join(f"{a / m:.2f}" for a, m in zip(aten, moved, strict=False)),
            against_aten(case.name),
        ]
        print(f"| {case.name} | {' | '.join(row)} |")


def predict_int8(int8: float, bf16: float, bandwidth: float) -> None:
    print(
        f"\n## int8_scaled_mm\n\nLayers of Llama 8B at {int8 / 1e12:.0f} TOPS int8 and {bf16 / 1e12:.0f} TFLOPS bf16, "
        "what the fastest kernels reach. From 1024 rows on the goal is\nthe least of `_int_mm` and a rescaling, "
        "`_int_mm`/0.95 and, at K = 4096, bf16/1.25; below that "
        f"{SMALL_M_SHARE:.0%} of copy\nbandwidth and {1e6 * START:.0f} µs.\n"
    )
    print(
        "| N × K | M | bound by | floor µs | `_int_mm` µs | and rescaled | bf16 µs | goal µs "
        "| `_int_mm`/goal | bf16/goal |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for n, k in LLAMA_8B.values():
        for m in ROWS:
            operations = 2 * m * n * k
            fused, sums = (
                max(operations / int8, gemm.moved(Case(scheme, Shape(m, n, k))) / bandwidth)
                for scheme in ("scaled", "raw")
            )
            rescaled = sums + 6 * m * n / bandwidth
            floats = max(operations / bf16, 2 * (m * k + n * k + m * n) / bandwidth)
            if m >= 1024:
                goal = min(rescaled, sums / 0.95, *([floats / 1.25] if k == 4096 else []))
            else:
                goal = START + fused / SMALL_M_SHARE
            bound = "memory" if operations / int8 < fused else "arithmetic"
            peers = f"{1e6 * sums:.1f} | {1e6 * rescaled:.1f}" if m > 16 else "|"
            ratio = f"{sums / goal:.2f}" if m > 16 else ""
            print(
                f"| {n} × {k} | {m} | {bound} | {1e6 * fused:.1f} | {peers} | {1e6 * floats:.1f} | {1e6 * goal:.1f} "
                f"| {ratio} | {floats / goal:.2f} |"
            )


def predict_int4(bf16: float, bandwidth: float) -> None:
    print(
        f"\n## int4_linear, W4A16\n\nGroups of {GROUP_SIZE}, scales as they are packed: fp32; those of Marlin are "
        f"halves. Its times are by its line of {1e6 * MARLIN_START:.1f} µs and\n{MARLIN_RATE / 1e12:.2f} TB/s through "
        "two published ones. The goal up to 16 rows is 1.1 times its speed, at 64 rows bf16's floor.\n"
    )
    print("| N × K | M | floor µs | Marlin µs | bf16 µs | goal µs | of copy | bf16/goal |")
    print("|---|---|---|---|---|---|---|---|")
    for n, k in LLAMA_8B.values():
        for m in ROWS:
            operations = 2 * m * n * k
            moved = gemm.moved(Case("w4a16", Shape(m, n, k), GROUP_SIZE))
            floor = max(operations / bf16, moved / bandwidth)
            floats = max(operations / bf16, 2 * (m * k + n * k + m * n) / bandwidth)
            marlin = MARLIN_START + (moved - 2 * n * k // GROUP_SIZE) / MARLIN_RATE
            goal = marlin / 1.1 if m <= 16 else floats if m <= 64 else None
            cells = [f"{1e6 * goal:.1f}", f"{floor / goal:.0%}", f"{floats / goal:.2f}"] if goal else [""] * 3
            print(
                f"| {n} × {k} | {m} | {1e6 * floor:.1f} | {f'{1e6 * marlin:.1f}' if m <= 16 else ''} "
                f"| {1e6 * floats:.1f} | {' | '.join(cells)} |"
            )


if __name__ == "__main__":
    main()
