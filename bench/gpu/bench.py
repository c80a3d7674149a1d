"""Times every case of cases.py on this GPU; writes <OUT>/<date>-fake_quantize.json. A process of its own, by run.py."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import CASES, DTYPES, SHAPES, Case
from timing import compare, copy_bandwidth, error_of, host_seconds, input_sets

import qkernels as qk

OURS = ("cuda", "triton")
TOLERANCE = 5e-4  # against the reference, whose sums (dscale, RMSNorm's mean) are in another order: rare codes differ
HOST_SHAPE = (64, 64)
# torch.compile takes seconds for each shape and dtype, Triton half of one, and fp16 code is bf16 code.
COMPILED = [(shape, dtype) for shape in ((16384, 8192), (4096, 4096)) for dtype in ("fp32", "bf16")]


def machine(bandwidth: float) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(None)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "copy_bytes_per_second": bandwidth,
        "torch": torch.__version__,
        "qkernels": qk.__version__,
        "date": date.today().isoformat(),
    }


def forced(name: str) -> contextlib.AbstractContextManager[None]:
    return qk.use_kernel(name) if name in OURS else contextlib.nullcontext()


def fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies: an observer's call moves its statistics, and the next contestant's must start where it did."""
    return tuple(
        t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs
    )


def contestants(case: Case, inputs: tuple[Any, ...], compiles: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The calls that give what the reference gives, and why the others were left out."""
    with qk.use_kernel("reference"):
        expected = case.ours(*fresh(inputs))
    reasons = dict(qk.which(case.op))
    calls, left_out = {}, {}
    for name in OURS if compiles or reasons.get("cuda", "none") is not None else OURS[:1]:
        if reasons.get(name, f"{case.op} has no such kernel") is not None:
            left_out[name] = str(reasons.get(name, "no such kernel"))
            continue
        with forced(name):
            error = error_of(case.ours(*fresh(inputs)), expected)
        assert error <= TOLERANCE, f"{case.name}: {name} is off by {error:.2g} of the norm on {inputs[0].shape}"
        calls[name] = case.ours
    peers = {"aten": case.aten, "eager": case.formula}
    if case.formula is not None and compiles:
        torch._dynamo.reset()
        peers["compile"] = torch.compile(case.formula, fullgraph=True, dynamic=False)
    for name, call in peers.items():
        if call is None:
            continue
        try:
            error = error_of(call(*fresh(inputs)), expected)
        except Exception as fault:  # a peer that fails on this case is a finding, not an end
            left_out[name] = (str(fault).splitlines() or [type(fault).__name__])[0][:200]
            continue
        if error <= case.tolerance:
            calls[name] = call
        else:
            left_out[name] = f"gives something else: off by {error:.2g} of the norm"
    return calls, left_out


def rows(deadline: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    # The sizes that decide come first, so that a short run has them.
    for shape in sorted(SHAPES, key=lambda s: -torch.Size(s).numel()):
        for dtype_name, dtype in DTYPES.items():
            for case in CASES:
                row: dict[str, Any] = {"case": case.name, "shape": list(shape), "dtype": dtype_name}
                if time.monotonic() > deadline:
                    yield {**row, "left_out": {"all": "out of time"}}
                    continue
                torch.manual_seed(0)
                numel = torch.Size(shape).numel()
                moved = case.moved(dtype.itemsize) * numel
                sets = input_sets(partial(case.make, shape, dtype), moved)
                calls, left_out = contestants(case, sets[0], (shape, dtype_name) in COMPILED)
                row["left_out"] = left_out
                row["seconds"] = compare(calls, sets, forced)
                for name in set(calls) & set(OURS):
                    assert row["seconds"][name]["by"] == "graph", f"{case.name}: {name} cannot be captured"
                row["bytes"] = moved
                row["share_of_copy"] = {
                    name: moved / times["median"] / bandwidth for name, times in row["seconds"].items()
                }
                if shape == HOST_SHAPE:
                    on_host = {"qkernels": case.ours, **{name: c for name, c in calls.items() if name not in OURS}}
                    row["host_seconds"] = host_seconds(on_host, sets[0])
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="rows not begun by then are left out and say so")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {"machine": machine(bandwidth), "rows": []}
    path = options.out / f"{result['machine']['date']}-fake_quantize.json"
    for row in rows(deadline, bandwidth):
        result["rows"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")  # what is done stays, whatever happens next
    done = [row for row in result["rows"] if "seconds" in row]
    print(f"{len(done)} of {len(result['rows'])} rows timed; copy bandwidth {bandwidth / 1e12:.2f} TB/s")


if __name__ == "__main__":
    main()
