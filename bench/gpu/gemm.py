"""Times the int8 matrix products on this GPU; writes <OUT>/<date>-int8_gemm.json. A process of its own, by run.py.

Every contestant is checked before it is timed: ours bit for bit against float64 sums and the fixed order of float
operations, peers against what they claim to compute. Operands rotate through several times the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import compare, copy_bandwidth, error_of, input_sets
from torch import Tensor

import qkernels as qk
from bench import forced, machine
from qkernels.ops.int8_gemm import PackedInt8

LAYERS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # N, K of Llama-8B: qkv, o, gate and up, down
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
BF16_TOLERANCE = 0.02  # of int8 rounding, against the product of the floats


@dataclass(frozen=True)
class Operands:
    """One product: codes and scales, and the floats that they stand for."""

    a: Tensor
    w: Tensor
    scale_a: Tensor
    scale_w: Tensor
    x: Tensor
    w_bf16: Tensor
    packed: PackedInt8


def operands(m: int, n: int, k: int) -> Operands:
    a, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
    a[:, 0] = 127  # amax: quantizing x gives a back
    scale_a, scale_w = (torch.rand(rows, 1, device="cuda") * 0.01 + 0.001 for rows in (m, n))
    x, w_bf16 = ((codes * scale).bfloat16() for codes, scale in ((a, scale_a), (w, scale_w)))
    return Operands(a, w, scale_a, scale_w.flatten(), x, w_bf16, PackedInt8.from_quantized(w, scale_w))


def int8_mm(o: Operands) -> Tensor:
    return qk.int8_mm(o.a, o.w.t())


def int8_scaled_mm(o: Operands) -> Tensor:
    return qk.int8_scaled_mm(o.a, o.w.t(), o.scale_a, o.scale_w)


def int8_linear(o: Operands) -> Tensor:
    return qk.int8_linear(o.x, o.packed)


def rescale(acc: Tensor, scale_a: Tensor, scale_w: Tensor) -> Tensor:
    return (acc.float() * scale_w * scale_a).bfloat16()


compiled_rescale = torch.compile(rescale, dynamic=True)


def raw(o: Operands) -> Tensor:
    return torch._int_mm(o.a, o.w.t())


def raw_and_rescale(o: Operands) -> Tensor:
    return compiled_rescale(raw(o), o.scale_a, o.scale_w)


def bf16_linear(o: Operands) -> Tensor:
    return torch.nn.functional.linear(o.x, o.w_bf16)


# Each of ours with the peers that it is held against. torch._int_mm gives less than int8_scaled_mm: the sums alone.
CASES: list[tuple[Callable[[Operands], Tensor], dict[str, Callable[[Operands], Tensor]]]] = [
    (int8_mm, {"_int_mm": raw}),
    (int8_scaled_mm, {"_int_mm": raw, "_int_mm + compiled rescale": raw_and_rescale, "bf16 linear": bf16_linear}),
    (int8_linear, {"bf16 linear": bf16_linear}),
]
OUT_BYTES = {"int8_mm": 4, "int8_scaled_mm": 2, "int8_linear": 2}


def moved(op: str, m: int, n: int, k: int) -> int:
    """Bytes: each operand read once, the output written once."""
    return (2 if op == "int8_linear" else 1) * m * k + n * k + OUT_BYTES[op] * m * n


def contestants(
    ours: Callable[[Operands], Tensor], peers: dict[str, Callable[[Operands], Tensor]], o: Operands
) -> tuple[dict[str, Any], dict[str, str]]:
    """The calls that compute what they should, and why the others were left out."""
    acc = o.a.double() @ o.w.double().t()
    exact = {
        "int8_mm": acc.int(),
        "_int_mm": acc.int(),
        "int8_scaled_mm": rescale(acc, o.scale_a, o.scale_w),
        "_int_mm + compiled rescale": rescale(acc, o.scale_a, o.scale_w),
        "bf16 linear": (acc * o.scale_w * o.scale_a).float(),
    }
    del acc
    with qk.use_kernel("triton"):
        got = ours(o)
        if ours is int8_linear:
            assert error_of(got, exact["bf16 linear"]) < BF16_TOLERANCE
        else:
            assert torch.equal(got, exact[ours.__name__]), f"{ours.__name__} is wrong on {o.a.shape}, {o.w.shape}"
    calls: dict[str, Any] = {"triton": ours}
    left_out = {}
    for name, peer in peers.items():
        try:
            error = error_of(peer(o), exact[name])
        except RuntimeError as fault:  # torch._int_mm refuses 16 rows and fewer
            left_out[name] = (str(fault).splitlines() or [""])[0][:200]
            continue
        if error < BF16_TOLERANCE:
            calls[name] = peer
        else:
            left_out[name] = f"gives something else: off by {error:.2g} of the norm"
    return calls, left_out


def rows(deadline: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    for m in sorted(ROWS, key=lambda m: (m not in (1, 16, 1024, 8192), m)):  # what decides comes first
        for n, k in LAYERS:
            for ours, peers in CASES:
                op = ours.__name__
                row: dict[str, Any] = {"case": op, "shape": [m, n, k], "dtype": "int8"}
                if time.monotonic() > deadline:
                    yield {**row, "left_out": {"all": "out of time"}}
                    continue
                torch.manual_seed(0)
                size = moved(op, m, n, k)
                sets = input_sets(lambda m=m, n=n, k=k: (operands(m, n, k),), size)
                calls, row["left_out"] = contestants(ours, peers, sets[0][0])
                row["seconds"] = compare(calls, sets, forced)
                assert row["seconds"]["triton"]["by"] == "graph", f"{op} cannot be captured"
                row["bytes"], row["operations"] = size, 2 * m * n * k
                row["share_of_copy"] = {
                    name: size / times["median"] / bandwidth for name, times in row["seconds"].items()
                }
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="rows not begun by then are left out and say so")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {"machine": machine(bandwidth), "rows": []}
    path = options.out / f"{result['machine']['date']}-int8_gemm.json"
    for row in rows(deadline, bandwidth):
        result["rows"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")
    done = [row for row in result["rows"] if "seconds" in row]
    print(f"{len(done)} of {len(result['rows'])} products timed; copy bandwidth {bandwidth / 1e12:.2f} TB/s")


if __name__ == "__main__":
    main()
