"""int8 GEMM throughput on this GPU against its peers: `python -m qkernels bench gemm --gpu`, and a step of run.py.

Every contestant is checked before it is timed: ours bit for bit against float64 sums and the fixed order of float
operations, peers against what they claim to compute. Operands rotate through several times the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
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

sys.path.append(str(Path(__file__).parent.parent))
from shapes import Shape, positive, shapes_of

ROWS = [1, 16, 1024, 8192, 64, 256, 4096]  # what decides comes first
BF16_TOLERANCE = 0.02  # of int8 rounding, against the product of the floats
FP8_TOLERANCE = 0.05
# int8 operations and bytes per second, by the makers' datasheets, without sparsity.
DATASHEET = {
    "H200": (1979e12, 4.8e12),
    "H100 80GB HBM3": (1979e12, 3.35e12),
    "A100": (624e12, 2.0e12),
    "RTX 4090": (660e12, 1.008e12),
    "RTX 5090": (838e12, 1.792e12),
}


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
    fp8: tuple[Tensor, Tensor]  # the codes in e4m3


def operands(m: int, n: int, k: int) -> Operands:
    a, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
    a[:, 0] = 127  # amax: quantizing x gives a back
    scale_a, scale_w = (torch.rand(rows, 1, device="cuda") * 0.01 + 0.001 for rows in (m, n))
    x, w_bf16 = ((codes * scale).bfloat16() for codes, scale in ((a, scale_a), (w, scale_w)))
    fp8 = (a.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn))
    return Operands(a, w, scale_a, scale_w.flatten(), x, w_bf16, PackedInt8.from_quantized(w, scale_w), fp8)


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


def fp8_scaled_mm(o: Operands) -> Tensor:
    a, w = o.fp8
    return torch._scaled_mm(a, w.t(), scale_a=o.scale_a, scale_b=o.scale_w[None], out_dtype=torch.bfloat16)


# Each of ours with the peers that it is held against. torch._int_mm gives less than int8_scaled_mm: the sums alone.
CASES: list[tuple[Callable[[Operands], Tensor], dict[str, Callable[[Operands], Tensor]]]] = [
    (int8_mm, {"_int_mm": raw}),
    (
        int8_scaled_mm,
        {
            "_int_mm": raw,
            "_int_mm + compiled rescale": raw_and_rescale,
            "bf16 linear": bf16_linear,
            "fp8 _scaled_mm": fp8_scaled_mm,
        },
    ),
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
    exact["fp8 _scaled_mm"] = exact["bf16 linear"]
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
        if error < (FP8_TOLERANCE if peer is fp8_scaled_mm else BF16_TOLERANCE):
            calls[name] = peer
        else:
            left_out[name] = f"gives something else: off by {error:.2g} of the norm"
    return calls, left_out


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the clocks and the power now; nothing where it is not installed."""
    names = ["clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"]
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return dict(zip(names, map(str.strip, said.split(",")), strict=False))


def rows(shapes: list[Shape], deadline: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    gpu = torch.cuda.get_device_properties(None).name
    datasheet = next((figures for name, figures in DATASHEET.items() if name in gpu), None)
    for m, n, k in shapes:
        for ours, peers in CASES:
            op = ours.__name__
            row: dict[str, Any] = {"case": op, "shape": [m, n, k], "dtype": "int8"}
            if time.monotonic() > deadline:
                yield {**row, "left_out": {"all": "out of time"}}
                continue
            torch.manual_seed(0)
            size, operations = moved(op, m, n, k), 2 * m * n * k
            sets = input_sets(lambda m=m, n=n, k=k: (operands(m, n, k),), size)
            calls, row["left_out"] = contestants(ours, peers, sets[0][0])
            row["seconds"] = compare(calls, sets, forced)
            assert row["seconds"]["triton"]["by"] == "graph", f"{op} cannot be captured"
            row["bytes"], row["operations"], row["clocks"] = size, operations, clocks()
            row["share_of_copy"] = {name: size / times["median"] / bandwidth for name, times in row["seconds"].items()}
            if datasheet:
                least = max(operations / datasheet[0], size / datasheet[1])
                row["share_of_datasheet"] = least / row["seconds"]["triton"]["median"]
            yield row


def lines_of(row: dict[str, Any]) -> Iterator[str]:
    """A line for each contestant: microseconds with p20 and p80, TOPS, GB/s, time relative to ours."""
    size = "×".join(map(str, row["shape"]))
    for name, reason in row["left_out"].items():
        yield f"{row['case']:<16}{size:<20}{name:<28}left out: {reason}"
    ours = row.get("seconds", {}).get("triton", {}).get("median")
    for name, times in row.get("seconds", {}).items():
        low, middle, high = (1e6 * times[key] for key in ("p20", "median", "p80"))
        yield (
            f"{row['case']:<16}{size:<20}{name:<28}{middle:>10.5g}  {f'{low:.5g}–{high:.5g}':<18}"
            f"{row['operations'] / times['median'] / 1e12:>8.4g}{row['bytes'] / times['median'] / 1e9:>8.4g}"
            f"{times['median'] / ours:>7.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qkernels bench gemm --gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", default="llama", help="llama (Llama-8B's layers), square, or a CSV of M,N,K")
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="M of llama")
    parser.add_argument("--seconds", type=float, default=600.0, help="rows not begun by then are left out and say so")
    parser.add_argument("--out", type=Path, help="a folder for <date>-int8_gemm.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench gemm --gpu: no GPU that torch can use", file=sys.stderr)
        return 2
    try:
        shapes = shapes_of(options.shapes, options.rows)
    except (OSError, ValueError) as error:
        print(f"bench gemm: {error}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {"machine": machine(bandwidth), "rows": []}
    print(
        f"{result['machine']['gpu']}; copy bandwidth {bandwidth / 1e12:.2f} TB/s; µs, p20–p80, TOPS, GB/s, time / ours"
    )
    for number, row in enumerate(rows(shapes, deadline, bandwidth), 1):
        result["rows"].append(row)
        print(f"{number} of {len(shapes) * len(CASES)}", *lines_of(row), sep="\n", flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"{result['machine']['date']}-int8_gemm.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
