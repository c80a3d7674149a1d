"""int8 and int4 GEMM throughput on this GPU against its peers: `python -m qkernels bench gemm --gpu`.

Two steps of run.py. Every contestant is checked before it is timed: ours in int8 bit for bit against float64 sums and
the fixed order of float operations, in int4 against the reference, peers against what they claim to compute. Operands
rotate through several times the L2 cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import compare, copy_bandwidth, error_of, input_sets
from torch import Tensor

import qkernels as qk
from bench import OURS, forced, machine
from qkernels.ops.int8_gemm import PackedInt8

sys.path.append(str(Path(__file__).parent.parent))
from peers import dequantized, in_blocks, int4_weight, torchao_linear
from shapes import INT4, Case, arguments, cases_of, flat, shapes_of

ROWS = [1, 16, 1024, 8192, 64, 256, 4096]  # what decides comes first
BF16_TOLERANCE = 0.02  # of int8 rounding, against the product of the floats
FP8_TOLERANCE = 0.05
INT4_TOLERANCE = 1e-3  # ours against the reference: the same sums, now and then rounded to the other bf16
CHECKED_ROWS = 32  # of int4, the first and the last: the reference is slow
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


@dataclass(frozen=True)
class Int4Operands:
    """One product with int4 weights: bf16 activations and everyone's form of the same weight, or why there is none."""

    x: Tensor
    w_bf16: Tensor
    packed: qk.PackedInt4
    packed_int8: PackedInt8
    tinygemm: tuple[Tensor, int, Tensor] | str
    torchao: Callable[[], Tensor] | str


def tinygemm_weight(q: Tensor, scale: Tensor) -> tuple[Tensor, int, Tensor]:
    size, scale = in_blocks(q, scale, (32, 64, 128, 256))
    codes = (q + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    # A weight is (code − 8)·scale + zero.
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), 2).transpose(0, 1).bfloat16().contiguous()
    return packed, size, scale_and_zero


def torchao_call(x: Tensor, w_bf16: Tensor, group_size: int) -> Callable[[], Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig

    config = Int4WeightOnlyConfig(
        group_size=group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    return torchao_linear(x, w_bf16, config)


def reason_of(fault: Exception) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0][:200]


def tried(build: Callable[..., Any], *args: Any) -> Any:
    """What it builds, or why it cannot: libraries refuse sizes, GPUs and versions in ways of their own."""
    try:
        return build(*args)
    except Exception as fault:
        return reason_of(fault)


def int4_operands(m: int, n: int, k: int, group_size: int) -> Int4Operands:
    q, scale = int4_weight(n, k, group_size, "cuda")
    x = torch.randn(m, k, device="cuda").bfloat16()
    w = dequantized(q, scale)
    w_bf16 = w.bfloat16()
    tinygemm = tried(tinygemm_weight, q, scale)
    torchao = tried(torchao_call, x, w_bf16, k // scale.shape[1])
    packed = qk.PackedInt4.from_quantized(q, scale)
    return Int4Operands(x, w_bf16, packed, PackedInt8.from_float(w), tinygemm, torchao)


def int4_linear(o: Int4Operands, act_bits: int) -> Tensor:
    return qk.int4_linear(o.x, o.packed, act_bits=act_bits)


def int8_beside(o: Int4Operands) -> Tensor:
    return qk.int8_linear(o.x, o.packed_int8)


def tinygemm(o: Int4Operands) -> Tensor:
    if isinstance(o.tinygemm, str):
        raise RuntimeError(o.tinygemm)
    packed, size, scale_and_zero = o.tinygemm
    return torch._weight_int4pack_mm(o.x, packed, size, scale_and_zero)


def torchao(o: Int4Operands) -> Tensor:
    if isinstance(o.torchao, str):
        raise RuntimeError(o.torchao)
    return o.torchao()


class Scheme(NamedTuple):
    """One of ours with the peers that it is held against."""

    op: str
    ours: Callable[[Any], Tensor]
    peers: dict[str, Callable[[Any], Tensor]]


INT4_PEERS: dict[str, Callable[[Any], Tensor]] = {
    "bf16 linear": bf16_linear,
    "_weight_int4pack_mm": tinygemm,
    "torchao": torchao,
    "int8_linear": int8_beside,
}
# torch._int_mm gives less than int8_scaled_mm: the sums alone.
SCHEMES = {
    "raw": Scheme("int8_mm", int8_mm, {"_int_mm": raw}),
    "scaled": Scheme(
        "int8_scaled_mm",
        int8_scaled_mm,
        {
            "_int_mm": raw,
            "_int_mm + compiled rescale": raw_and_rescale,
            "bf16 linear": bf16_linear,
            "fp8 _scaled_mm": fp8_scaled_mm,
        },
    ),
    "dynamic": Scheme("int8_linear", int8_linear, {"bf16 linear": bf16_linear}),
    "w4a8": Scheme("int4_linear", partial(int4_linear, act_bits=8), INT4_PEERS),
    "w4a16": Scheme("int4_linear", partial(int4_linear, act_bits=16), INT4_PEERS),
}


def moved(case: Case) -> int:
    """Bytes: each operand read once, the output written once; bf16 in and out, but int8 codes and int32 sums."""
    m, n, k = case.shape
    weight = n * k // 2 + 4 * n * case.groups if case.scheme in INT4 else n * k
    return weight + (1 if case.scheme in ("raw", "scaled") else 2) * m * k + (4 if case.scheme == "raw" else 2) * m * n


class Expected(NamedTuple):
    """What ours gives, within an error of its norm, and what each peer gives; of the rows that ``rows`` takes."""

    ours: Tensor
    tolerance: float
    peers: dict[str, Tensor]
    rows: Callable[[Tensor], Tensor]


def expected_int8(case: Case, o: Operands) -> Expected:
    acc = o.a.double() @ o.w.double().t()
    rescaled = rescale(acc, o.scale_a, o.scale_w)
    product = (acc * o.scale_w * o.scale_a).float()
    peers = {
        "_int_mm": acc.int(),
        "_int_mm + compiled rescale": rescaled,
        "bf16 linear": product,
        "fp8 _scaled_mm": product,
    }
    ours = {"raw": peers["_int_mm"], "scaled": rescaled, "dynamic": product}[case.scheme]
    return Expected(ours, BF16_TOLERANCE if case.scheme == "dynamic" else 0.0, peers, lambda y: y)


def ends(t: Tensor) -> Tensor:
    return torch.cat((t[:CHECKED_ROWS], t[-CHECKED_ROWS:]))


def expected_int4(case: Case, o: Int4Operands) -> Expected:
    x = ends(o.x)
    with qk.use_kernel("reference"):
        ours = qk.int4_linear(x, o.packed, act_bits=8 if case.scheme == "w4a8" else 16)
    product = x.double() @ o.packed.dequantize().double().t()
    return Expected(ours, INT4_TOLERANCE, dict.fromkeys(INT4_PEERS, product), ends)


def contestants(case: Case, o: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The calls that compute what they should, and why the others were left out."""
    op, ours, peers = SCHEMES[case.scheme]
    expected = expected_int4(case, o) if case.scheme in INT4 else expected_int8(case, o)
    reasons = dict(qk.which(op))
    calls: dict[str, Any] = {}
    left_out = {}
    for name in filter(reasons.__contains__, OURS):
        if reason := reasons[name]:
            left_out[name] = reason
            continue
        with forced(name):
            error = error_of(expected.rows(ours(o)), expected.ours)
        assert error <= expected.tolerance, f"{case}: {name} is off by {error:.2g} of the norm"
        calls[name] = ours
    if not calls:
        left_out.setdefault("triton", f"{op} has no kernel for a GPU")
    for name, peer in peers.items():
        try:
            error = error_of(expected.rows(peer(o)), expected.peers[name])
        except Exception as fault:  # torch._int_mm refuses 16 rows and fewer, libraries what they will
            left_out[name] = reason_of(fault)
            continue
        if error < (FP8_TOLERANCE if peer is fp8_scaled_mm else BF16_TOLERANCE):
            calls[name] = peer
        else:
            left_out[name] = f"gives something else: off by {error:.2g} of the norm"
    return calls, left_out


def inputs_of(case: Case) -> tuple[Any]:
    if case.group_size is None:
        return (operands(*case.shape),)
    return (int4_operands(*case.shape, case.group_size),)


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the clocks and the power now; nothing where it is not installed."""
    names = ["clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"]
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return dict(zip(names, map(str.strip, said.split(",")), strict=False))


def rows(cases: list[Case], deadline: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    gpu = torch.cuda.get_device_properties(None).name
    datasheet = next((figures for name, figures in DATASHEET.items() if name in gpu), None)
    for case in cases:
        op, shape = SCHEMES[case.scheme].op, case.shape
        row: dict[str, Any] = {"case": op, "shape": list(shape), "dtype": "int8"}
        if case.group_size is not None:
            weight = "int4-row" if case.group_size == -1 else f"int4-g{case.group_size}"
            row |= {"case": f"{op} {case.scheme}", "dtype": weight, "group_size": case.group_size}
        if time.monotonic() > deadline:
            yield {**row, "left_out": {"all": "out of time"}}
            continue
        torch.manual_seed(0)
        size, operations = moved(case), 2 * shape.m * shape.n * shape.k
        sets = input_sets(partial(inputs_of, case), size)
        calls, row["left_out"] = contestants(case, sets[0][0])
        row["seconds"] = compare(calls, sets, forced)
        for name in set(calls) & set(OURS):
            assert row["seconds"][name]["by"] == "graph", f"{case}: {name} cannot be captured"
        row["bytes"], row["operations"], row["clocks"] = size, operations, clocks()
        row["share_of_copy"] = {name: size / times["median"] / bandwidth for name, times in row["seconds"].items()}
        best = ours_in(row)
        if datasheet and best and case.scheme != "w4a16":
            least = max(operations / datasheet[0], size / datasheet[1])
            row["share_of_datasheet"] = least / row["seconds"][best]["median"]
        yield row


def ours_in(row: dict[str, Any]) -> str | None:
    """The kernel of ours that others are compared with: the one that a call takes by itself."""
    return next((name for name in OURS if name in row.get("seconds", {})), None)


def lines_of(row: dict[str, Any]) -> Iterator[str]:
    """A line for each contestant: HEADER's columns; bytes are those of our product, whoever computes it."""
    where = f"{row['case']:<18}{row['dtype']:<10}{'×'.join(map(str, row['shape'])):<18}"
    for name, reason in row["left_out"].items():
        yield f"{where}{name:<28}left out: {reason}"
    seconds = row.get("seconds", {})
    ours, bf16 = (seconds.get(name, {}).get("median", float("nan")) for name in (ours_in(row), "bf16 linear"))
    for name, times in seconds.items():
        low, middle, high = (1e6 * times[key] for key in ("p20", "median", "p80"))
        yield (
            f"{where}{name:<28}{middle:>10.5g}  {f'{low:.5g}–{high:.5g}':<18}"
            f"{row['operations'] / times['median'] / 1e12:>8.4g}{row['bytes'] / times['median'] / 1e9:>8.4g}"
            f"{row['share_of_copy'][name]:>7.0%}{times['median'] / ours:>8.2f}{bf16 / times['median']:>8.2f}"
        )


HEADER = (
    f"{'case':<18}{'weight':<10}{'M×N×K':<18}{'contestant':<28}{'µs':>10}  {'p20–p80':<18}{'TOPS':>8}{'GB/s':>8}"
    f"{'copy':>7}{'/ours':>8}{'bf16/':>8}"
)


def main() -> int:
    parser = arguments("python -m qkernels bench gemm --gpu", __doc__, list(SCHEMES), ROWS)
    parser.add_argument("--seconds", type=float, default=600.0, help="rows not begun by then are left out and say so")
    parser.add_argument("--out", type=Path, help="a folder for <date>-int8_gemm.json and <date>-int4_gemm.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench gemm --gpu: no GPU that torch can use", file=sys.stderr)
        return 2
    try:
        shapes = shapes_of(options.shapes, options.rows)
    except (OSError, ValueError) as error:
        print(f"bench gemm: {error}", file=sys.stderr)
        return 2
    cases, left_out = cases_of(flat(options.schemes), flat(options.group_sizes), shapes)
    if not cases:
        print("bench gemm: nothing to time:", *left_out, sep="\n", file=sys.stderr)
        return 2
    order = list(dict.fromkeys(shape.m for shape in shapes))
    cases.sort(key=lambda case: order.index(case.shape.m))
    deadline = time.monotonic() + options.seconds
    bandwidth = copy_bandwidth()
    here = machine(bandwidth)
    results: dict[str, list[dict[str, Any]]] = {}
    print(f"{here['gpu']}; copy bandwidth {bandwidth / 1e12:.2f} TB/s, of which copy is a share")
    for reason in left_out:
        print(f"left out: {reason}")
    print(HEADER)
    for number, (case, row) in enumerate(zip(cases, rows(cases, deadline, bandwidth), strict=True), 1):
        stem = "int4_gemm" if case.scheme in INT4 else "int8_gemm"
        results.setdefault(stem, []).append(row)
        print(f"{number} of {len(cases)}", *lines_of(row), sep="\n", flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"{here['date']}-{stem}.json"
            path.write_text(json.dumps({"machine": here, "rows": results[stem]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
