"""PackedInt4: packing, unpacking, rounding from floats, and weights that it refuses."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
from compare import same
from conftest import paths_of
from int4_cases import DTYPES, FORMS, codes, exact_weight, pack, parts, ran

import qkernels as qk
from qkernels import layouts, library
from qkernels.ops.int4_gemm import PackedInt, PackedInt4, int4_linear
from qkernels.reference import int4_gemm as reference

pytestmark = pytest.mark.sanitized


@pytest.fixture(params=[*paths_of("int4_linear"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 4), (32, 8), (33, 9), (64, 67), (70, 130), (0, 8), (3, 0)])
def test_pack_and_unpack(kernel: str, n: int, k: int) -> None:
    whole = codes(2 * n + 1, 3 * k + 1)
    for q in (codes(n, k), codes(k, n).t(), whole[1::2, 1::3][:n, :k], codes(n, 1).expand(n, k)):
        data = torch.ops.qkernels.int4_pack(q)
        assert torch.equal(data, reference.int4_pack(q))
        if n and k:
            assert ran(kernel)
            panel, step, channel, at = ((n - 1) // 32, (k - 1) // 4, (n - 1) % 32, (k - 1) % 4)
            byte = int(data[panel, step, channel % 16, at])
            assert (byte >> 4 if channel >= 16 else byte & 15) == int(q[-1, -1]) + 8
        assert torch.equal(torch.ops.qkernels.int4_unpack(data, n, k), q)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 4), (32, 8), (33, 9), (64, 67), (70, 132), (0, 8), (3, 0)])
@pytest.mark.parametrize("bits", [2, 3])
def test_planes(kernel: str, bits: int, n: int, k: int) -> None:
    """Each code lies where layouts.py draws it."""
    low, high = layouts.code_range(bits)
    whole = codes(2 * n + 1, 3 * k + 1, low=low, high=high)
    for q in (whole[:n, :k], whole[1::2, 1::3][:n, :k], whole.t()[:n, :k]):
        n, k = q.shape
        data = torch.ops.qkernels.int4_pack(q, bits)
        assert torch.equal(data, reference.int4_pack(q, bits))
        assert torch.equal(torch.ops.qkernels.int4_unpack(data, n, k), q)
        if n == 0 or k == 0:
            continue
        assert ran(kernel)
        for channel, at in {(n - 1, k - 1), (n - 1, 0), (0, k - 1), (n // 2, k // 2)}:
            block = data[channel // 32, at // 8].tolist()
            byte, place = channel % 16 * 4 + at % 4, at % 8 // 4 + channel % 32 // 16 * 2
            code = block[byte] >> 2 * place & 3
            if bits == 3:
                code |= (block[64 + byte % 32] >> 2 * place + byte // 32 & 1) << 2
            assert code + low == int(q[channel, at])


@pytest.mark.parametrize("k", [16, 33, 96, 240])
@pytest.mark.parametrize("group_size", [16, 24, 32, 48, 240, -1])
def test_gpu_layout_on_the_reference(k: int, group_size: int) -> None:
    """A byte's codes are ``half`` apart in k; the reference computes from either layout."""
    size = k if group_size == -1 else group_size
    if k % size:
        pytest.skip("does not divide K")
    q, scale, zero_point, minimum = parts(5, k, size, "zero points")
    half = layouts.half_of(size, k)
    data = layouts.int4_to_halves(q, size)
    assert torch.equal(layouts.int4_unpack(data, *q.shape, size), q)
    for i in {0, min(half, k) - 1, min(half, k - 1), k - 1}:
        block, at = divmod(i, 2 * half)
        byte = int(data[2, block * half + at % half])
        assert (byte >> 4 if at >= half else byte & 15) == int(q[2, i]) % 16
    packed, x = pack(q, scale, zero_point, minimum), torch.randn(3, k)
    rest = (None, size, 8, None, None, -128, 127, torch.float32)
    for act_bits in (8, 16):
        args = (x, data, scale.t().contiguous(), zero_point.t().contiguous(), None, packed.weight_sum, *rest)
        with library.use_kernel("reference"):
            got = torch.ops.qkernels.int4_linear(*args[:8], act_bits, *args[9:])
            same(got, int4_linear(x, packed, act_bits=act_bits))


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_from_float(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    """Every weight is within half a step of its code's value, and no group's extreme is clipped."""
    w = torch.randn(20, 96) * torch.logspace(-6, 2, 20)[:, None]
    w[4] = 0
    packed = PackedInt.from_float(w, bits, group_size=24, symmetric=symmetric, scale_dtype=scale_dtype)
    q, scale, zero_point, minimum = packed.unpack()
    assert scale.dtype == scale_dtype
    assert (zero_point is None) == symmetric
    assert minimum is None
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    assert int(q.min()) >= low
    assert int(q.max()) <= high
    steps = scale.float().repeat_interleave(24, 1)
    # An asymmetric range's ends move with its rounded zero point, by up to half a step.
    slack = 0.5001 if symmetric else 1.0001
    if scale_dtype != torch.float32:
        slack += high * 2.0**-8
    tiny = torch.finfo(scale_dtype).tiny
    assert bool(((packed.dequantize() - w).abs() <= slack * steps + 8 * tiny).all())
    assert (packed.dequantize()[4] == 0).all()
    if scale_dtype == torch.float32 and bits == 4:
        q8, s8, z8 = qk.quantize_dynamic(w, bits=4, group_size=24, symmetric=symmetric)
        assert torch.equal(q, q8)
        assert torch.equal(scale, s8)
        assert zero_point is None or torch.equal(zero_point, z8)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_unpack_is_exact_and_survives_pickling(bits: int, form: str) -> None:
    if form == "minima" and bits < 4:
        pytest.skip("minima come with 4 bits")
    for dtype, (n, k, size) in itertools.product(DTYPES, [(33, 96, 32), (5, 37, 37)]):
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        _, scale, zero_point, minimum = parts(n, k, size, form, dtype)
        q = codes(n, k, low=low, high=high)
        zero_point = None if zero_point is None else zero_point.clamp(low, high)
        packed = PackedInt.from_quantized(q, scale, zero_point, minimum=minimum, bits=bits)
        assert packed.layout == ("panels-1" if bits == 4 else "planes-1")
        for p in (packed, pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), packed.to("cpu")):
            assert (p.shape, p.group_size, p.bits) == ((n, k), size, bits)
            for got, want in zip(p.unpack(), (q, scale, zero_point, minimum), strict=True):
                assert (got is None) == (want is None)
                if want is not None:
                    same(got, want.contiguous())
        total = exact_weight(q, scale, zero_point, minimum).sum(1)
        assert torch.allclose(packed.weight_sum.double(), total, rtol=1e-6, atol=1e-6)
        x = torch.randn(3, k)
        assert torch.allclose(int4_linear(x, packed, act_bits=16), x @ packed.dequantize().t(), rtol=1e-4, atol=1e-4)


def test_one_group_for_a_row_by_any_shape_of_scale() -> None:
    q, x = codes(6, 32), torch.randn(2, 32)
    want = int4_linear(x, PackedInt4.from_quantized(q, torch.full((6, 1), 0.5)))
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((6,), 0.5)):
        packed = PackedInt4.from_quantized(q, scale)
        assert packed.group_size == 32
        assert torch.equal(int4_linear(x, packed), want)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"q: got 8; accepted: the codes of 4 bits, -8 to 7", lambda q, s: (q + (q == 7).to(torch.int8), s)),
        (r"q: got -9; accepted", lambda q, s: (q - (q == -8).to(torch.int8), s)),
        (r"q: got torch.int32 of shape \[6, 64\]; accepted: torch.int8 \[N, K\]", lambda q, s: (q.int(), s)),
        (r"scale: got shape \[6, 3\]; accepted: .* \[6, K / group_size\]", lambda q, s: (q, s[:, :3])),
        (r"scale: got shape \[6, 8\]", lambda q, s: (q, s.repeat(1, 2))),
        (r"scale: got shape \[5, 4\]", lambda q, s: (q, s[:5])),
        (r"scale: got torch.float64; accepted: torch.float32", lambda q, s: (q, s.double())),
        (r"zero_point: got 8; accepted", lambda q, s: (q, s, torch.full((6, 4), 8))),
        (r"zero_point: got shape \[6, 2\]; accepted: \[6, 4\]", lambda q, s: (q, s, torch.zeros(6, 2).int())),
        (r"zero_point: got torch.float32; accepted: an integer", lambda q, s: (q, s, torch.zeros(6, 4))),
    ],
)
def test_bad_quantized(message: str, make) -> None:
    q, scale = codes(6, 64, low=-8, high=7), torch.rand(6, 4)
    q[0, 0], q[0, 1] = 7, -8
    args = make(q, scale)
    with pytest.raises(RuntimeError, match=message):
        PackedInt4.from_quantized(*args)


def test_bad_minimum_and_bits() -> None:
    q, scale = codes(6, 64, low=-2, high=1), torch.rand(6, 4)
    with pytest.raises(RuntimeError, match="minimum: got a tensor beside zero_point; accepted: one of them"):
        PackedInt4.from_quantized(q, scale, torch.zeros(6, 4).int(), minimum=scale)
    with pytest.raises(RuntimeError, match=r"minimum: got torch.bfloat16; accepted: scale's dtype"):
        PackedInt4.from_quantized(q, scale, minimum=scale.bfloat16())
    with pytest.raises(RuntimeError, match="minimum: got a tensor with 2 bits; accepted with 4 bits"):
        PackedInt.from_quantized(q, scale, minimum=scale, bits=2)
    with pytest.raises(RuntimeError, match="bits: got 5; accepted: 2, 3, 4"):
        PackedInt.from_quantized(q, scale, bits=5)


@pytest.mark.parametrize("group_size", [0, 3, 8, 20, 48, 128, -2])
def test_bad_group_size(group_size: int) -> None:
    with pytest.raises(RuntimeError, match=f"group_size: got {group_size}; accepted: -1 or K = 64, or a multiple of 8"):
        PackedInt4.from_float(torch.randn(3, 64), group_size)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_weights(bad: float) -> None:
    w = torch.randn(3, 32)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="w: got NaN or infinite"):
        PackedInt4.from_float(w)
    with pytest.raises(ValueError, match=r"w: got torch.int64 of shape \[3, 32\]"):
        PackedInt4.from_float(torch.zeros(3, 32).long())
    with pytest.raises(ValueError, match=r"w: got scales up to .*; accepted: what torch.float16 holds"):
        PackedInt4.from_float(torch.full((1, 16), 1e6), 16, scale_dtype=torch.float16)
