"""Times on a GPU: first checked, then replayed as CUDA graphs over rotating buffers, the contestants in turn.

A graph holds one call on each of the rotating input sets, whose inputs and outputs together are several times the
L2 cache: what is timed is memory, and no host time. A peer that waits for the GPU cannot be captured; it is timed with
events around the same calls made one by one, and its row says so.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Sequence
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


# Of captures that failed. Before torch 2.12 the allocator keeps a pointer to such a graph and follows it at each later
# capture (pytorch#180395).
_broken: list[Any] = []


def lap_of(call: Call, sets: Sequence[Inputs], capture: bool) -> tuple[Callable[[], None], dict[str, str]]:
    """A function that makes one call on each of the sets, and how: by "graph" or "events", and why not by a graph."""

    def eager() -> None:
        for inputs in sets:
            call(*inputs)

    for _ in range(3):
        eager()
    torch.cuda.synchronize()
    if not capture:
        return eager, {"by": "events"}
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    kept = []  # outputs live until the end of the capture, so that they rotate as the inputs do
    try:
        with torch.cuda.graph(graph):
            for inputs in sets:
                kept.append(call(*inputs))
    except RuntimeError as error:
        # torch 2.11 leaves the capture's stream current where a capture fails.
        torch.cuda.set_stream(stream)
        _broken.append(graph)
        torch.cuda.synchronize()
        return eager, {"by": "events", "capture": f"failed: {(str(error).splitlines() or ['RuntimeError'])[0][:200]}"}
    del kept
    return graph.replay, {"by": "graph"}


def sm_clock() -> int | None:
    """MHz at this moment; None where NVML's Python module is missing or refuses."""
    try:
        return int(torch.cuda.clock_rate())
    except (ModuleNotFoundError, RuntimeError):
        return None


def seconds_of(lap: Callable[[], None], repeats: int, clock: list[int | None] | None = None) -> float:
    """Of one lap. ``clock`` is given the GPU's clock while it is at work."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        lap()
    end.record()
    if clock is not None:
        clock.append(sm_clock())
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def spread(values: list[float]) -> dict[str, float]:
    at = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "p20": at[0], "p80": at[3]}


def compare(
    calls: dict[str, Call],
    sets: Sequence[Inputs],
    forced: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    waiting: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Seconds per call of every contestant: median, p20 and p80 over rounds in which each takes its turn.

    ``forced(name)`` is entered while the contestant is captured: a graph then replays the kernels it chose. Those
    named in ``waiting`` wait for the GPU, which no capture allows: they are timed with events.
    """
    laps = {}
    for name, call in calls.items():
        with forced(name):
            laps[name] = lap_of(call, sets, name not in waiting)
    repeats = {
        name: max(1, int(SECONDS_PER_CONTESTANT / ROUNDS / max(seconds_of(lap, 1), 1e-6)))
        for name, (lap, _) in laps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in laps}
    clocks: dict[str, list[int | None]] = {name: [] for name in laps}
    for number in range(ROUNDS):
        for name, (lap, _) in laps.items():
            clock = clocks[name] if number == ROUNDS - 1 else None
            times[name].append(seconds_of(lap, repeats[name], clock) / len(sets))
    result = {name: {**spread(values), **laps[name][1], "sm_mhz": clocks[name][0]} for name, values in times.items()}
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
    """Bytes per second, read plus written, of the largest copy: the ceiling that shares are given of.

    By a copy, which the driver may leave to a copy engine, or by a kernel that negates: whichever is faster.
    """
    sets = [tuple(torch.randn(COPY_ELEMENTS, device="cuda") for _ in range(2)) for _ in range(2)]
    copies = {
        "copy": lambda source, target: target.copy_(source),
        "negation": lambda source, target: torch.neg(source, out=target),
    }
    return 2 * 4 * COPY_ELEMENTS / min(times["median"] for times in compare(copies, sets).values())
