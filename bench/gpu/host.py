"""What a call costs the host on this GPU, on tensors so small that nothing waits for the GPU. A step of run.py.

Writes <date>-host.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from cases import CASES, DTYPES, Case
from results import Results, Row, tried
from timing import host_seconds

import qkernels as qk

SHAPE = (64, 64)
M, N, K = 16, 128, 128
Calls = dict[str, Callable[..., Any]]


def of_case(case: Case, dtype: torch.dtype) -> tuple[Calls, tuple[Any, ...]]:
    return {"qkernels": case.ours, **({"aten": case.aten} if case.aten else {})}, case.make(SHAPE, dtype)


def of_linear(packed: Any, ours: Callable[..., Any], dtype: torch.dtype) -> tuple[Calls, tuple[Any, ...]]:
    weight = torch.randn(N, K, device="cuda")
    calls = {"qkernels": ours, "F.linear": lambda x, _, w: torch.nn.functional.linear(x, w)}
    return calls, (torch.randn(M, K, device="cuda").to(dtype), packed(weight), weight.to(dtype))


LINEAR = {
    "int8_linear": (qk.PackedInt8.from_float, lambda x, packed, _: qk.int8_linear(x, packed)),
    "int4_linear w4a8": (qk.PackedInt4.from_float, lambda x, packed, _: qk.int4_linear(x, packed, act_bits=8)),
    "int4_linear w4a16": (qk.PackedInt4.from_float, lambda x, packed, _: qk.int4_linear(x, packed, act_bits=16)),
}
FIRST = ("forward, per tensor", "forward+backward, per tensor", "LSQ forward+backward, per tensor")


def time_row(make: Callable[[torch.dtype], tuple[Calls, tuple[Any, ...]]], dtype: torch.dtype, row: Row) -> None:
    calls, inputs = make(dtype)
    calls["qkernels"](*inputs)  # what fails of ours is the row's fault
    failed = {name: said for name, call in calls.items() if isinstance(said := tried(call, *inputs), str)}
    row["left_out"] = failed
    row["host_seconds"] = host_seconds({name: call for name, call in calls.items() if name not in failed}, inputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="rows not begun by then are left out")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that --out does not have yet")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    here = machine.about() | {"qkernels": qk.__version__}
    results = Results(options.out / f"{here['date']}-host.json", here, end, options.resume)
    by_name = {case.name: case for case in CASES}
    first = [by_name[name] for name in FIRST]
    shaped = [(case.name, SHAPE, partial(of_case, case)) for case in first]
    shaped += [(name, (M, N, K), partial(of_linear, *how)) for name, how in LINEAR.items()]
    shaped += [(case.name, SHAPE, partial(of_case, case)) for case in CASES if case not in first]
    for name, shape, make in shaped:
        results.measure({"case": name, "shape": list(shape), "dtype": "bf16"}, partial(time_row, make, DTYPES["bf16"]))
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(main())
