"""torch's signatures: equal to torch's ops where those are right, and right where they are not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.ao.quantization as tq
from cases import FLOATS, INPUTS, channels_last
from compare import same
from conftest import kernels_of
from gradients import straight_through

import qkernels as qk
from qkernels import checks
from qkernels.reference import aten_fake_quantize as reference
from qkernels.reference import fake_quantize_learnable as learnable_reference

pytestmark = pytest.mark.sanitized


def test_fault_learnable_gradient_with_negative_zero_point() -> None:
    """torch's learnable per-tensor backward truncates zp + 0.5: wrong for every negative zero point."""
    x = (torch.randn(1000, dtype=torch.float64)).requires_grad_()
    for zp in (-1.0, -2.0, -3.0, 2.5):
        scale = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
        zero_point = torch.tensor([zp], dtype=torch.float64, requires_grad=True)
        want = torch.autograd.grad(straight_through(x, scale, zero_point, -8, 7).sum(), (x, scale, zero_point))
        params = [t.detach().float().requires_grad_() for t in (x, scale, zero_point)]
        y = qk.fake_quantize_learnable_per_tensor_affine(*params, -8, 7)
        for got, expected in zip(torch.autograd.grad(y.sum(), params), want, strict=True):
            torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-3)


def test_fault_per_channel_infinity() -> None:
    """torch's per-channel CPU op maps +inf and 2**63 steps to quant_min."""
    x = torch.tensor([[1e19, 1e30, math.inf, -1e19, -math.inf]])
    y = qk.fake_quantize_per_channel_affine(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, -128, 127)
    assert y.tolist() == [[127, 127, 127, -128, -128]]


@pytest.mark.parametrize("data", ["normal", "relu", "zero"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_fault_fused_observer_trains_with_what_convert_uses(data: str, symmetric: bool, per_row: bool) -> None:

    x = {"normal": torch.randn(6, 50), "relu": torch.randn(6, 50).relu() * 3, "zero": torch.zeros(6, 50)}[data]
    scheme = getattr(torch, f"per_{'channel' if per_row else 'tensor'}_{'symmetric' if symmetric else 'affine'}")
    observer_type = tq.MovingAveragePerChannelMinMaxObserver if per_row else tq.MovingAverageMinMaxObserver
    observer = observer_type(dtype=torch.qint8, qscheme=scheme, averaging_constant=0.01, quant_min=-128, quant_max=127)
    size = 0 if per_row else 1
    stats = [torch.full((size,), math.inf), torch.full((size,), -math.inf), torch.ones(size)]
    stats.append(torch.zeros(size, dtype=torch.int32))
    one = torch.ones(1, dtype=torch.int64)
    for step in range(3):
        observer(x * (1 + step))
        y = qk.fused_moving_avg_obs_fake_quant(x, one, one, *stats, 0.01, -128, 127, 0, per_row, symmetric)
        if step == 0:
            scale, zero_point = observer.calculate_qparams()
            torch.testing.assert_close(stats[2], scale, rtol=0, atol=0)
            torch.testing.assert_close(stats[3].long(), zero_point.long(), rtol=0, atol=0)
            expected = (
                torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, -128, 127)
                if per_row
                else torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), -128, 127)
            )
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
        qk.fused_moving_avg_obs_fake_quant(x * (1 + step), one, one, *stats, 0.01, -128, 127, 0, per_row, symmetric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fault_dtypes_that_torch_rejects(dtype: torch.dtype) -> None:
    """int64 zero points per channel, bf16 scales, learnable fp16, half inputs to the fused observer."""
    x = torch.randn(4, 20).to(dtype)
    scale, zero_point = torch.full((4,), 0.125), torch.tensor([-3, 0, 2, 7])
    want = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, -8, 7)
    for zp in (zero_point, zero_point.short(), zero_point.to(torch.int8), zero_point.float(), zero_point.bfloat16()):
        for s in (scale, scale.bfloat16(), scale.half(), scale.double()):
            same(qk.fake_quantize_per_channel_affine(x, s, zp, 0, -8, 7), want)
            same(qk.fake_quantize_per_channel_affine(x, s, zp, -2, -8, 7), want)
    learned = [t.requires_grad_() for t in (x.clone(), scale.to(dtype), zero_point.to(dtype))]
    qk.fake_quantize_learnable_per_channel_affine(*learned, 0, -8, 7).sum().backward()
    reference_grads = learnable_reference.fake_quantize_learnable_backward(
        torch.ones(4, 20).double(), x.double(), scale.view(4, 1).double(), zero_point.view(4, 1).double(), -8, 7, 1.0
    )
    for leaf, exact in zip(learned, reference_grads, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact.reshape(leaf.shape), rtol=1e-2, atol=1e-3)
    stats = [torch.tensor([math.inf]), torch.tensor([-math.inf]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    one = torch.ones(1, dtype=torch.int64)
    y = qk.fused_moving_avg_obs_fake_quant(x, one, one, *stats, 0.01, -128, 127)
    assert y.dtype == dtype
    assert stats[0] == x.min().float()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_drop_ins_equal_torch(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, 8, 8).to(dtype).requires_grad_()
    grad = torch.randn(6, 5, 8, 8).to(dtype)
    scale, zero_point = torch.tensor([0.07]), torch.tensor([3], dtype=torch.int32)
    scales, zero_points = torch.rand(5) * 0.1 + 0.01, torch.randint(-8, 8, (5,), dtype=torch.int32)
    pairs = [
        ("fake_quantize_per_tensor_affine", (0.07, 3, -8, 7)),
        ("fake_quantize_per_tensor_affine", (scale, zero_point, -8, 7)),
        ("fake_quantize_per_channel_affine", (scales, zero_points, 1, -8, 7)),
    ]
    for name, args in pairs:
        for value in (x, channels_last(x.detach()).requires_grad_()):
            ours, theirs = getattr(qk, name)(value, *args), getattr(torch, name)(value, *args)
            # fp64 is computed in fp64 here and in fp32 by torch.
            rtol = 1e-6 if dtype == torch.float64 else 0
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
            grads = [torch.autograd.grad(out, value, grad)[0] for out in (ours, theirs)]
            torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("per_channel", [False, True])
def test_learnable_drop_ins_equal_torch_where_torch_is_right(per_channel: bool) -> None:
    x = torch.randn(6, 50)
    name = f"fake_quantize_learnable_per_{'channel' if per_channel else 'tensor'}_affine"
    n = 6 if per_channel else 1
    args = (0, -8, 7, 0.3) if per_channel else (-8, 7, 0.3)
    grads = []
    for fn in (getattr(qk, name), getattr(torch, "_" + name)):
        leaves = [x.clone().requires_grad_(), torch.full((n,), 0.11, requires_grad=True)]
        leaves.append(torch.full((n,), 2.0, requires_grad=True))
        y = fn(*leaves, *args)
        y.backward(torch.linspace(-1, 1, 300).reshape(6, 50))
        grads.append([y.detach(), *(leaf.grad for leaf in leaves)])
    same(grads[0][0], grads[1][0])
    for got, want in zip(grads[0][1:], grads[1][1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


X = torch.randn(4, 6)
BAD = {
    "axis": (
        lambda: qk.fake_quantize_per_channel_affine(X, torch.ones(4), torch.zeros(4), 2, -8, 7),
        "axis: got 2; accepted: -2 to 1",
    ),
    "channels": (
        lambda: qk.fake_quantize_per_channel_affine(X, torch.ones(5), torch.zeros(5), 0, -8, 7),
        r"got shape \[5\]; accepted: one value for each of x's 4 channels",
    ),
}


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward.channel"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()


# The ops behind it.


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_backward_bytes"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward_bytes(kernel: str, dtype: torch.dtype) -> None:
    for name in ("0-dim", "empty", "odd", "channels_last", "transposed", "sliced", "expanded", "misaligned"):
        grad = INPUTS[name][0](dtype)
        mask = torch.empty_like(grad, dtype=torch.bool).copy_(torch.rand(grad.shape) < 0.5)
        with qk.use_kernel(kernel):
            got = torch.ops.qkernels.fake_quantize_backward_bytes(grad, mask)
        assert torch.equal(got, torch.where(mask, grad, 0))
        assert got.stride() == reference.empty_gradient(grad, mask).stride()


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward.channel"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_channel_drop_in(kernel: str, dtype: torch.dtype) -> None:
    """As qk.fake_quantize with the parameters in the shape of that dim, forward and both ways back."""
    for name in ("odd", "image", "channels_last", "transposed", "sliced", "few channels last", "empty"):
        x = INPUTS[name][0](dtype)
        for axis in range(-1, x.dim()):
            n = x.size(axis)
            scale, zero_point = torch.rand(n) * 0.1 + 0.01, torch.randint(-8, 8, (n,)).to(torch.int32)
            for zp in (zero_point, zero_point.float() + 0.4):
                views = checks.channel_views(x, axis, scale, zp)
                for leaf in (x.clone().requires_grad_(), x.requires_grad_() * 1):
                    with qk.use_kernel(kernel):
                        y = qk.fake_quantize_per_channel_affine(leaf, scale, zp, axis, -8, 7)
                        (dx,) = torch.autograd.grad(y.square().sum(), leaf)
                        same(y.detach(), qk.fake_quantize_per_channel_affine(leaf.detach(), scale, zp, axis, -8, 7))
                    want = qk.fake_quantize(leaf, *views, quant_min=-8, quant_max=7)
                    torch.testing.assert_close(y, want, rtol=0, atol=0)
                    (dx_want,) = torch.autograd.grad(want.square().sum(), leaf)
                    torch.testing.assert_close(dx, dx_want, rtol=0, atol=0)
                x = x.detach()


def test_channel_drop_in_second_derivative() -> None:
    for leaf in (True, False):
        x = torch.randn(6, 20, requires_grad=True)
        y = qk.fake_quantize_per_channel_affine(x if leaf else x * 1, torch.full((6,), 0.1), torch.ones(6), 0, -8, 7)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert torch.equal(second, torch.where((first != 0) | (y == 0), 2.0, 0.0))


def test_drop_ins_keep_torchs_convention() -> None:
    x, scale = torch.tensor([[1.2, 1.0, -2.4]], requires_grad=True), torch.ones(1, requires_grad=True)
    ours = qk.fake_quantize_learnable_per_tensor_affine(x, scale, torch.zeros(1), -2, 1, 1.0)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.zeros(1), -2, 1, 1.0)
    grad = torch.tensor([[1.0, 2, 4]])
    for a, b in zip(*(torch.autograd.grad(y, (x, scale), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
