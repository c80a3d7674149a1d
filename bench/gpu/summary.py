"""The one table of a run, in Markdown: its steps, then every benchmark's rows from their raw JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TIMES_HEAD = [
    "| case | size | dtype | kernel | µs (p20–p80) | rate | share | other kernels and peers |",
    "|---|---|---|---|---|---|---|---|",
]
LEGEND = (
    "Kernel times from CUDA graphs over rotating buffers (\\*: not captured, timed by events). kernel: what a call "
    "takes by itself; share: ideal bytes over time over the copy bandwidth; others: their time over ours."
)


def text(value: Any) -> str:
    """In a cell of the table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def size_of(row: Mapping[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def micro(times: Mapping[str, float]) -> str:
    low, middle, high = (f"{1e6 * times[key]:.1f}" for key in ("p20", "median", "p80"))
    return f"{middle} ({low}–{high})"


def times_line(row: Mapping[str, Any]) -> str:
    start = f"| {row['case']} | {size_of(row)} | {row['dtype']} | "
    seconds, ours = row.get("seconds", {}), row.get("ours")
    if ours not in seconds:
        return f"{start}none: {text(row.get('left_out', {}))} | | | | |"
    own = seconds[ours]
    rate = f"{row['bytes'] / own['median'] / 1e9:.0f} GB/s"
    if "operations" in row:
        rate = f"{row['operations'] / own['median'] / 1e12:.1f} TOPS, {rate}"
    others = ", ".join(
        f"{name} {times['median'] / own['median']:.2f}{'' if times['by'] == 'graph' else '*'}"
        for name, times in seconds.items()
        if name != ours
    )
    kernel = ours if own["by"] == "graph" else f"{ours}*"
    return f"{start}{kernel} | {micro(own)} | {rate} | {row['share_of_copy'][ours]:.0%} | {others} |"


def host_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield "| case | size | dtype | host µs per call (p20–p80) |"
    yield "|---|---|---|---|"
    for row in rows:
        said = ", ".join(f"{name} {micro(times)}" for name, times in row.get("host_seconds", {}).items())
        yield f"| {row['case']} | {size_of(row)} | {row['dtype']} | {said} |"


def benchmark_lines(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    rows, machine = result["rows"], result["machine"]
    yield from ("", f"## {name}", "")
    if bandwidth := machine.get("copy_bytes_per_second"):
        yield from (f"Copy bandwidth {bandwidth / 1e12:.2f} TB/s. {LEGEND}", "")
    if any("host_seconds" in row for row in rows):
        yield from host_lines(rows)
    else:
        yield from TIMES_HEAD
        yield from map(times_line, rows)
    faults = [row for row in rows if "fault" in row]
    if faults:
        yield from ("", f"{len(faults)} rows with a fault:", "")
        yield from (f"- {row['case']}, {size_of(row)}, {row['dtype']}: {text(row['fault'])}" for row in faults)
    if result["out_of_time"]:
        yield from ("", f"Not timed for lack of time: {result['out_of_time']} rows.")


def table(machine: Mapping[str, Any], steps: Iterable[Mapping[str, Any]], results: Iterable[Path]) -> str:
    lines = [f"# {machine.get('gpu')}, {machine.get('date')}", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items() if key not in ("gpu", "date", "smi")]
    lines += [f"- {key}: {value}" for key, value in machine.get("smi", {}).items()]
    lines += ["", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {step['step']} | {text(step['outcome'])} | {step['seconds']} |" for step in steps]
    for path in results:
        lines += benchmark_lines(path.stem, json.loads(path.read_text()))
    return "\n".join(lines) + "\n"
