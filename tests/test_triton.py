"""Triton kernels on the full list of cases, bit for bit against the reference: on the GPU, or interpreted without one.

The interpreter takes about 4 ms for each block, so that blocks are made as large here as leave a few to each tensor.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, channels_last, scale_of
from conftest import kernels_of
from test_fake_quantize import op_samples, same
from torch import Tensor

import qkernels as qk
from qkernels.ops import dynamic
from qkernels.ops import fake_quantize as ops
from qkernels.ops import fake_quantize_learnable as learnable
from qkernels.ops import observe_fake_quantize as observe_ops
from qkernels.ops import quantize as quantize_ops
from qkernels.reference import dynamic as dynamic_reference
from qkernels.reference import fake_quantize as reference
from qkernels.reference import fake_quantize_learnable as learnable_reference
from qkernels.reference import observe_fake_quantize as observe_reference
from qkernels.reference import quantize as reference_quantize

pytestmark = pytest.mark.skipif(
    "triton" not in kernels_of("fake_quantize_forward"), reason=str(dict(qk.which("fake_quantize_forward"))["triton"])
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sizes at which the interpreter takes its time get two of the four dtypes.
LARGE = {"short runs", "few channels last", "many channels last", "long rows"}
CASES = [
    (name, shape, dtype)
    for name, shape in GRANULARITIES
    for dtype in FLOATS
    if name not in LARGE or dtype in (torch.float32, torch.bfloat16)
]
BITS = {8: (-128, 127), 4: (-8, 7), 2: (-2, 1)}


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkernels.triton.common import configs

    def third(numel: int) -> int:
        return max(64, configs.power_of_two(numel // 3))

    def cut(granularity: configs.Granularity, numel: int) -> configs.Cut:
        monkeypatch.setattr(configs, "TILE_SIZE", third(numel))
        return configs_cut(granularity, numel)

    configs_cut = configs.cut.__wrapped__
    if DEVICE.type == "cpu":
        monkeypatch.setattr(configs, "block", lambda _, numel: third(numel))
        monkeypatch.setattr(configs, "cut", cut)


def moved(arg):
    """An argument on the device under test, in the same memory layout."""
    return arg.to(DEVICE) if isinstance(arg, Tensor) else arg


def on_triton(op, *args):
    """The op's results from Triton, on the CPU."""
    with qk.use_kernel("triton"):
        results = op(*map(moved, args))
    return results.cpu() if isinstance(results, Tensor) else [result.cpu() for result in results]


def zero_points(shape: tuple[int, ...]) -> list[Tensor | None]:
    return [None, torch.randint(-8, 8, shape, dtype=torch.int32), torch.randn(shape) * 6, torch.tensor([-8])]


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES, ids=str)
def test_pointwise(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward, mask, dx and codes: every granularity, layout and dtype; one kind of zero point each, in turn."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    turn = CASES.index((name, shape, dtype))
    kinds = zero_points(shape) if x.numel() < 1000 else [zero_points(shape)[turn % 4]]
    for zero_point in kinds:
        args = (scale, zero_point, -8, 7)
        same(on_triton(ops._forward, x, *args), reference.fake_quantize_forward(x, *args))
        for lsq in (False, True) if x.numel() < 1000 else (turn % 2 == 0,):
            y, mask = reference.fake_quantize_forward_mask(x, *args, lsq)
            for got, expected in zip(on_triton(ops._forward_mask, x, *args, lsq), (y, mask), strict=True):
                same(got, expected)
            dx = reference.fake_quantize_backward(grad, x, *args, lsq)
            same(on_triton(ops._backward, grad, x, *args, lsq), dx)
            same(on_triton(ops.backward_mask, torch.empty_like(y).copy_(grad), mask), torch.empty_like(y).copy_(dx))
        code = (torch.int8, torch.int32)[turn % 2]
        q = reference_quantize.quantize(x, *args, code)
        same(on_triton(quantize_ops._quantize, x, *args, code), q)
        out = FLOATS[turn // 2 % 4]
        back = reference_quantize.dequantize(q, scale, zero_point, out)
        same(on_triton(quantize_ops.dequantize_op, q, scale, zero_point, out), back)


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES, ids=str)
def test_learnable_backward(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """dx bit for bit; the sums within fp32 rounding of fp64."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    turn = CASES.index((name, shape, dtype))
    kinds = zero_points(shape) if x.numel() < 1000 else [zero_points(shape)[turn % 4]]
    for number, zero_point in enumerate(kinds):
        lsq = (turn + number) % 2 == 0
        args = (grad, x, scale, zero_point, -8, 7, 0.3, lsq)
        dx, *sums = on_triton(learnable.learnable_backward, *args)
        same(dx, reference.fake_quantize_backward(*args[:-2], lsq))
        exact_sums = learnable_reference.fake_quantize_learnable_backward(*args)[1:]
        magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
        for got, exact in zip(sums, exact_sums, strict=True):
            assert got.shape == exact.shape
            assert got.dtype == exact.dtype
            if name == "special values":
                assert torch.equal(got.isnan(), exact.isnan())
            else:
                error = (got - exact).double().abs()
                assert (error <= magnitude * 2**-20 + 1e-12).all(), (error / magnitude).max()


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("zero_dtype", [torch.int8, torch.uint8, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_parameter_dtypes(scale_dtype: torch.dtype, zero_dtype: torch.dtype) -> None:
    x, scale = torch.randn(6, 40), (torch.rand(6, 1) * 0.3 + 0.01).to(scale_dtype)
    zero_point = (torch.rand(6, 1) * 7).to(zero_dtype)
    args = (x, scale, zero_point, -8, 7)
    same(on_triton(ops._forward, *args), reference.fake_quantize_forward(*args))
    dscale = on_triton(learnable.learnable_backward, torch.ones_like(x), *args, 1.0)[1]
    expected = learnable_reference.fake_quantize_learnable_backward(torch.ones_like(x), *args, 1.0)[1]
    torch.testing.assert_close(dscale, expected, rtol=torch.finfo(scale_dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unusual_scales(dtype: torch.dtype) -> None:
    """Denormal, zero, infinite, negative and NaN scales; NaN and infinite zero points; ties and infinities."""
    x = INPUTS["special values"][0](dtype)[None]
    scale = torch.tensor([1e-40, 0.0, -0.0, math.inf, -1.0, -1e-40, math.nan, 3e38, 1.1754943508222875e-38, 1.0])[
        :, None
    ]
    x = x.expand(10, -1).contiguous()
    for zero_point in (None, torch.tensor([math.nan, math.inf, -math.inf, 0.5, 1.5, 9, -9, 2.5, -2.5, 3])[:, None]):
        args = (x, scale, zero_point, -8, 7)
        for got, expected in zip(
            on_triton(ops._forward_mask, *args), reference.fake_quantize_forward_mask(*args), strict=True
        ):
            same(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic(dtype: torch.dtype, symmetric: bool) -> None:
    base = (torch.randn(6, 64) * 3).to(dtype)
    bad = base.clone()
    bad[1, 3], bad[2, 1], bad[3], bad[4] = math.nan, math.inf, 0, 1e-41
    bad[5, 7] = -math.nan
    inputs = [base, bad, base.t(), base[:, ::2], channels_last(torch.randn(2, 8, 4, 4).to(dtype))]
    inputs += [torch.empty(0, 8, dtype=dtype), torch.empty(3, 0, dtype=dtype), torch.randn(777).to(dtype)]
    inputs += [torch.randn(3, 13).to(dtype), torch.randn(2, 40000).to(dtype), torch.tensor(1.7, dtype=dtype)]
    for number, x in enumerate(inputs):
        for group in (-1, 0, 2, 16):
            if (group > 0 and (x.dim() == 0 or x.shape[-1] % group)) or (group == -1 and x.dim() == 0):
                continue
            limits = BITS[(8, 4, 2)[number % 3]] if number % 5 else (0, 255)
            args = (x, group, *limits, symmetric)
            for got, expected in zip(
                on_triton(dynamic._dynamic_forward, *args),
                dynamic_reference.fake_quantize_dynamic_forward(*args),
                strict=True,
            ):
                same(got, expected)
            if limits != (0, 255):
                for got, expected in zip(
                    on_triton(dynamic.quantize_dynamic_op, *args),
                    dynamic_reference.quantize_dynamic(*args),
                    strict=True,
                ):
                    same(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 5, 1, 1), (1, 5, 4, 1), (1, 1, 1, 7)])
@pytest.mark.parametrize("steps", [0.0, 127.0, 127.5])
def test_observe(dtype: torch.dtype, shape: tuple[int, ...], steps: float) -> None:
    batches = [torch.randn(3, 5, 8, 7), channels_last(torch.randn(20, 5, 8, 7)), torch.randn(2, 5, 8, 7) + 9]
    batches += [batches[0] * math.nan, torch.empty(0, 5, 8, 7), torch.full((2, 5, 8, 7), math.inf), batches[0]]
    flags = [(1, 1), (1, 1), (0, 1), (1, 1), (1, 1), (1, 1), (1, 0)]
    stats = [torch.full(shape, math.inf), torch.full(shape, -math.inf), torch.ones(shape)]
    stats.append(torch.zeros(shape, dtype=torch.int64))
    ours = [moved(stat.clone()) for stat in stats]
    for batch, (observe, fake) in zip(batches, flags, strict=True):
        head = (batch.to(dtype), torch.tensor([observe]), torch.tensor([fake], dtype=torch.uint8))
        rest = (0.1, -128, 127, steps, 1)
        got = on_triton(observe_ops._observe, *head, *ours, *rest)
        for a, b in zip(got, observe_reference.observe_fake_quantize(*head, *stats, *rest), strict=True):
            same(a, b)
        for a, b in zip(ours, stats, strict=True):
            same(a.cpu(), b)


def test_every_op_by_its_samples() -> None:
    """Everything that opcheck is given elsewhere, the overloads that take numbers among it."""
    for op, args in op_samples():
        if "triton" not in kernels_of(op):
            continue
        packet, _, overload = op.partition(".")
        raw = getattr(getattr(torch.ops.qkernels, packet), overload or "default")
        copies = [
            [arg.clone() if isinstance(arg, Tensor) and arg.is_contiguous() else arg for arg in args] for _ in "ab"
        ]
        got = on_triton(raw, *copies[0])
        with qk.use_kernel("reference"):
            expected = raw(*copies[1])
        if op == "fake_quantize_learnable_backward":
            same(got[0], expected[0])
            torch.testing.assert_close(got[1:], list(expected[1:]), rtol=1e-5, atol=1e-5)
        else:
            pairs = [(got, expected)] if isinstance(got, Tensor) else zip(got, expected, strict=True)
            for a, b in pairs:
                same(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers(dtype: torch.dtype) -> None:
    x, grad = (torch.randn(300) * 3).to(dtype), torch.randn(300).to(dtype)
    params = (0.1, 2, -8, 7)
    with qk.use_kernel("reference"):
        expected = [ops._forward_scalar(x, *params), *ops._forward_mask_scalar(x, *params)]
        expected.append(ops._backward_scalar(grad, x, *params))
    got = [on_triton(ops._forward_scalar, x, *params), *on_triton(ops._forward_mask_scalar, x, *params)]
    got.append(on_triton(ops._backward_scalar, grad, x, *params))
    for a, b in zip(got, expected, strict=True):
        same(a, b)


def test_gradients_through_the_public_function() -> None:
    x = torch.randn(6, 40, device=DEVICE)
    for shape in ((1,), (6, 1), (1, 40)):
        leaves = [x.clone().requires_grad_(), torch.rand(shape, device=DEVICE).add_(0.05).requires_grad_()]
        leaves.append(torch.randn(shape, device=DEVICE).requires_grad_())
        quantize = partial(qk.fake_quantize, quant_min=-8, quant_max=7, grad_factor=0.25)
        with qk.use_kernel("triton"):
            got = torch.autograd.grad(quantize(*leaves).square().sum(), leaves)
        with qk.use_kernel("reference"):
            expected = torch.autograd.grad(quantize(*leaves).square().sum(), leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scales_of_too_many_factors_are_refused_with_a_reason() -> None:
    x, scale = torch.randn(4, 4, 4, 4), torch.rand(2, 2, 2, 2)
    reason = dict(qk.which("fake_quantize_forward", moved(x), moved(scale), None, -8, 7))["triton"]
    assert reason == "takes scales of at most six factors in memory order, got [2, 2, 2, 2] for [4, 4, 4, 4]"
