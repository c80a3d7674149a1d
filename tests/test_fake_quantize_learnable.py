"""Learned scales and zero points: sums of every kernel against the reference, gradients against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of, zero_points
from compare import same
from conftest import kernels_of
from gradients import straight_through

import qkernels as qk
from qkernels.ops import fake_quantize_learnable as learnable
from qkernels.reference import fake_quantize as reference
from qkernels.reference import fake_quantize_learnable as learnable_reference

pytestmark = pytest.mark.sanitized

COMPILED = [name for name in kernels_of("fake_quantize_forward") if name not in ("triton", "reference")]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lsq", [False, True], ids=["clip", "lsq"])
def test_sums_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype, lsq: bool) -> None:
    """dx bit for bit; the sums within fp32 rounding of fp64, and the same bits on every path and thread count."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    for zero_point in zero_points(shape):
        args = (x, scale, zero_point, -8, 7)
        # The terms as defined, in fp64.
        exact_sums = learnable_reference.fake_quantize_learnable_backward(grad, *args, 0.5, lsq)[1:]
        magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
        first = None
        for kernel in COMPILED:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with qk.use_kernel(kernel):
                    got = learnable.learnable_backward(grad, *args, 0.5, lsq)
                if first is None:
                    first = got
                    same(got[0], reference.fake_quantize_backward(grad, *args, lsq))
                for a, b in zip(got, first, strict=True):
                    same(a, b)
        # 2**-20: up to 256 fp32 additions in a lane, then fp64, of terms no larger than dy·16.
        for got_sum, exact in zip(first[1:], exact_sums, strict=True):
            assert got_sum.shape == scale.shape
            if x.numel() and "special" not in name:
                error = (got_sum - exact).double().abs()
                assert (error <= magnitude * 2**-20 + 1e-12).all(), (error / magnitude).max()


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"))
@pytest.mark.parametrize("shape", [(1,), (6, 1), (1, 40), (6, 5)])
def test_gradients_against_autograd_in_fp64(kernel: str, shape: tuple[int, ...]) -> None:
    x = (torch.randn(6, 40, dtype=torch.float64) * 2).requires_grad_()
    scale = (torch.rand(shape, dtype=torch.float64) * 0.2 + 0.1).requires_grad_()
    zero_point = (torch.randn(shape, dtype=torch.float64) * 2).requires_grad_()
    grad = torch.randn(6, 40, dtype=torch.float64)
    expanded = [reference.expand(p, x) for p in (scale, zero_point)]
    expected = torch.autograd.grad(straight_through(x, *expanded, -8, 7), (x, scale, zero_point), grad)
    with qk.use_kernel(kernel):
        y = qk.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)
        got = torch.autograd.grad(y, (x, scale, zero_point), grad)
        got_fp32 = torch.autograd.grad(
            qk.fake_quantize(x.float(), scale.float(), zero_point.float(), quant_min=-8, quant_max=7, grad_factor=0.25),
            (scale, zero_point),
            grad.float(),
        )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(got_fp32, expected[1:], strict=True):
        torch.testing.assert_close(a, b * 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"))
def test_scale_learned_alone_and_shared_zero_point(kernel: str) -> None:
    x = torch.randn(4, 32)
    scale = torch.full((4, 1), 0.1, requires_grad=True)
    zero_point = torch.zeros(1, requires_grad=True)
    with qk.use_kernel(kernel):
        qk.fake_quantize(x, scale, zero_point, quant_min=-4, quant_max=3).sum().backward()
    s, z = scale.detach().double().requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    straight_through(x.double(), s.expand(4, 32), z.expand(4, 32), -4, 3).sum().backward()
    torch.testing.assert_close(scale.grad, s.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zero_point.grad, z.grad.float(), rtol=1e-5, atol=1e-5)


def test_second_derivative_of_learned_scales_is_refused() -> None:
    x, scale = torch.randn(8, requires_grad=True), torch.tensor([0.1], requires_grad=True)
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(qk.fake_quantize(x, scale, quant_min=-8, quant_max=7).square().sum(), x)
    same(first.detach(), plain)
    with pytest.raises(RuntimeError, match="learned scales have no second derivative"):
        torch.autograd.grad(first.sum(), x)
