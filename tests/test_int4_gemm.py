from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
from compare import same
from conftest import paths_of
from torch import Tensor

import qkernels as qk
from qkernels import layouts, library
from qkernels.ops.int4_gemm import PackedInt, PackedInt4, int4_linear
from qkernels.reference import int4_gemm as reference

OPS = ("int4_pack", "int4_unpack", "int4_linear")
FORMS = ("symmetric", "zero points", "minima")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, N, K, group size: every number of rows of a tile, channels around a panel's 32, groups of every kind
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 5),
    (3, 33, 37, 37),
    (4, 31, 16, 16),
    (5, 40, 48, 24),
    (6, 5, 64, 16),
    (7, 70, 96, 32),
    (8, 65, 120, 40),
    (9, 32, 128, 64),
    (10, 64, 384, 128),
    (11, 17, 130, 130),
    (12, 100, 256, 256),
    (13, 33, 72, 72),
    (29, 34, 80, 16),
    (1, 130, 1056, 32),
    (2, 96, 4104, 4104),
]
EMPTY = [(0, 3, 32, 16), (3, 0, 32, 16), (3, 4, 0, 0), (0, 0, 0, 0)]


@pytest.fixture(params=[*paths_of("int4_linear"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def ran(kernel: str) -> bool:
    return kernel == "reference" or f"cpu_{library.host.last_isa()}" == kernel


def codes(*shape: int, low: int = -8, high: int = 7) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def parts(n: int, k: int, group_size: int, form: str, dtype: torch.dtype = torch.float32) -> tuple:
    """q, scale of either sign, zero point and minimum."""
    groups = k // group_size if k else 1
    scale = ((torch.rand(n, groups) + 0.1) * torch.where(torch.rand(n, groups) < 0.2, -0.01, 0.01)).to(dtype)
    zero_point = codes(n, groups) if form == "zero points" else None
    minimum = (torch.randn(n, groups) * 0.1).to(dtype) if form == "minima" else None
    return codes(n, k), scale, zero_point, minimum


def pack(q: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> PackedInt4:
    packed = PackedInt4.from_quantized(q, scale, zero_point, minimum=minimum)
    assert isinstance(packed, PackedInt4)
    return packed


def in_order(
    a: Tensor, scale_x: Tensor, zero_x: int, q: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None
) -> Tensor:
    """The docstring's arithmetic, spelled out here and not shared with the reference: int64 sums, fp32 steps."""
    n, groups = scale.shape
    size = q.shape[1] // groups
    s, y = scale.float(), torch.zeros(a.shape[0], n)
    for g in range(groups):
        rows, weights = (t[:, g * size : (g + 1) * size].long() for t in (a, q))
        if zero_point is None and minimum is None:
            y = y + s[:, g] * (rows[:, None] * weights).sum(-1).float()
            continue
        offset = -(zero_point[:, g].float() + 8) * s[:, g] if minimum is None else minimum[:, g].float()
        y = y + offset * rows.sum(1, keepdim=True).float()
        y = y + s[:, g] * (rows[:, None] * (weights + 8)).sum(-1).float()
    if zero_x:
        y = y - zero_x * pack(q, scale, zero_point, minimum).weight_sum
    return y * scale_x


def exact_weight(q: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> Tensor:
    size = q.shape[1] // scale.shape[1]
    s = scale.double().repeat_interleave(size, 1)
    if minimum is not None:
        return (q.double() + 8) * s + minimum.double().repeat_interleave(size, 1)
    return (q.double() - (0 if zero_point is None else zero_point.double().repeat_interleave(size, 1))) * s


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
def test_int8_activations(kernel: str, m: int, n: int, k: int, group_size: int, form: str) -> None:
    """Bit for bit: dynamic rows, a static scale with a zero point, and codes with their own scales."""
    weight = parts(n, k, group_size, form)
    packed, bias, x = pack(*weight), torch.randn(n), torch.randn(m, k)
    scale_x = (x.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    a = torch.clamp(torch.round(x * (1 / scale_x)), -128, 127)
    same(int4_linear(x, packed, bias), in_order(a, scale_x, 0, *weight) + bias)
    assert ran(kernel)
    step = torch.tensor(0.031)
    a = torch.clamp(torch.round(x * (1 / step)) - 11, -128, 127)
    got = int4_linear(x, packed, input_scale=step, input_zero_point=torch.tensor(-11))
    same(got, in_order(a, step, -11, *weight))
    a = codes(m, k, low=-128, high=127)
    scale_x = torch.rand(m)
    got = int4_linear(a, packed, bias, input_scale=scale_x, out_dtype=torch.float32)
    same(got, in_order(a, scale_x[:, None], 0, *weight) + bias)


@pytest.mark.parametrize("form", FORMS)
def test_products_are_exact(kernel: str, form: str) -> None:
    """Where no float operation rounds, the result is the int64 product, at the extremes too."""
    n, k, size = 35, 192, 48
    for x_low, x_high, w_low, w_high in [
        (-128, 127, -8, 7),
        (-128, -128, -8, -8),
        (127, 127, -8, -8),
        (-128, -128, 7, 7),
    ]:
        a, q = codes(9, k, low=x_low, high=x_high), codes(n, k, low=w_low, high=w_high)
        scale = 2.0 ** torch.randint(-2, 3, (n, k // size)).float()
        zero_point = codes(n, k // size) if form == "zero points" else None
        minimum = torch.randint(-9, 10, (n, k // size)).float() if form == "minima" else None
        got = int4_linear(a, pack(q, scale, zero_point, minimum), input_scale=torch.ones(1), out_dtype=torch.float32)
        want = a.double() @ exact_weight(q, scale, zero_point, minimum).t()
        assert torch.equal(got.double(), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "k", "group_size"), SHAPES)
def test_float_activations(kernel: str, m: int, n: int, k: int, group_size: int, form: str) -> None:
    """Within the docstring's bound of the fp64 product, in fp32; other dtypes round the same sums once."""
    weight = parts(n, k, group_size, form)
    packed, bias = pack(*weight), torch.randn(n)
    x = torch.randn(m, k)
    got = int4_linear(x, packed, bias, 16)
    want = x.double() @ exact_weight(*weight).t() + bias.double()
    offset = reference.offset_of(*weight[1:])
    size = weight[1].abs().double() * 15 + (0 if offset is None else offset.abs().double())
    bound = (k + 4) * 2.0**-23 * (x.abs().double() @ size.repeat_interleave(group_size, 1).t()) + 2.0**-22 * want.abs()
    assert bool(((got.double() - want).abs() <= bound).all())
    assert ran(kernel)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        same(int4_linear(half, packed, bias, 16), int4_linear(half.float(), packed, bias, 16).to(dtype))


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize(("m", "n", "k", "group_size"), EMPTY)
def test_empty(kernel: str, m: int, n: int, k: int, group_size: int, act_bits: int) -> None:
    packed = pack(*parts(n, k, group_size, "zero points"))
    out = int4_linear(torch.randn(m, k), packed, torch.ones(n), act_bits)
    assert out.shape == (m, n)
    assert torch.equal(out, torch.ones(m, n))


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize(("x_dtype", "scale_dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_dtypes(
    kernel: str, x_dtype: torch.dtype, scale_dtype: torch.dtype, out_dtype: torch.dtype, act_bits: int
) -> None:
    for form in FORMS:
        weight = parts(37, 96, 32, form, scale_dtype)
        wide = (weight[0], *(t.float() if t is not None and t.is_floating_point() else t for t in weight[1:]))
        x, bias = torch.randn(5, 96).to(x_dtype), torch.randn(37).to(x_dtype)
        want = int4_linear(x.float(), pack(*wide), bias.float(), act_bits).to(out_dtype)
        same(int4_linear(x, pack(*weight), bias, act_bits, out_dtype=out_dtype), want)
    assert int4_linear(x, pack(*weight), bias, act_bits).dtype == x_dtype


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (2, 0, 48)])
def test_leading_dims_and_strides(kernel: str, shape: tuple[int, ...], act_bits: int) -> None:
    packed, x = PackedInt4.from_float(torch.randn(5, 48), 16, False), torch.randn(shape)
    out = int4_linear(x, packed, act_bits=act_bits)
    assert out.shape == (*shape[:-1], 5)
    assert torch.equal(out.view(-1, 5), int4_linear(x.reshape(-1, 48), packed, act_bits=act_bits))
    strided = torch.randn(*shape[:-1], 96)[..., ::2]
    assert torch.equal(
        int4_linear(strided, packed, act_bits=act_bits), int4_linear(strided.contiguous(), packed, act_bits=act_bits)
    )


@pytest.mark.parametrize("act_bits", [8, 16])
def test_zero_groups_nan_and_infinity(kernel: str, act_bits: int) -> None:
    w = torch.randn(40, 64)
    w[3] = 0
    w[5, 16:32] = 0
    for symmetric in (True, False):
        packed = PackedInt4.from_float(w, 16, symmetric)
        x = torch.randn(5, 64)
        clean = int4_linear(x, packed, act_bits=act_bits)
        assert clean.isfinite().all()
        assert (clean[:, 3] == 0).all()
        x[1, 3] = torch.nan
        x[3, 63] = torch.inf
        out = int4_linear(x, packed, act_bits=act_bits)
        assert out[1].isnan().all()
        assert not out[3].isfinite()[packed.dequantize()[:, 63] != 0].any()
        assert torch.equal(out[::2], clean[::2])
    scale = torch.tensor([[0.5], [torch.nan], [torch.inf], [0.0]])
    out = int4_linear(torch.ones(2, 16), pack(codes(4, 16, low=1), scale, None, None), act_bits=act_bits)
    assert out.isfinite().all(0).tolist() == [True, False, False, True]
    assert int4_linear(
        torch.ones(1, 16), pack(codes(4, 16, low=1), scale, None, None), None, act_bits, out_dtype=torch.bfloat16
    )[0, 1].isnan()


def test_groups_longer_than_int32_sums_hold(kernel: str) -> None:
    k = 65536 + 8
    x = torch.full((2, k), -128, dtype=torch.int8)
    for form, value in itertools.product(FORMS, (-8, 7)):
        zero_point = torch.tensor([[7], [-8]], dtype=torch.int8) if form == "zero points" else None
        minimum = torch.tensor([[4.0], [-5.0]]) if form == "minima" else None
        weight = torch.full((2, k), value, dtype=torch.int8), torch.ones(2, 1), zero_point, minimum
        got = int4_linear(x, pack(*weight), input_scale=torch.ones(1), out_dtype=torch.float32)
        want = in_order_of_parts(x, *weight)
        same(got, want)
        assert torch.allclose(got.double(), x.double() @ exact_weight(*weight).t(), rtol=1e-6)


def in_order_of_parts(a: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> Tensor:
    """Groups of 65544 in parts of 32768."""
    y = torch.zeros(a.shape[0], q.shape[0])
    for first in range(0, q.shape[1], 32768):
        rows, weights = (t[:, first : first + 32768].long() for t in (a, q))
        if zero_point is not None or minimum is not None:
            offset = minimum if zero_point is None else -(zero_point.float() + 8) * scale
            assert offset is not None
            y = y + offset[:, 0] * rows.sum(1, keepdim=True).float()
            weights = weights + 8
        y = y + scale[:, 0] * (rows @ weights.t()).float()
    return y


@pytest.mark.parametrize("act_bits", [8, 16])
def test_several_passes_and_threads(act_bits: int) -> None:
    """More rows than one pass of scratch memory holds; no bit depends on the number of threads."""
    n, k, m = 33, 4096, 4500
    packed, x = PackedInt4.from_float(torch.randn(n, k), 128, False), torch.randn(m, k)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(int4_linear(x, packed, act_bits=act_bits))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    for rows in (slice(0, 3), slice(4000, 4100), slice(m - 1, m)):
        assert torch.equal(results[0][rows], int4_linear(x[rows], packed, act_bits=act_bits))


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
        assert packed.layout == "panels-1"
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


@pytest.mark.parametrize(
    ("message", "args", "named"),
    [
        (r"x: got shape \[2, 63\]; accepted: \[..., 64\]", (torch.randn(2, 63),), {}),
        (r"x: got torch.float64", (torch.randn(2, 64).double(),), {}),
        (r"bias: got shape \[5\]", (torch.randn(2, 64), torch.zeros(5)), {}),
        (r"act_bits: got 4; accepted: 8, 16", (torch.randn(2, 64), None, 4), {}),
        (r"input_scale: got None; accepted", (codes(2, 64),), {}),
        (r"x: got torch.int8; accepted with act_bits 16", (codes(2, 64), None, 16), {"input_scale": torch.ones(1)}),
        (
            r"input_scale: got a tensor; accepted with act_bits 16",
            (torch.randn(2, 64), None, 16),
            {"input_scale": torch.ones(1)},
        ),
        (r"input_zero_point: got a tensor without", (torch.randn(2, 64),), {"input_zero_point": torch.zeros(1).int()}),
        (r"quant_min, quant_max: got -200", (torch.randn(2, 64),), {"quant_min": -200}),
        (r"out_dtype: got torch.int8", (torch.randn(2, 64),), {"out_dtype": torch.int8}),
    ],
)
def test_bad_arguments(kernel: str, message: str, args: tuple, named: dict) -> None:
    x, *rest = args
    with pytest.raises(RuntimeError, match=message):
        int4_linear(x, PackedInt4.from_float(torch.randn(6, 64), 16), *rest, **named)


def raw_args() -> list:
    p = PackedInt4.from_float(torch.randn(6, 64), 16, False)
    data, scale = p.data, p.scale
    return [
        torch.randn(2, 3, 64),
        data,
        scale,
        p.zero_point,
        None,
        p.weight_sum,
        torch.randn(6),
        16,
        8,
        None,
        None,
        -128,
        127,
        torch.float32,
    ]


@pytest.mark.parametrize(
    ("message", "at", "change"),
    [
        ("data: got torch.int8; accepted: torch.uint8", 1, lambda t: t.view(torch.int8)),
        (
            r"data: got shape \[1, 15, 16, 4\]; accepted: what PackedInt4 holds for N = 6 and K = 64",
            1,
            lambda t: t[:, :15],
        ),
        ("data: got strided memory", 1, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        (r"scale: got shape \[1, 3, 32\]", 2, lambda t: t[:, :3]),
        ("scale: got torch.float64", 2, lambda t: t.double()),
        ("zero_point: got torch.int32; accepted: torch.int8", 3, lambda t: t.int()),
        ("minimum: got a tensor beside zero_point", 4, lambda t: torch.zeros(1, 4, 32)),
        ("weight_sum: got torch.float64", 5, lambda t: t.double()),
        ("group_size: got 24; accepted", 7, lambda t: 24),
    ],
)
def test_bad_packed(kernel: str, message: str, at: int, change) -> None:
    args = raw_args()
    args[at] = change(args[at])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qkernels.int4_linear(*args)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    args = raw_args()
    sample = {"int4_pack": (codes(6, 9),), "int4_unpack": (args[1], 6, 64), "int4_linear": tuple(args)}[op]
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, sample)


def test_compile_and_export() -> None:
    packed = PackedInt4.from_float(torch.randn(6, 64), 16, False)

    def f(x: Tensor) -> Tensor:
        return int4_linear(x, packed) + int4_linear(x, packed, act_bits=16)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 9, 23):
            x = torch.randn(m, 64)
            assert torch.equal(compiled(x), f(x))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    x = torch.randn(3, 64)
    program = torch.export.export(Layer(), (x,))
    assert torch.equal(program.module()(x), f(x))
