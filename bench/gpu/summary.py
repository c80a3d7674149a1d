"""From the raw JSON of one GPU to a Markdown table and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def size_of(row: dict[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def table(result: dict[str, Any]) -> str:
    """Per row our best kernel's time, its share of the copy bandwidth, and the peers' times over it."""
    machine = result["machine"]
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; copy "
        f"{machine['copy_bytes_per_second'] / 1e12:.2f} TB/s. Kernel times from CUDA graphs over rotating buffers "
        "(\\*: not capturable, timed by events); `share`: ideal bytes over time over that bandwidth; peers: their time "
        "over ours.",
        "",
        "| case | size | dtype | kernel | µs (p20–p80) | rate | share | other kernels and peers | host µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "seconds" not in row:
            continue
        seconds = row["seconds"]
        ours = next((name for name in ("cuda", "triton") if name in seconds), None)
        if ours is None:
            lines.append(f"| {row['case']} | {size_of(row)} | {row['dtype']} | none: {row['left_out']} | | | | | |")
            continue
        own = seconds[ours]
        others = ", ".join(
            f"{name} {times['median'] / own['median']:.2f}{'' if times['by'] == 'graph' else '*'}"
            for name, times in seconds.items()
            if name != ours
        )
        host = ", ".join(f"{name} {1e6 * t['median']:.1f}" for name, t in row.get("host_seconds", {}).items())
        rate = f"{row['bytes'] / own['median'] / 1e9:.0f} GB/s"
        if "operations" in row:
            rate = f"{row['operations'] / own['median'] / 1e12:.1f} TOPS, {rate}"
        low, middle, high = (f"{1e6 * own[key]:.1f}" for key in ("p20", "median", "p80"))
        lines.append(
            f"| {row['case']} | {size_of(row)} | {row['dtype']} | {ours} | {middle} ({low}–{high}) "
            f"| {rate} | {row['share_of_copy'][ours]:.0%} | {others} | {host} |"
        )
    missed = [row for row in result["rows"] if "seconds" not in row]
    if missed:
        lines += ["", f"Not timed: {len(missed)} rows (out of time)."]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Share of the copy bandwidth over size, one panel per case, one file per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        figure, axes = plt.subplots(-(-len(cases) // 3), 3, figsize=(15, 4 * -(-len(cases) // 3)), squeeze=False)
        for axis, case in zip(axes.flat, cases, strict=False):
            points: dict[str, list[tuple[int, float]]] = {}
            for row in result["rows"]:
                if row["case"] == case and row["dtype"] == dtype and "seconds" in row:
                    numel = 1
                    for size in row["shape"]:
                        numel *= size
                    for name, share in row["share_of_copy"].items():
                        points.setdefault(name, []).append((numel, share))
            for name, line in points.items():
                axis.plot(*zip(*sorted(line), strict=True), marker="o", label=name)
            axis.set(title=case, xscale="log", xlabel="elements", ylabel="share of copy bandwidth")
            axis.axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
            if points:
                axis.legend(fontsize=8)
        figure.suptitle(f"{result['machine']['gpu']}, {dtype}")
        figure.tight_layout()
        figure.savefig(path.with_name(f"{path.stem}-{dtype}.png"), dpi=80)
        plt.close(figure)


def write(path: Path) -> list[str]:
    """Writes the table and the plots beside the raw results; what could not be made, and why."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(table(result))
    try:
        plot(result, path)
    except ImportError as error:
        return [f"plots: {error}"]
    return []
