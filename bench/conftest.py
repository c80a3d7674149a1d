"""Benchmarks under pytest: fixtures that check and time, and the reports. How calls are timed: laps.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import peers
import pytest
import torch
from laps import BLOCKS, Call, alternate, check, record

rows: list[dict[str, Any]] = []


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, threads: int) -> Callable[..., None]:
    """compare(candidate, {peer: call or None}, expected): all must give what is expected, then they are timed."""

    def run(
        candidate: Call,
        competitors: dict[str, Call | None],
        expected: Any,
        *,
        tolerance: float = 1e-6,
        peer_tolerance: float = 0.03,
        blocks: int = BLOCKS,
    ) -> None:
        calls = {"qkernels": candidate, **{name: call for name, call in competitors.items() if call is not None}}
        for name, call in calls.items():
            check(name, call(), expected, tolerance if name == "qkernels" else peer_tolerance)
        times = alternate(calls, blocks)
        ours = times["qkernels"]["median"]
        ratios = {name: times[name]["median"] / ours for name in calls if name != "qkernels"}
        case = re.sub(r"[12]-threads?-?", "", request.node.name.removeprefix("test_")).replace("[]", "")
        rows.append({"op": stem(request), "case": case, "threads": threads, "seconds": times, "ratios": ratios})
        benchmark.extra_info.update(seconds=times, ratios=ratios, threads=threads)
        benchmark.pedantic(candidate, rounds=10, iterations=1)

    return run


@pytest.fixture
def overheads(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """overheads(base): the last comparison once more, as each contestant's time over the time of ``base``."""

    def run(base: str) -> None:
        row = rows[-1]
        seconds = {name: times["median"] for name, times in row["seconds"].items()}
        figures = {name: round(value / seconds[base], 3) for name, value in seconds.items() if name != base}
        case = f"{row['case']}, {row['threads']} threads: times {base}"
        rows.append({"op": row["op"], "case": case, "figures": figures})

    return run


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """report(case, …): a row of figures that are not times in seconds; ``raw`` goes to the file alone."""

    def run(case: str, raw: Any = None, **figures: Any) -> None:
        rows.append({"op": stem(request), "case": case, "figures": figures} | ({"raw": raw} if raw else {}))

    return run


def stem(request: pytest.FixtureRequest) -> str:
    return request.path.stem.removeprefix("bench_")


def pytest_sessionfinish() -> None:
    for op in {row["op"] for row in rows}:
        record(op, [row for row in rows if row["op"] == op])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    write = terminalreporter.write_line
    if rows:
        write("")
        write("median of qkernels (p20 to p80), then how many times as long each peer took")
    for row in rows:
        if "figures" in row:
            figures = ", ".join(f"{name} {value}" for name, value in row["figures"].items())
            write(f"{row['op']:<14} {row['case']:<44} {figures}")
            continue
        ours = row["seconds"]["qkernels"]
        unit, scale = ("µs", 1e6) if ours["median"] < 1e-3 else ("ms", 1e3)
        low, middle, high = (scale * ours[key] for key in ("p20", "median", "p80"))
        time_text = f"{middle:.4g} {unit} ({low:.4g} to {high:.4g})"
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        write(f"{row['op']:<14} {row['case']:<44} {row['threads']}t  {time_text:<34} {ratios}")
    for name, reason in peers.missing.items():
        write(f"missing peer: {name}: {reason}")
