"""int4_linear: values of every path against the reference and against exact products, bad inputs, compiled code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from compare import same
from conftest import paths_of
from int4_cases import DTYPES, EMPTY, FORMS, SHAPES, codes, exact_weight, in_order, pack, parts, ran
from torch import Tensor

from qkernels import library
from qkernels.ops.int4_gemm import PackedInt, PackedInt4, int4_linear
from qkernels.reference import int4_gemm as reference

pytestmark = pytest.mark.sanitized

OPS = ("int4_pack", "int4_unpack", "int4_linear")


@pytest.fixture(params=[*paths_of("int4_linear"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


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


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize(("m", "n", "k", "group_size"), [*SHAPES, (3, 5, 65544, 65544)])
@pytest.mark.parametrize("bits", [2, 3])
def test_low_bits(kernel: str, bits: int, m: int, n: int, k: int, group_size: int, form: str) -> None:
    """Bit for bit what the same codes give as codes of 4 bits, whose values the tests around this one check."""
    q, scale, zero_point, _ = parts(n, k, group_size, form, bits=bits)
    dense = PackedInt.from_quantized(q, scale, zero_point, bits=bits)
    wide = pack(q, scale, zero_point, None)
    assert dense.data.numel() == (n + 31) // 32 * ((k + 7) // 8) * 32 * bits
    x, bias = torch.randn(m, k), torch.randn(n)
    for dtype, act_bits in itertools.product((torch.float32, torch.bfloat16), (8, 16)):
        got = int4_linear(x.to(dtype), dense, bias, act_bits, out_dtype=torch.float32)
        assert ran(kernel)
        same(got, int4_linear(x.to(dtype), wide, bias, act_bits, out_dtype=torch.float32))
    a, one = codes(m, k, low=-128, high=127), torch.ones(1)
    same(int4_linear(a, dense, input_scale=one), int4_linear(a, wide, input_scale=one))


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
        wide = int4_linear(half.float(), packed, bias, 16)
        same(int4_linear(half, packed, bias, 16, out_dtype=torch.float32), wide)
        same(int4_linear(half, packed, bias, 16), wide.to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_bf16_special_values(kernel: str, form: str) -> None:
    """NaN and infinity reach their rows alone; numbers below the smallest normal one count, or count as 0."""
    packed, x = pack(*parts(37, 30, 30, form)), torch.randn(14, 30).bfloat16()
    clean = int4_linear(x, packed, None, 16)
    x[1, 3], x[4, 29], x[13, 0] = torch.nan, torch.inf, 1e-39
    got, want = int4_linear(x, packed, None, 16), int4_linear(x.float(), packed, None, 16).bfloat16()
    assert got[1].isnan().all()
    assert not got[4].isfinite()[packed.dequantize()[:, 29] != 0].any()
    same(got[:13], want[:13])
    others = torch.tensor([i for i in range(13) if i not in (1, 4)])
    same(got[others], clean[others])
    x[13, 1:] = 0
    assert int4_linear(x[13:], packed, None, 16).abs().max() <= 1e-36


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
            r"data: got shape \[1, 15, 16, 4\]; accepted: what PackedInt holds for N = 6, K = 64 and 4 bits",
            1,
            lambda t: t[:, :15],
        ),
        (r"data: got shape \[1, 7, 64\]; accepted: .* 2 bits, \[1, 8, 64\]", 1, lambda t: t.view(1, 16, 64)[:, :7]),
        (r"data: got shape \[1, 16, 65\]; accepted: .* 3 bits, \[1, 8, 96\]", 1, lambda t: t.new_zeros(1, 16, 65)),
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
    for bits in (2, 3):
        q = codes(6, 64, low=-2, high=1)
        args[1] = torch.ops.qkernels.int4_pack(q, bits)
        sample = {"int4_pack": (q, bits), "int4_unpack": (args[1], 6, 64), "int4_linear": tuple(args)}[op]
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
