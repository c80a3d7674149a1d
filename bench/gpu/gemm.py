"""int8 and int4 GEMM throughput on this GPU against its peers: `python -m qkernels bench gemm --gpu`.

Also steps of run.py. Every contestant is checked before it is timed: ours in int8 bit for bit against float64 sums and
the fixed order of float operations, in int4 against the reference, peers against what they claim to compute. Operands
rotate through several times the L2 cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from ours import KERNELS, able, forced
from results import Results, Row, blame, reason_of, tried
from timing import compare, copy_bandwidth, error_of, input_sets
from torch import Tensor

import qkernels as qk
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
            "bf16 linear": bf16_linear,
            "fp8 _scaled_mm": fp8_scaled_mm,
        },
    ),
    "dynamic": Scheme("int8_linear", int8_linear, {"bf16 linear": bf16_linear}),
    "w4a8": Scheme("int4_linear", partial(int4_linear, act_bits=8), INT4_PEERS),
    "w4a16": Scheme("int4_linear", partial(int4_linear, act_bits=16), INT4_PEERS),
}


COMPILED = {"scaled": {"_int_mm + compiled rescale": raw_and_rescale}}


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


def contestants(case: Case, o: Any, compiled: bool, row: Row) -> dict[str, Any]:
    """The calls that compute what they should; the row says which is ours, what is left out and what is wrong."""
    op, ours, peers = SCHEMES[case.scheme]
    expected = expected_int4(case, o) if case.scheme in INT4 else expected_int8(case, o)
    names, row["left_out"] = able(op, ours, (o,), compiled)
    row["ours"] = names[0] if names else None
    calls: dict[str, Any] = {}
    for name in names:
        try:
            with forced(name):
                error = error_of(expected.rows(ours(o)), expected.ours)
        except Exception as fault:  # the others are timed all the same
            blame(row, f"{name}: {type(fault).__name__}: {reason_of(fault)}")
            torch.cuda.synchronize()
            continue
        if error <= expected.tolerance:
            calls[name] = ours
        else:
            blame(row, f"{name} is off by {error:.2g} of the norm")
    for name, peer in (COMPILED[case.scheme] if compiled else peers).items():
        try:
            error = error_of(expected.rows(peer(o)), expected.peers[name])
        except Exception as fault:  # torch._int_mm refuses 16 rows and fewer, libraries what they will
            row["left_out"][name] = reason_of(fault)
            continue
        if error < (FP8_TOLERANCE if peer is fp8_scaled_mm else BF16_TOLERANCE):
            calls[name] = peer
        else:
            row["left_out"][name] = f"gives something else: off by {error:.2g} of the norm"
    return calls


def inputs_of(case: Case) -> tuple[Any]:
    if case.group_size is None:
        return (operands(*case.shape),)
    return (int4_operands(*case.shape, case.group_size),)


def label(case: Case) -> Row:
    op = SCHEMES[case.scheme].op
    row: Row = {"case": op, "shape": list(case.shape), "dtype": "int8"}
    if case.group_size is not None:
        weight = "int4-row" if case.group_size == -1 else f"int4-g{case.group_size}"
        row |= {"case": f"{op} {case.scheme}", "dtype": weight, "group_size": case.group_size}
    return row


def time_row(case: Case, compiled: bool, bandwidth: float, row: Row) -> None:
    shape = case.shape
    size, operations = moved(case), 2 * shape.m * shape.n * shape.k
    sets = input_sets(partial(inputs_of, case), size)
    calls = contestants(case, sets[0][0], compiled, row)
    row["seconds"] = compare(calls, sets, forced)
    for name in calls:
        if name in KERNELS and row["seconds"][name]["by"] != "graph":
            blame(row, f"{name} cannot be captured: {row['seconds'][name]['capture']}")
    row["bytes"], row["operations"] = size, operations
    row["share_of_copy"] = {name: size / times["median"] / bandwidth for name, times in row["seconds"].items()}
    gpu = torch.cuda.get_device_properties(None).name
    datasheet = next((figures for name, figures in DATASHEET.items() if name in gpu), None)
    if datasheet and row["ours"] in row["seconds"] and case.scheme != "w4a16":
        least = max(operations / datasheet[0], size / datasheet[1])
        row["share_of_datasheet"] = least / row["seconds"][row["ours"]]["median"]


def lines_of(row: Row) -> Iterator[str]:
    """A line for each contestant: HEADER's columns; bytes are those of our product, whoever computes it."""
    where = f"{row['case']:<18}{row['dtype']:<10}{'×'.join(map(str, row['shape'])):<18}"
    for name, reason in row.get("left_out", {}).items():
        yield f"{where}{name:<28}left out: {reason}"
    seconds = row.get("seconds", {})
    ours, bf16 = (seconds.get(name, {}).get("median", float("nan")) for name in (row.get("ours"), "bf16 linear"))
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


def ordered(cases: list[Case]) -> list[Case]:
    """By group size, then by rows, both as they were given: a short run has what comes first there."""
    groups, rows = (list(dict.fromkeys(part)) for part in zip(*((c.group_size, c.shape.m) for c in cases), strict=True))
    return sorted(cases, key=lambda case: (groups.index(case.group_size), rows.index(case.shape.m)))


def main() -> int:
    parser = arguments("python -m qkernels bench gemm --gpu", __doc__, list(SCHEMES), ROWS)
    parser.add_argument("--seconds", type=float, default=600.0, help="rows not begun by then are left out")
    parser.add_argument("--out", type=Path, help="a folder for <date>-int8_gemm.json and <date>-int4_gemm.json")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that --out does not have yet")
    parser.add_argument("--compiled", action="store_true", help="scaled against what torch.compile makes")
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
    cases = [case for case in cases if not options.compiled or case.scheme in COMPILED]
    if not cases:
        print("bench gemm: nothing to time:", *left_out, sep="\n", file=sys.stderr)
        return 2
    end = time.monotonic() + options.seconds
    bandwidth = copy_bandwidth()
    here = machine.about() | {"copy_bytes_per_second": bandwidth, "qkernels": qk.__version__}
    print(f"{here['gpu']}; copy bandwidth {bandwidth / 1e12:.2f} TB/s, of which copy is a share")
    for reason in left_out:
        print(f"left out: {reason}")
    print(HEADER)
    code = 0
    for stem, part in (
        ("int8_gemm", [case for case in cases if case.scheme not in INT4]),
        ("int4_gemm", [case for case in cases if case.scheme in INT4]),
    ):
        if not part:
            continue
        name = f"{here['date']}-{stem}{'-compiled' * options.compiled}.json"
        path = options.out / name if options.out else None
        results = Results(path, here, end, options.resume)
        for case in ordered(part):
            row = results.measure(label(case), partial(time_row, case, options.compiled, bandwidth))
            if row is not None:
                print(*lines_of(row), sep="\n", flush=True)
        code |= results.finish()
    return code


if __name__ == "__main__":
    sys.exit(main())
