"""Prints, as Markdown, what each case must move and the time that takes at best: the floor, before any measurement."""

from __future__ import annotations

import argparse
import math

import gemm
from cases import CASES
from shapes import GROUP_SIZES, LLAMA_8B, Case, Shape  # gemm knows where they are

SHAPE = (16384, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--bandwidth", type=float, default=4.3e12, help="copy bandwidth, bytes per second (H200: 4.3e12)"
    )
    parser.add_argument("--int8", type=float, default=1.16e15, help="int8 operations per second (H200: 1.16e15)")
    parser.add_argument("--bf16", type=float, default=0.763e15, help="bf16 operations per second (H200: 0.763e15)")
    options = parser.parse_args()
    bandwidth = options.bandwidth
    print(
        f"Floors at {SHAPE[0]}×{SHAPE[1]} at {bandwidth / 1e12:.1f} TB/s of copy bandwidth; ATen's bytes by its source"
    )
    print("(masks of a byte per element, two passes per channel, learnable backward through full-size temporaries).\n")
    print("| case | bytes/element fp32 | half | floor µs fp32 | half | ATen bytes/element fp32 | ratio fp32 | half |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        moved = [case.moved(size) for size in (4, 2)]
        floors = " | ".join(f"{1e6 * math.prod(SHAPE) * m / bandwidth:.0f}" for m in moved)
        aten = [case.aten_moves(size) if case.aten_moves else None for size in (4, 2)]
        ratios = " | ".join(f"{a / m:.2f}" if a else "" for a, m in zip(aten, moved, strict=True))
        bytes_moved = " | ".join(f"{m:.4g}" for m in moved)
        print(f"| {case.name} | {bytes_moved} | {floors} | {aten[0] or ''} | {ratios} |")
    predict_gemm(options)


def predict_gemm(options: argparse.Namespace) -> None:
    """Floors by the same ceilings for everyone, so that the ratios say what fusing saves; launches are free here."""
    int8, bf16, bandwidth = options.int8, options.bf16, options.bandwidth
    print(
        f"\nFloors of [M, K] x [K, N] at {int8 / 1e12:.0f} TOPS int8, {bf16 / 1e12:.0f} TFLOPS bf16 (what the fastest "
        f"kernels reach) and {bandwidth / 1e12:.1f} TB/s.\n"
    )
    print("| N x K | M | int8_scaled_mm µs | bound by | _int_mm + rescale | bf16 linear |")
    print("|---|---|---|---|---|---|")
    for n, k in LLAMA_8B.values():
        for m in gemm.ROWS:
            operations = 2 * m * n * k
            fused, sums = (
                max(operations / int8, gemm.moved(Case(scheme, Shape(m, n, k))) / bandwidth)
                for scheme in ("scaled", "raw")
            )
            unfused = sums + 6 * m * n / bandwidth
            floats = max(operations / bf16, 2 * (m * k + n * k + m * n) / bandwidth)
            bound = "memory" if operations / int8 < fused else "arithmetic"
            peer = f"{unfused / fused:.2f}" if m > 16 else ""
            print(f"| {n} x {k} | {m} | {1e6 * fused:.1f} | {bound} | {peer} | {floats / fused:.2f} |")
    print(
        "\nFloors of int4_linear, w4a8 at the int8 rate, w4a16 at that of bf16; then bf16 linear's floor over each.\n"
    )
    print("| N x K | M | group | w4a8 µs | w4a16 µs | bf16 linear / w4a8 | / w4a16 |")
    print("|---|---|---|---|---|---|---|")
    for n, k in LLAMA_8B.values():
        for m in gemm.ROWS:
            for group_size in GROUP_SIZES:
                operations = 2 * m * n * k
                floats = max(operations / bf16, 2 * (m * k + n * k + m * n) / bandwidth)
                w4a8, w4a16 = (
                    max(operations / rate, gemm.moved(Case(scheme, Shape(m, n, k), group_size)) / bandwidth)
                    for scheme, rate in (("w4a8", int8), ("w4a16", bf16))
                )
                print(
                    f"| {n} x {k} | {m} | {group_size} | {1e6 * w4a8:.1f} | {1e6 * w4a16:.1f} "
                    f"| {floats / w4a8:.2f} | {floats / w4a16:.2f} |"
                )


if __name__ == "__main__":
    main()
