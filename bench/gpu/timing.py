"""Times on a GPU: first checked, then replayed as CUDA graphs over rotating buffers, the contestants in turn.

A graph holds one call on each of the rotating input sets, whose inputs and outputs together are several times the
L2 cache: what is timed is memory, and no host time. A peer that synchronises cannot be captured; it is timed with
events around the same calls made one by one, and its row says so.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

L2_MULTIPLE = 4
MOST_SETS = 32  # small inputs cannot fill the cache with so few; their time is launch latency anyway
ROUNDS = 15
SECONDS_PER_CONTESTANT = 0.12
COPY_ELEMENTS = 1 << 28
HOST_CALLS = 100  # well below the depth of the launch queue

Inputs = tuple[Any, ...]
Call = Callable[..., Any]


def input_sets(make: Callable[[], Inputs], bytes_moved: float) -> list[Inputs]:
    """As many independent inputs as it takes to keep one call's data from being in the cache at the next replay."""
    l2 = torch.cuda.get_device_properties(None).L2_cache_size
    return [make() for _ in range(max(2, min(MOST_SETS, int(L2_MULTIPLE * l2 / max(bytes_moved, 1)) + 1)))]


def tensors_of(result: Any) -> list[Tensor]:
    return [part.detach() for part in (result if isinstance(result, tuple | list) else [result])]


def error_of(got: Any, expected: Any) -> float:
    """The largest ‖got − expected‖ / ‖expected‖ over the outputs; NaN where one holds NaN."""
    errors = [
        float((g.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30))
        for g, e in zip(tensors_of(got), tensors_of(expected), strict=True)
    ]
    return max(errors, key=lambda error: (error != error, error))


def lap_of(call: Call, sets: Sequence[Inputs]) -> tuple[Callable[[], None], str]:
    """A function that makes one call on each of the sets, and how: "graph", or "events" where that is impossible."""

    def eager() -> None:
        for inputs in sets:
            call(*inputs)

    for _ in range(3):
        eager()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []  # outputs live until the end of the capture, so that they rotate as the inputs do
    try:
        with torch.cuda.graph(graph):
            for inputs in sets:
                kept.append(call(*inputs))
    except RuntimeError:
        torch.cuda.synchronize()
        return eager, "events"
    del kept
    return graph.replay, "graph"


def seconds_of(lap: Callable[[], None], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        lap()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def spread(values: list[float]) -> dict[str, float]:
    at = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "p20": at[0], "p80": at[3]}


def compare(
    calls: dict[str, Call],
    sets: Sequence[Inputs],
    forced: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> dict[str, dict[str, Any]]:
    """Seconds per call of every contestant: median, p20 and p80 over rounds in which each takes its turn.

    ``forced(name)`` is entered while the contestant is captured: a graph then replays the kernels it chose.
    """
    laps = {}
    for name, call in calls.items():
        with forced(name):
            laps[name] = lap_of(call, sets)
    repeats = {
        name: max(1, int(SECONDS_PER_CONTESTANT / ROUNDS / max(seconds_of(lap, 1), 1e-6)))
        for name, (lap, _) in laps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in laps}
    for _ in range(ROUNDS):
        for name, (lap, _) in laps.items():
            times[name].append(seconds_of(lap, repeats[name]) / len(sets))
    result = {name: {**spread(values), "by": laps[name][1]} for name, values in times.items()}
    del laps
    gc.collect()
    torch.cuda.empty_cache()
    return result


def host_seconds(calls: dict[str, Call], inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Seconds that the host spends in one call that nothing waits for."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(HOST_CALLS // 5):
                call(*inputs)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call(*inputs)
            times[name].append((time.perf_counter() - start) / HOST_CALLS)
            torch.cuda.synchronize()
    return {name: {**spread(values), "by": "host clock"} for name, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of the largest copy: the ceiling that shares are given of."""
    sets = [tuple(torch.randn(COPY_ELEMENTS, device="cuda") for _ in range(2)) for _ in range(2)]
    times = compare({"copy": lambda source, target: target.copy_(source)}, sets)
    return 2 * 4 * COPY_ELEMENTS / times["copy"]["median"]
