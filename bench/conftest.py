"""How everything here is timed: first checked, then in alternating blocks against its peers, in one process.

Blocks of 0.12 s, not single calls, alternate: thread pools of onnxruntime and OpenMP spin after a call and take the
cores from whoever is timed next (2× on 2 cores). A contestant timed against itself reads 0.98 to 1.02.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels import info

RESULTS = Path(__file__).parent / "results"
BLOCKS, BLOCK_SECONDS, PAUSE_SECONDS, WARM_UP_CALLS = 5, 0.12, 0.03, 3
LAP_SECONDS = 50e-6  # shorter calls are timed several at once: reading the clock twice takes 0.1 µs

Call = Callable[[], Any]
rows: list[dict[str, Any]] = []


def laps_of(call: Call) -> list[float]:
    """Seconds per call, over one block."""
    start = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        call()
    at_once = max(1, int(LAP_SECONDS * WARM_UP_CALLS / (time.perf_counter() - start)))
    laps = []
    end = time.perf_counter() + BLOCK_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(at_once):
            call()
        laps.append((time.perf_counter() - start) / at_once)
    return laps


def alternate(calls: dict[str, Call], blocks: int = BLOCKS) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of the seconds of each call."""
    laps: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            time.sleep(PAUSE_SECONDS)
            laps[name] += laps_of(call)
    return {name: spread(values) for name, values in laps.items()}


def spread(values: list[float]) -> dict[str, float]:
    at = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": at[0], "p80": at[3], "laps": len(values)}


def tensors_of(result: Any) -> list[Tensor]:
    return [torch.as_tensor(part).detach() for part in (result if isinstance(result, tuple | list) else [result])]


def check(name: str, got: Any, expected: Any, tolerance: float) -> None:
    for at, (g, e) in enumerate(zip(tensors_of(got), tensors_of(expected), strict=True)):
        assert g.shape == e.shape, f"{name}: output {at} has shape {list(g.shape)}, expected {list(e.shape)}"
        error = float((g.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30))
        assert error <= tolerance, f"{name}: output {at} is off by {error:.2g} of its norm (accepted: {tolerance:.2g})"


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


def machine() -> dict[str, Any]:
    host = qk.library.host
    return {
        "cpu": info.cpu_model(),
        "cores": os.cpu_count(),
        "path": host.active_isa() if host is not None else "reference",
        "torch": torch.__version__,
        "qkernels": qk.__version__,
        "date": date.today().isoformat(),
        "missing peers": peers.missing,
    }


def pytest_sessionfinish() -> None:
    """Writes each op's rows to results/<device>/<date>-<op>.json, in place of the same cases of the same day."""
    here = machine()
    device = re.sub(r"[^a-z0-9]+", "-", f"{here['cpu']} {here['cores']} cores {here['path']}".lower()).strip("-")
    for op in {row["op"] for row in rows}:
        path = RESULTS / device / f"{here['date']}-{op}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = [row for row in rows if row["op"] == op]
        done = {(row["case"], row.get("threads")) for row in new}
        old = json.loads(path.read_text())["rows"] if path.exists() else []
        kept = [row for row in old if (row["case"], row.get("threads")) not in done]
        path.write_text(json.dumps({"machine": here, "rows": kept + new}, indent=1) + "\n")


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
