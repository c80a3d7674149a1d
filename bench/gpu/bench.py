"""Times the cases of cases.py on this GPU, each kernel checked against the reference first. A step of run.py.

Writes <date>-fake_quantize.json; --compiled: <date>-fake_quantize-compiled.json, of what has to be compiled first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cases
import machine
import torch
from cases import DTYPES, Case
from ours import KERNELS, able, forced
from results import Results, Row, blame, reason_of
from timing import compare, copy_bandwidth, error_of, input_sets

import qkernels as qk

TOLERANCE = 5e-4  # against the reference, whose sums (dscale, RMSNorm's mean) are in another order: rare codes differ


def fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies: an observer's call moves its statistics, and the next contestant's must start where it did."""
    return tuple(
        t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs
    )


def contestants(case: Case, inputs: tuple[Any, ...], compiled: bool, row: Row) -> dict[str, Any]:
    """The calls that give what the reference gives; the row says which is ours, what is left out and what is wrong."""
    with qk.use_kernel("reference"):
        expected = case.ours(*fresh(inputs))
    names, row["left_out"] = able(case.op, case.ours, fresh(inputs), compiled)
    row["ours"] = names[0] if names else None
    calls = {}
    for name in names:
        try:
            with forced(name):
                error = error_of(case.ours(*fresh(inputs)), expected)
        except Exception as fault:  # the others are timed all the same
            blame(row, f"{name}: {type(fault).__name__}: {reason_of(fault)}")
            torch.cuda.synchronize()
            continue
        if error <= TOLERANCE:
            calls[name] = case.ours
        else:
            blame(row, f"{name} is off by {error:.2g} of the norm")
    peers = {"aten": case.aten, "eager": case.formula}
    if compiled:
        torch._dynamo.reset()
        peers = {"compile": torch.compile(case.formula, fullgraph=True, dynamic=False)} if case.formula else {}
    for name, call in peers.items():
        if call is None:
            continue
        try:
            error = error_of(call(*fresh(inputs)), expected)
        except Exception as fault:  # a peer that fails on this case is a finding, not a fault
            row["left_out"][name] = reason_of(fault)
            continue
        if error <= case.tolerance:
            calls[name] = call
        else:
            row["left_out"][name] = f"gives something else: off by {error:.2g} of the norm"
    return calls


def time_row(case: Case, shape: tuple[int, ...], dtype_name: str, compiled: bool, bandwidth: float, row: Row) -> None:
    dtype = DTYPES[dtype_name]
    moved = case.moved(dtype.itemsize) * torch.Size(shape).numel()
    sets = input_sets(partial(case.make, shape, dtype), moved)
    calls = contestants(case, sets[0], compiled, row)
    row["seconds"] = compare(calls, sets, forced, ["aten"] if case.aten_waits else [])
    for name in calls:
        if name in KERNELS and row["seconds"][name]["by"] != "graph":
            blame(row, f"{name} cannot be captured: {row['seconds'][name]['capture']}")
    row["bytes"] = moved
    row["share_of_copy"] = {name: moved / times["median"] / bandwidth for name, times in row["seconds"].items()}


def planned(compiled: bool) -> Iterator[tuple[Row, Case]]:
    for shape, dtype_name in cases.DECISIVE if compiled else cases.DECISIVE + cases.OTHERS:
        for case in cases.CASES:
            yield {"case": case.name, "shape": list(shape), "dtype": dtype_name}, case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="rows not begun by then are left out")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that --out does not have yet")
    parser.add_argument("--compiled", action="store_true", help="ours against torch.compile, and Triton beside CUDA")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    bandwidth = copy_bandwidth()
    here = machine.about() | {"copy_bytes_per_second": bandwidth, "qkernels": qk.__version__}
    name = "fake_quantize-compiled" if options.compiled else "fake_quantize"
    results = Results(options.out / f"{here['date']}-{name}.json", here, end, options.resume)
    for row, case in planned(options.compiled):
        shape, dtype_name = tuple(row["shape"]), row["dtype"]
        results.measure(row, partial(time_row, case, shape, dtype_name, options.compiled, bandwidth))
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(main())
