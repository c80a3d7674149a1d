"""PackedInt8 and int8_linear: layouts, values of every path against the reference, bad weights and inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from compare import same
from conftest import paths_of
from int8_cases import ACTIVATIONS, OUT_DTYPES, SHAPES, codes, layouts, linear_input, plain, ran, sample_args

import qkernels as qk
from qkernels import library
from qkernels.ops.int8_gemm import PackedInt8, int8_linear, int8_mm
from qkernels.reference import int8_gemm as reference

pytestmark = pytest.mark.sanitized


@pytest.fixture(params=[*paths_of("int8_mm"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def test_a_chain_of_int8_layers(kernel: str) -> None:
    """Codes go from layer to layer; each layer's equal those of its float output, quantized."""
    x, first, second = torch.randn(2, 7, 50), PackedInt8.from_float(torch.randn(70, 50)), torch.randn(20, 70)
    bias, step, zero_point = torch.randn(70), torch.tensor(0.1), torch.tensor(-128)
    middle = int8_linear(x, first, bias, activation="relu")
    q = int8_linear(x, first, bias, activation="relu", out_scale=step, out_zero_point=zero_point)
    assert q.dtype == torch.int8
    same(q, (torch.round(middle * (1 / step)) - 128).clamp(-128, 127).to(torch.int8))
    packed = PackedInt8.from_float(second)
    y = int8_linear(q, packed, input_scale=step, input_zero_point=zero_point, out_dtype=torch.float32)
    weight, scale = packed.unpack()
    want = ((q.double() + 128) * step) @ (weight.double() * scale.double()[:, None]).t()
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-5)
    same(y, int8_linear(middle, packed, input_scale=step, input_zero_point=zero_point))
    assert int8_linear(q, packed, input_scale=step).dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_producers_feed_the_product(kernel: str, symmetric: bool) -> None:
    """Codes, scales and zero points of each token, as the norm and SwiGLU give them."""
    x, gate = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    packed = PackedInt8.from_float(torch.randn(33, 64))
    weight, weight_scale = packed.unpack()
    for q, scale, zero_point in (
        qk.rms_norm_quantize_dynamic(x, torch.rand(64), symmetric=symmetric),
        qk.silu_mul_quantize_dynamic(gate, x, symmetric=symmetric),
        qk.quantize_dynamic(x, symmetric=symmetric),
    ):
        assert q.dtype == torch.int8
        y = int8_linear(q, packed, input_scale=scale, input_zero_point=zero_point, out_dtype=torch.float32)
        values = (q.double() - zero_point.double()) * scale.double()
        want = values @ (weight.double() * weight_scale.double()[:, None]).t()
        torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (1, 1), (31, 3), (32, 4), (33, 31), (65, 130)])
def test_pack(kernel: str, n: int, k: int) -> None:
    for w in layouts(n, k).values():
        data, colsum = torch.ops.qkernels.int8_pack(w)
        assert data.shape == ((n + 31) // 32, (k + 3) // 4, 32, 4)
        for channel, i in itertools.product(range(0, n, 7), range(0, k, 5)):
            assert data[channel // 32, i // 4, channel % 32, i % 4] == w[channel, i]
        assert data.long().sum() == w.long().sum()  # the padding is zeros
        assert torch.equal(colsum, w.sum(1, dtype=torch.int32))
        assert torch.equal(torch.ops.qkernels.int8_unpack(data, n, k), w)


def test_packed_from_float(kernel: str) -> None:
    w = torch.randn(37, 50)
    w[3] = 0
    w[4] = 1e-42
    packed = PackedInt8.from_float(w)
    q, scale = packed.unpack()
    assert packed.shape == (37, 50)
    assert q.abs().amax(1)[torch.arange(37) > 4].eq(127).all()
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()
    assert scale[3] == torch.finfo(torch.float32).tiny
    out = int8_linear(torch.randn(2, 50), packed)
    assert out.isfinite().all()
    assert out[:, 3].eq(0).all()
    again = PackedInt8.from_quantized(q, scale)
    assert torch.equal(again.data, packed.data)
    for shape in ((37, 1), (37,)):
        assert torch.equal(PackedInt8.from_quantized(q, scale.view(shape)).scale, scale)
    assert PackedInt8.from_quantized(q, torch.tensor(0.5)).scale.tolist() == [0.5] * 37


@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (2, 40, 1030), (6, 33, 2051)])
def test_linear_equals_the_reference_bit_for_bit(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    data, colsum = torch.ops.qkernels.int8_pack(codes(n, k))
    for bias, activation in itertools.product((None, torch.randn(n)), ACTIVATIONS):
        args = (linear_input(m, k, dtype), data, colsum, torch.rand(n), bias, *activation, *plain(dtype))
        same(torch.ops.qkernels.int8_linear(*args), reference.int8_linear(*args))
        assert m == 0 or n == 0 or ran(kernel)


@pytest.mark.parametrize("m", [1, 7, 40])
def test_linear_is_the_scaled_matmul_of_quantized_rows(kernel: str, m: int) -> None:
    """Against torch's own arithmetic, spelled out here and not shared with the reference."""
    n, k = 70, 131
    x, q, scale, bias = torch.randn(m, k), codes(n, k, low=-127), torch.rand(n), torch.randn(n)
    packed = PackedInt8.from_quantized(q, scale)
    scale_x = x.abs().max(1, keepdim=True).values / 127
    codes_x = torch.clamp(torch.round(x * (1 / scale_x)), -128, 127)
    want = (codes_x.double() @ q.double().t()).float() * scale * scale_x + bias
    same(int8_linear(x, packed, bias), want)
    step, zero_point = torch.tensor(0.031), torch.tensor(11)
    codes_x = torch.clamp(torch.round(x * (1 / step)) + 11, -128, 127)
    want = ((codes_x.double() - 11) @ q.double().t()).float() * scale * step + bias
    same(int8_linear(x, packed, bias, input_scale=step, input_zero_point=zero_point), want)


def test_linear_rounds_halves_to_even(kernel: str) -> None:
    packed = PackedInt8.from_quantized(torch.eye(6, dtype=torch.int8), torch.ones(6))
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1000.0]])
    assert int8_linear(x, packed, input_scale=torch.ones(1)).tolist() == [[0, 2, 2, 0, -2, 127]]


def test_linear_nan_and_infinity(kernel: str) -> None:
    packed = PackedInt8.from_float(torch.randn(40, 20))
    x = torch.randn(5, 20)
    clean = x.clone()
    x[1, 3] = torch.nan
    x[3, 19] = torch.inf
    dynamic, static = int8_linear(x, packed), int8_linear(x, packed, input_scale=torch.tensor(0.02))
    assert dynamic.isnan().all(1).tolist() == [False, True, False, True, False]
    assert static.isnan().all(1).tolist() == [False, True, False, False, False]
    assert torch.equal(dynamic[::2], int8_linear(clean, packed)[::2])
    clean[3, 19] = 127 * 0.02
    assert torch.equal(static[3], int8_linear(clean, packed, input_scale=torch.tensor(0.02))[3])


@pytest.mark.parametrize(("scale", "nan"), [(0.0, False), (1e-42, False), (-1.0, True), (float("nan"), True)])
def test_linear_odd_input_scales(kernel: str, scale: float, nan: bool) -> None:
    packed = PackedInt8.from_float(torch.randn(4, 8))
    out = int8_linear(torch.randn(3, 8), packed, input_scale=torch.tensor(scale))
    assert out.isnan().all() if nan else out.isfinite().all()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (2, 0, 8), (0, 8)])
def test_linear_leading_dims(kernel: str, shape: tuple[int, ...]) -> None:
    packed, x = PackedInt8.from_float(torch.randn(5, 8)), torch.randn(shape)
    out = int8_linear(x, packed)
    assert out.shape == (*shape[:-1], 5)
    assert torch.equal(out.view(-1, 5), int8_linear(x.reshape(-1, 8), packed))
    strided = torch.randn(*shape[:-1], 16)[..., ::2]
    assert torch.equal(int8_linear(strided, packed), int8_linear(strided.contiguous(), packed))


def test_linear_in_several_passes() -> None:
    """More rows than one pass of scratch memory holds, and blocks of unequal height."""
    n, k, m = 33, 4096, 5000
    packed, x = PackedInt8.from_float(torch.randn(n, k)), torch.randn(m, k)
    out = int8_linear(x, packed)
    for rows in (slice(0, 3), slice(4000, 4100), slice(m - 1, m)):
        assert torch.equal(out[rows], int8_linear(x[rows], packed))
    a, b = codes(m, k), codes(n, k).t()
    assert torch.equal(int8_mm(a, b)[4000:4100], int8_mm(a[4000:4100], b))


LINEAR_ERRORS = [
    ({"x": torch.zeros(2, 8)}, r"x: got shape \[2, 8\]; accepted: \[\.\.\., 9\]"),
    ({"x": torch.zeros(())}, r"x: got shape \[\]; accepted: \[\.\.\., 9\]"),
    ({"x": torch.zeros(2, 9).double()}, "x: got torch.float64; accepted: torch.float32, torch.bfloat16, torch.float16"),
    ({"x": torch.zeros(2, 9).int()}, "x: got torch.int32"),
    ({"bias": torch.zeros(5)}, r"bias: got shape \[5\]; accepted: \[N\] with 6"),
    ({"input_scale": torch.ones(2)}, r"input_scale: got shape \[2\]; accepted: one element"),
    ({"input_scale": torch.ones(1).int()}, "input_scale: got torch.int32"),
    ({"input_zero_point": torch.tensor(1)}, "input_zero_point: got a tensor without input_scale"),
    ({"input_scale": torch.ones(1), "input_zero_point": torch.tensor(128)}, "input_zero_point: got 128; accepted"),
    ({"input_scale": torch.ones(1), "input_zero_point": torch.tensor(1.0)}, "input_zero_point: got torch.float32"),
    ({"input_scale": torch.ones(1), "input_zero_point": torch.zeros(2).int()}, r"input_zero_point: got shape \[2\]"),
    ({"quant_min": -129}, "quant_min, quant_max: got -129, 127; accepted: -128 <= quant_min < quant_max <= 127"),
    ({"quant_min": 5, "quant_max": 5, "input_scale": torch.ones(1)}, "quant_min, quant_max: got 5, 5"),
    ({"x": codes(2, 9)}, "input_scale: got None; accepted: the scale of the codes x"),
    ({"x": codes(2, 9), "input_scale": torch.ones(3)}, r"input_scale: got shape \[3\]; accepted: one element, \[2\]"),
    ({"x": codes(2, 9), "input_scale": torch.ones(2).int()}, "input_scale: got torch.int32"),
    (
        {"x": codes(2, 9), "input_scale": torch.ones(2), "input_zero_point": torch.zeros(1, 2).int()},
        r"input_zero_point: got shape \[1, 2\]",
    ),
    ({"activation": "tanh"}, "activation: got 'tanh'"),
    ({"out_dtype": torch.float64}, "out_dtype: got torch.float64"),
    ({"out_scale": torch.ones(1), "out_zero_point": torch.tensor(-129)}, "out_zero_point: got -129"),
]


@pytest.mark.parametrize(("change", "message"), LINEAR_ERRORS)
def test_linear_errors(kernel: str, change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 9), "packed": PackedInt8.from_float(torch.randn(6, 9))} | change
    with pytest.raises(RuntimeError, match=message):
        int8_linear(**arguments)


def test_raw_linear_errors(kernel: str) -> None:
    x, data, colsum, scale, *rest = sample_args("int8_linear")
    op = torch.ops.qkernels.int8_linear
    for args, message in (
        (
            (x[..., :4], data, colsum, scale),
            r"data: got shape \[1, 3, 32, 4\]; accepted: what int8_pack gives for N = 6",
        ),
        ((x, data.int(), colsum, scale), "data: got torch.int32"),
        ((x, data.transpose(1, 2).contiguous().transpose(1, 2), colsum, scale), "data: got strided memory"),
        ((x, data, colsum.long(), scale), "colsum: got torch.int64; accepted: contiguous torch.int32"),
        ((x, data, colsum, scale[:5]), r"scale: got shape \[5\]; accepted: \[N\] with 6"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args, *rest)
    with pytest.raises(RuntimeError, match=r"data: got shape \[1, 3, 32, 4\]"):
        torch.ops.qkernels.int8_unpack(data, 33, 9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_packing_refuses_weights_that_are_not_finite(bad: float) -> None:
    w = torch.randn(3, 4)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="w: got NaN or infinite values; accepted: finite weights"):
        PackedInt8.from_float(w)


def test_packing_errors() -> None:
    with pytest.raises(ValueError, match=r"w: got torch.int8 of shape \[3, 4\]; accepted: floating \[N, K\]"):
        PackedInt8.from_float(codes(3, 4))
    with pytest.raises(ValueError, match=r"w: got torch.float32 of shape \[3\]"):
        PackedInt8.from_float(torch.zeros(3))
    with pytest.raises(ValueError, match=r"scale: got shape \[4\]; accepted: one element, \[3\] or \[3, 1\]"):
        PackedInt8.from_quantized(codes(3, 4), torch.ones(4))
    with pytest.raises(RuntimeError, match=r"w: got torch.float32; accepted: torch.int8"):
        PackedInt8.from_quantized(torch.zeros(3, 4), torch.ones(3))
