"""The Triton int4 linear layer against the reference and the exact product, on the GPU or interpreted; its tiles."""

from __future__ import annotations

import itertools
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import same
from conftest import kernels_of
from torch import Tensor

import qkernels as qk
from qkernels import layouts
from qkernels.ops.int4_gemm import PackedInt, PackedInt4, int4_linear
from qkernels.reference import int4_gemm as reference

if "triton" not in kernels_of("int4_linear"):
    pytest.skip(str(dict(qk.which("int4_linear"))["triton"]), allow_module_level=True)

import triton
import triton.language as tl

from qkernels.triton import int4_gemm
from qkernels.triton.common import gemm, gemm_configs
from qkernels.triton.common.configs import ceil_div

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("symmetric", "zero points", "minimum")
# Group size and K: whole steps and not, one group of even and odd K, and sizes that only go code by code.
GROUPS = [
    (16, 48), (24, 72), (32, 96), (32, 256), (40, 120), (64, 320), (96, 192), (128, 384), (256, 512), (384, 768),
    (1, 1), (37, 37), (300, 300),
]  # fmt: skip
K_LOOPS = ["codes", "codes", "halves", "halves", "codes", "halves", "codes", "piece", "piece", "span", *["end"] * 3]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with qk.use_kernel("triton"):
        yield


def there(t: Any) -> Any:
    return t.to(DEVICE) if isinstance(t, Tensor) else t


def weight(
    n: int, k: int, group_size: int, kind: str = "symmetric", dtype: torch.dtype = torch.float32
) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """A weight as a GPU holds it (data, scale, zero_point, minimum, weight_sum), in fp64, and 15·|scale| + |offset|."""
    groups = layouts.groups_of(k, group_size)
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = (torch.rand(n, groups) * 0.02 + 0.001).to(dtype)
    zero_point = torch.randint(-8, 8, (n, groups), dtype=torch.int8) if kind == "zero points" else None
    minimum = (torch.randn(n, groups) * 0.05).to(dtype) if kind == "minimum" else None
    offset = reference.offset_of(scale, zero_point, minimum)
    w = reference.weight_of(q, scale, offset, group_size)
    most = 15 * scale.double().abs() + (0 if offset is None else offset.double().abs())
    params = (None if t is None else t.t().contiguous() for t in (scale, zero_point, minimum))
    data = layouts.int4_to_halves(q, group_size)
    return (data, *params, w.sum(1).float()), w, most.repeat_interleave(max(1, k // groups), 1)[:, :k]


def run(*args: Any) -> Tensor:
    return torch.ops.qkernels.int4_linear(*map(there, args)).cpu()


def check_same(args: tuple[Any, ...]) -> None:
    same(run(*args), reference.int4_linear(*args))


def within(args: tuple[Any, ...], w: Tensor, most: Tensor, unit: float) -> None:
    """Within unit·Σ|x|·(15·|scale| + |offset|) of the exact product, and the rounding of the output."""
    x, bias, out_dtype = args[0].double(), args[6], args[-1]
    exact = x @ w.t() + (0 if bias is None else bias.double())
    allowed = unit * (x.abs() @ most.t()) + exact.abs() * torch.finfo(out_dtype).eps
    got = run(*args)
    assert got.dtype == out_dtype
    assert ((got.double() - exact).abs() <= allowed).all(), ((got.double() - exact).abs() / allowed).max()


def inputs(m: int, k: int, turn: int) -> tuple[Any, ...]:
    """x, input_scale, input_zero_point, quant_min, quant_max: by the range of rows, by one scale, or codes."""
    x = torch.randn(m, k).to(FLOATS[turn % 3])
    given = [
        (x, None, None, -128, 127),
        (x, torch.tensor([0.03]), torch.tensor([5], dtype=torch.int32), -128, 127),
        (torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.rand(m, 1), torch.randint(-99, 99, (m,)), -128, 127),
        (x, None, None, 0, 127),
        (torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.rand(1).double(), None, -128, 127),
        (x, torch.tensor(0.02), None, -8, 7),
    ]
    return given[turn % len(given)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group_size", "k"), GROUPS)
def test_on_int8_activations_equals_the_reference_bit_for_bit(group_size: int, k: int, kind: str) -> None:
    turn = GROUPS.index((group_size, k)) + 2 * KINDS.index(kind)
    for m, n in ((1, 35), (19, 7))[turn % 2 :] if k > 100 else ((1, 35), (19, 7)):
        x, *given = inputs(m, k, turn)
        bias = (None, torch.randn(n), torch.randn(n).half())[turn % 3]
        of, _, _ = weight(n, k, group_size, kind, FLOATS[turn % 3])
        check_same((x, *of, bias, group_size, 8, *given, FLOATS[(turn + m) % 3]))
        turn += 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group_size", "k"), GROUPS)
def test_on_floating_activations_is_within_the_bound(group_size: int, k: int, kind: str) -> None:
    turn = GROUPS.index((group_size, k)) + KINDS.index(kind)
    m, n = ((3, 35), (18, 7))[turn % 2]
    of, w, most = weight(n, k, group_size, kind, FLOATS[turn % 3])
    bias = (None, torch.randn(n), torch.randn(n).half())[turn % 3]
    for dtype in FLOATS if k < 100 else FLOATS[turn % 3 : turn % 3 + 1]:
        x = torch.randn(m, k).to(dtype)
        within((x, *of, bias, group_size, 16, None, None, -128, 127, torch.float32), w, most, (k + 4) * 2.0**-23)
    within((x, *of, bias, group_size, 16, None, None, -128, 127, x.dtype), w, most, (k + 4) * 2.0**-23)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("group_size", "k"), [(24, 120), (32, 160), (128, 640), (384, 1152), (700, 700)])
def test_parts_of_k_and_tiles(
    group_size: int, k: int, splits: int, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of one group are added in integers: the same bits. Those of more groups are rounded in another order."""
    tile = gemm_configs.Int4Tile(16, 32, 128, 4, 2, swap=swap)
    monkeypatch.setattr(gemm_configs, "int4_linear", lambda *args: (tile, splits))
    m, n, kind = 17, 33, KINDS[(group_size // 8 + splits + swap) % 3]
    of, w, most = weight(n, k, group_size, kind)
    x, bias = torch.randn(m, k), torch.randn(n)
    rest = bias, group_size, 8, None, None, -128, 127, torch.float32
    if splits == 1 or group_size == k:
        check_same((x, *of, *rest))
    else:
        codes, scale, _ = reference.quantize_input(x, None, None, -128, 127)
        of_codes = (codes, *of, None, group_size, 8, scale, None, -128, 127, torch.float32)
        got, want = run(*of_codes), reference.int4_linear(*of_codes)
        allowed = (k // group_size + 4) * 2.0**-23 * (codes.double().abs() @ most.t()) * scale.double()
        assert ((got - want).abs() <= allowed).all()
        assert torch.equal(got, run(*of_codes))
    x = x.to(FLOATS[group_size // 8 % 3])
    within((x, *of, bias, group_size, 16, *rest[3:]), w, most, (k + 4) * 2.0**-23)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 2.0**-19), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)]
)
def test_many_rows_go_by_a_dequantized_weight(
    dtype: torch.dtype, unit: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_configs, "INT4_DEQUANTIZED", 5)
    called = []
    for group_size, k in ((24, 72), (32, 96), (128, 256), (37, 37)):
        of, w, most = weight(35, k, group_size, kind)
        bias = torch.randn(35) if group_size == 32 else None
        args = (torch.randn(5, k).to(dtype), *of, bias, group_size, 16, None, None, -128, 127)
        for out_dtype in (dtype, torch.float32):
            within((*args, out_dtype), w, most, unit)
        monkeypatch.setattr(int4_gemm, "_multiply", lambda *args: called.append(args))
    assert not called


def test_groups_longer_than_one_int32_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of 32768, as the reference; of one group, and of groups that are no multiple of that."""
    monkeypatch.setattr(gemm_configs, "parts_of_k", lambda *args: 1)
    gemm_configs.int4_linear.cache_clear()
    for k, group_size in ((40000, 40000), (2 * 33280, 33280)):
        for kind in KINDS[:2]:
            of, _, _ = weight(3, k, group_size, kind)
            x = torch.full((1, k), -128, dtype=torch.int8)
            check_same((x, *of, None, group_size, 8, torch.ones(1), None, -128, 127, torch.float32))
    gemm_configs.int4_linear.cache_clear()


def test_the_cpu_layout_is_taken_and_said_once() -> None:
    gemm.say_once.cache_clear()
    q, scale = torch.randint(-8, 8, (35, 96), dtype=torch.int8), torch.rand(35, 3)
    for params in ({}, {"zero_point": torch.randint(-8, 8, (35, 3))}, {"minimum": torch.randn(35, 3)}):
        with qk.use_kernel("reference"):
            packed = PackedInt4.from_quantized(q, scale, **params)
        assert packed.layout == "panels-1"
        of = packed.data, packed.scale, packed.zero_point, packed.minimum, packed.weight_sum
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            check_same((torch.randn(3, 96), *of, None, 32, 8, None, None, -128, 127, torch.float32))
        assert [("packed for the CPU" in str(w.message)) for w in said] == [True] * (not params)
    for bits in (2, 3):
        low, high = layouts.code_range(bits)
        with qk.use_kernel("reference"):
            packed = PackedInt.from_quantized(q.clamp(low, high), scale, bits=bits)
        assert packed.layout == "planes-1"
        of = packed.data, packed.scale, None, None, packed.weight_sum
        check_same((torch.randn(3, 96), *of, None, 32, 8, None, None, -128, 127, torch.float32))


def test_what_is_slow_is_said_once() -> None:
    gemm.say_once.cache_clear()
    of = {size: weight(7, 120, size)[0] for size in (40, 120)}
    x = torch.randn(3, 128)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for size, rows in ((120, torch.randn(3, 112)), (120, x[:, :120]), (40, x[:, :120]), (40, x[:, :120])):
            if rows.shape[1] == 120:
                run(rows, *of[size], None, size, 8, None, None, -128, 127, torch.float32)
                run(rows, *of[size], None, size, 16, None, None, -128, 127, torch.float32)
    assert len(said) == 2
    assert "x is copied at every call" in str(said[0].message)
    assert "groups of 40 are read code by code" in str(said[1].message)


def test_any_memory_of_x() -> None:
    of, _, _ = weight(33, 96, 32)
    wide = torch.randn(2, 9, 200)
    for x in (wide[..., ::2][..., :96], wide[..., 3:99], wide[:, ::3, :96], torch.randn(96, 5).t(), torch.randn(96)):
        for act_bits in (8, 16):
            args = (*of, None, 32, act_bits, None, None, -128, 127, torch.float32)
            got = run(x, *args)
            assert got.shape == (*x.shape[:-1], 33)
            torch.testing.assert_close(got, run(x.contiguous(), *args), rtol=0, atol=0)
            if act_bits == 8:
                check_same((x, *args))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 32), (3, 0, 32), (3, 4, 0)])
def test_empty(m: int, n: int, k: int) -> None:
    of, _, _ = weight(n, k, k)
    for act_bits in (8, 16):
        check_same((torch.randn(m, k), *of, torch.randn(n), k, act_bits, None, None, -128, 127, torch.bfloat16))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("group_size", [32, 40, 160])
def test_nan_inf_and_zeros(group_size: int) -> None:
    of, _, _ = weight(33, 160, group_size, "zero points")
    of[1][0] = 0  # groups whose weights are all zero
    x = torch.randn(6, 160)
    x[1, 3], x[2, 5], x[3], x[4] = torch.nan, torch.inf, 0, 3e38
    check_same((x, *of, None, group_size, 8, None, None, -128, 127, torch.float32))
    args = (*of, None, group_size, 16, None, None, -128, 127, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        got, want = run(x.to(dtype), *args), reference.int4_linear(x.to(dtype), *args)
        assert got[1].isnan().all()
        assert not got[2].isfinite().any()
        assert (got[3] == 0).all()
        kept = [0, 3, 5]
        torch.testing.assert_close(got[kept], want[kept], rtol=1e-4, atol=1e-4)


def test_errors_are_those_of_the_reference() -> None:
    of, _, _ = weight(5, 96, 32)
    rest = None, None, -128, 127, torch.float32
    for args, message in (
        ((torch.randn(2, 64), *of, None, 32, 8, *rest), r"data: got shape \[5, 64\]"),
        ((torch.randn(2, 96), *of, None, 20, 8, *rest), "group_size: got 20"),
        ((torch.randn(2, 96), *of, None, 32, 4, *rest), "act_bits: got 4"),
        ((torch.randn(2, 96).to(torch.int8), *of, None, 32, 16, *rest), "x: got torch.int8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*args)


def test_the_public_function() -> None:
    """Packed on the device under test, by the kernels that it has there."""
    w, x = torch.randn(40, 128), torch.randn(3, 128)
    for symmetric, act_bits in itertools.product((True, False), (8, 16)):
        with qk.use_kernel("reference"):
            packed = PackedInt4.from_float(there(w), 32, symmetric)
            want = x.double() @ packed.dequantize().cpu().double().t()
        got = int4_linear(there(x), packed, act_bits=act_bits)
        assert (got.cpu() - want).norm() / want.norm() < (0.02 if act_bits == 8 else 1e-6)


# The instructions that no interpreter runs, read by another one.


def bits_to_float(bits: int, kind: str) -> float:
    code, held = ("<f", struct.pack("<I", bits << 16)) if kind == "bf16x2" else ("<e", struct.pack("<H", bits))
    return struct.unpack(code, held)[0]


def execute(ptx: str, registers: dict[str, int], kind: str = "") -> dict[str, Any]:
    """The results of the few PTX instructions that the kernel uses, on 32-bit registers."""
    values: dict[str, Any] = dict(registers)

    def value(name: str) -> int:
        return int(values[name]) if name in values else int(name, 0)

    for name, *suffixes, operands in (
        (*line.split(" ", 1)[0].split("."), line.split(" ", 1)[1])
        for line in re.findall(r"([a-z][a-z0-9.]+ [^;{}]+);", ptx)
    ):
        if name == "reg":
            continue
        target, *rest = (operand.strip() for operand in operands.split(","))
        of = [value(operand) for operand in rest] if name != "fma" else rest
        if name in ("shl", "shr"):
            values[target] = (of[0] << of[1] if name == "shl" else of[0] >> of[1]) & 0xFFFFFFFF
        elif name == "and":
            values[target] = of[0] & of[1]
        elif name == "mov":
            values[target] = of[0]
        elif name == "prmt":
            source = of[0].to_bytes(4, "little") + of[1].to_bytes(4, "little")
            values[target] = int.from_bytes(bytes(source[of[2] >> 4 * i & 7] for i in range(4)), "little")
        elif name == "lop3":
            values[target] = sum(
                (of[3] >> ((of[0] >> i & 1) << 2 | (of[1] >> i & 1) << 1 | (of[2] >> i & 1)) & 1) << i
                for i in range(32)
            )
        else:
            assert name == "fma"
            assert suffixes == ["rn", kind]
            a, b, c = ([bits_to_float(value(r) >> 16 * i & 0xFFFF, kind) for i in range(2)] for r in of)
            values[target] = [a[i] * b[i] + c[i] for i in range(2)]
    return values


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("high", [False, True])
def test_the_assembly_gives_every_code(high: bool, offset: bool) -> None:
    for first in range(0, 256, 4):
        data = [first, first + 1, first + 2, 255 - first]
        nibbles = [byte >> 4 if high else byte & 15 for byte in data]
        code = [((nibble ^ 8) - 8) for nibble in nibbles]
        packed = int.from_bytes(bytes(data), "little")
        got = execute(str(int4_gemm.to_int8(high, offset)), {"$1": packed})["$0"]
        assert got == int.from_bytes(bytes((c + 8 if offset else 16 * c) & 255 for c in code), "little")
        for kind in ("bf16x2", "f16x2"):
            result = execute(str(int4_gemm.to_float(kind, high, offset)), {"$2": packed}, kind)
            assert result["$0"] + result["$1"] == [c + 8 if offset else c for c in code]


@triton.jit
def both_ways_kernel(assembly_ptr, triton_ptr, data_ptr, HIGH: tl.constexpr, OFFSET: tl.constexpr):
    at = tl.arange(0, 256)
    data = tl.load(data_ptr + at)
    dtype = triton_ptr.dtype.element_ty
    tl.store(assembly_ptr + at, int4_gemm.codes_by_assembly(data, dtype, HIGH, OFFSET))
    tl.store(triton_ptr + at, int4_gemm.codes_in_triton(data, dtype, HIGH, OFFSET))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter knows no assembly")
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_the_assembly_is_its_twin(dtype: torch.dtype) -> None:
    data = torch.arange(256, device=DEVICE).to(torch.uint8)
    for high, offset in itertools.product((False, True), (False, True)):
        a, b = (torch.empty(256, dtype=dtype, device=DEVICE) for _ in range(2))
        both_ways_kernel[1,](a, b, data, HIGH=high, OFFSET=offset, num_warps=1)
        assert torch.equal(a, b)


# The choice of tiles.


@pytest.mark.parametrize("x_bytes", [1, 2, 4])
@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_every_tile_is_legal_and_parts_cover_k(arch: int, x_bytes: int) -> None:
    for m, n, (group_size, k) in itertools.product(
        (1, 16, 17, 64, 65, 128, 200, 9000), (1, 1000, 4097, 30000), [*GROUPS, (32, 4096), (4096, 4096), (128, 65536)]
    ):
        tile, splits = gemm_configs.int4_linear(arch, m, n, k, group_size, x_bytes, MULTIPROCESSORS[arch])
        assert gemm_configs.int4_fault(arch, tile, x_bytes) is None, gemm_configs.int4_fault(arch, tile, x_bytes)
        loop = gemm_configs.int4_k_loop(group_size, k, tile.block_k, x_bytes == 1)
        total, share = gemm_configs.int4_shares(loop, k, group_size, splits)
        assert share * splits >= total
        assert ceil_div(total, share) <= splits
        assert 2 * loop.width * loop.pieces <= tile.block_k or loop.add == "codes"
        if loop.add == "span":
            assert share % loop.steps == 0 or share >= total
            assert loop.steps * 2 * loop.width == loop.span
    assert gemm_configs.int4_linear(90, 1, 28672, 4096, 128, 2, 132)[1] == 1
    assert gemm_configs.int4_linear(90, 1, 1024, 65536, 128, 2, 132)[1] > 1


def test_k_loop_of_group_sizes() -> None:
    assert [gemm_configs.int4_k_loop(*of, 256, True).add for of in GROUPS] == K_LOOPS
    assert gemm_configs.int4_k_loop(16, 4096, 256, False) == gemm_configs.KLoop("halves", 16, 16, 4, 16, 1)
    assert gemm_configs.int4_k_loop(32, 4096, 256, True) == gemm_configs.KLoop("halves", 32, 32, 2, 32, 1)
    assert gemm_configs.int4_k_loop(128, 4096, 256, True) == gemm_configs.KLoop("piece", 64, 64, 2, 128, 1)
    assert gemm_configs.int4_k_loop(4096, 4096, 256, True) == gemm_configs.KLoop("end", 64, 128, 1, 4096, 16)
    assert gemm_configs.int4_k_loop(65536, 65536, 256, True).add == "span"
    assert gemm_configs.int4_k_loop(65536, 65536, 256, False).add == "end"


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (gemm_configs.Int4Tile(48, 64, 128, 4, 3), "block_m: got 48"),
        (gemm_configs.Int4Tile(64, 64, 64, 4, 3), "block_k: got 64"),
        (gemm_configs.Int4Tile(64, 64, 128, 2, 3), "warps: got 2"),
        (gemm_configs.Int4Tile(64, 64, 128, 4, 9), "stages: got 9"),
        (gemm_configs.Int4Tile(128, 128, 128, 4, 3), "warps: got 4; accepted: at most 64 sums"),
        (gemm_configs.Int4Tile(64, 64, 256, 4, 4), "stages: got 4, 163840 bytes"),
    ],
)
def test_illegal_tiles_are_named(tile: gemm_configs.Int4Tile, message: str) -> None:
    assert message in str(gemm_configs.int4_fault(89, tile, 2))
