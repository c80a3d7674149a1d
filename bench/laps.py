"""How everything here is timed: first checked, then in alternating blocks against its peers, in one process.

Blocks of 0.12 s, not single calls, alternate: thread pools of onnxruntime and OpenMP spin after a call and take the
cores from whoever is timed next (2× on 2 cores). A contestant timed against itself reads 0.98 to 1.02.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor

import qkernels as qk
from qkernels import info

RESULTS = Path(__file__).parent / "results"
BLOCKS, BLOCK_SECONDS, PAUSE_SECONDS, WARM_UP_CALLS = 5, 0.12, 0.03, 3
LAP_SECONDS = 50e-6  # shorter calls are timed several at once: reading the clock twice takes 0.1 µs

Call = Callable[[], Any]


def forward_backward(function: Call, inputs: list[Tensor], grad: Tensor) -> Call:
    """y and the gradients of inputs."""

    def call() -> tuple[Tensor, ...]:
        y = function()
        return y, *torch.autograd.grad(y, inputs, grad)

    return call


def laps_of(call: Call) -> list[float]:
    """Seconds per call, over one block."""
    start, warm = time.perf_counter(), 0
    while warm < WARM_UP_CALLS and time.perf_counter() < start + BLOCK_SECONDS:
        call()
        warm += 1
    at_once = max(1, int(LAP_SECONDS * warm / (time.perf_counter() - start)))
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


def seconds_of(call: Call, budget: float, least: int) -> list[float]:
    laps: list[float] = []
    end = time.perf_counter() + budget
    while len(laps) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        laps.append(time.perf_counter() - start)
    return laps


def interleaved(call: Call, *, blocks: int = 4, budget: float = 0.1, least: int = 3) -> dict[str, float]:
    """Median milliseconds of the call without and with the override, in alternating blocks after one of each."""
    laps: dict[str, list[float]] = {"torch": [], "override": []}
    for block in range(blocks + 1):
        for name in laps:
            handle = qk.override_torch() if name == "override" else None
            measured = seconds_of(call, budget if block else 0, least if block else 1)
            if handle is not None:
                handle.restore()
            laps[name] += measured if block else []
    return {name: 1e3 * statistics.median(values) for name, values in laps.items()}


def figures(times: dict[str, float]) -> dict[str, float]:
    return {
        "torch ms": round(times["torch"], 4),
        "override ms": round(times["override"], 4),
        "times faster": round(times["torch"] / times["override"], 2),
    }


def spread(values: list[float]) -> dict[str, float]:
    at = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": at[0], "p80": at[3], "laps": len(values)}


def tensors_of(result: Any) -> list[Tensor]:
    return [torch.as_tensor(part).detach() for part in (result if isinstance(result, tuple | list) else [result])]


def check(name: str, got: Any, expected: Any, tolerance: float) -> None:
    for at, (g, e) in enumerate(zip(tensors_of(got), tensors_of(expected), strict=True)):
        assert g.shape == e.shape, f"{name}: output {at} has shape {list(g.shape)}, expected {list(e.shape)}"
        error = float((g.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30))
        assert error <= tolerance, f"{name}: output {at} is off by {error:.2g} of its norm (accepted: {tolerance:.2g})"


def peak_bytes(call: Call) -> int:
    """The most that torch's allocator held at once of what one call asked it for: activations and scratch memory."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def record(op: str, new: list[dict[str, Any]]) -> Path:
    """Writes rows to results/<device>/<date>-<op>.json, in place of the same cases of the same day."""
    here = machine()
    path = RESULTS / device_name(here) / f"{here['date']}-{op}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["case"], row.get("threads")) for row in new}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if (row["case"], row.get("threads")) not in done]
    path.write_text(json.dumps({"machine": here, "rows": kept + new}, indent=1) + "\n")
    return path


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


def device_name(here: dict[str, Any]) -> str:
    """The folder of results of this machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{here['cpu']} {here['cores']} cores {here['path']}".lower()).strip("-")
