"""Prints, as Markdown, what each case must move and the time that takes at best: the floor, before any measurement."""

from __future__ import annotations

import argparse
import math

from cases import CASES

SHAPE = (16384, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--bandwidth", type=float, default=4.3e12, help="copy bandwidth, bytes per second (H200: 4.3e12)"
    )
    bandwidth = parser.parse_args().bandwidth
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


if __name__ == "__main__":
    main()
