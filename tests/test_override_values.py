"""override_torch: outputs and gradients of torch's ops bit for bit, but for the faults that torch has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import FLOATS, channels_last
from compare import same
from conftest import kernels_of
from overriding import AFFINE, A, both, gradients, inputs
from torch import Tensor

import qkernels as qk

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(qk.library.host is None, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("override_ends"),
]


NUMBERS = [(0.07, 3, -8, 7), (0.5, 1, -128, 127), (1.0, 0, 0, 255), (-0.1, 0, -8, 7), (0.003, -5, -(2**31), 2**31 - 1)]
KERNELS = [name for name in kernels_of("fake_quantize_forward") if name.startswith("cpu_")]
OLD_HALVES = torch.__version__ < (2, 12)  # of 108,000 bf16 elements with fp16 zero points 2 are a step away


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_per_tensor(kernel: str, dtype: torch.dtype) -> None:
    for x in inputs(dtype):
        for scale, zero_point, low, high in NUMBERS:

            def call(x: Tensor = x, s: float = scale, z: int = zero_point, low: int = low, high: int = high) -> Any:
                out = [*A.fake_quantize_per_tensor_affine_cachemask(x, s, z, low, high)]
                for dtypes in ((torch.float32, torch.int32), (torch.float64, torch.int64), (torch.half, torch.float32)):
                    params = torch.tensor([s], dtype=dtypes[0]), torch.tensor(z, dtype=dtypes[1])
                    for on in (1, 0):
                        flag = torch.tensor([on])
                        op = A._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
                        out += op(x, *params, flag, low, high)
                return out

            want = call()
            with qk.override_torch(), qk.use_kernel(kernel):
                same(call(), want)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_per_channel(kernel: str, dtype: torch.dtype) -> None:
    """Float zero points too, which torch adds before it rounds. +inf is not among the values: see the faults."""
    for x in inputs(dtype):
        for axis in range(x.dim()):
            channels = x.size(axis)
            if channels == 0 or bool(x.isinf().any()) or bool((x.double().abs() > 1e18).any()):
                continue
            for scale, zero_point, low, high in NUMBERS:
                scales = torch.arange(channels) % 50 * 0.013 + abs(scale)
                z = (torch.arange(channels) % 7 + (zero_point - 3 if low < 0 else 0)).int().clamp(low, high)
                for zp in (z, z.float(), torch.zeros(channels), z + 0.3, z.half()):

                    def call(args: tuple = (x, scales, zp, axis, low, high)) -> Any:
                        return A.fake_quantize_per_channel_affine_cachemask(*args)

                    want = call()
                    with qk.override_torch(), qk.use_kernel(kernel):
                        got = call()
                    if OLD_HALVES and (x.dtype, zp.dtype) == (torch.bfloat16, torch.float16):
                        elsewhere = got[0] != want[0]
                        step = scales.view(-1, *[1] * (x.dim() - 1 - axis)).expand_as(x)[elsewhere]
                        assert len(step) <= 2
                        assert ((got[0] - want[0])[elsewhere].abs() <= 1.01 * step).all()
                        got[0][elsewhere], got[1][elsewhere] = want[0][elsewhere], want[1][elsewhere]
                    same(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("zero_point", [0.0, 2.5, -1.4, 99.0])
def test_learnable_forward(dtype: torch.dtype, zero_point: float) -> None:
    for x in inputs(dtype):
        one = torch.tensor([0.07]), torch.tensor([zero_point])
        same(*both(lambda x=x, one=one: A._fake_quantize_learnable_per_tensor_affine(x, *one, -8, 7, 0.5)))
        for axis in range(x.dim()):
            n = x.size(axis)
            if n and not bool(x.isinf().any()) and not bool((x.double().abs() > 1e18).any()):
                params = torch.arange(n) * 0.01 + 0.05, torch.arange(n) * 0.7 - zero_point
                op = A._fake_quantize_learnable_per_channel_affine
                same(*both(lambda x=x, p=params, axis=axis, op=op: op(x, *p, axis, -8, 7, 0.5)))


@pytest.mark.parametrize("case", AFFINE)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient(case: str, dtype: torch.dtype) -> None:
    for make in (
        lambda: torch.randn(6, 37),
        lambda: torch.randn(0, 4),
        lambda: torch.randn(40, 6).t(),
        lambda: torch.randn(6, 70)[:, ::2],
        lambda: channels_last(torch.randn(2, 5, 8, 7)),
    ):
        x = make().to(dtype).requires_grad_()
        got, want = both(lambda x=x: gradients(AFFINE[case], [x]))
        same(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)  # a clipped element gives 0, torch's −0 among them
        assert not got[1][got[1] == 0].signbit().any()
        got, want = both(lambda x=x: torch.autograd.grad(AFFINE[case](x).sum(), x)[0])  # an expanded gradient
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("case", AFFINE)
def test_second_derivative(case: str) -> None:
    x = torch.randn(6, 20, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(AFFINE[case](x).square().sum(), x, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.sum(), x)

    got, want = both(call)
    assert want[1].any()
    same(got, want)


@pytest.mark.parametrize("zero_point", [2.0, 0.0])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_learnable_gradients(axis: int | None, zero_point: float) -> None:
    """Where torch is right: zero points that are whole and not negative, no ties."""
    n = 1 if axis is None else (6, 50)[axis]
    leaves = [torch.randn(6, 50), torch.full((n,), 0.11), torch.full((n,), zero_point)]
    for leaf in leaves:
        leaf.requires_grad_()
    name, rest = ("per_tensor", ()) if axis is None else ("per_channel", (axis,))
    op = getattr(torch, f"_fake_quantize_learnable_{name}_affine")
    got, want = both(lambda: gradients(lambda x, s, z: op(x, s, z, *rest, -8, 7, 0.3), leaves))
    same(got[0], want[0])
    for g, w in zip(got[1:], want[1:], strict=True):
        assert g.shape == w.shape
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_gradient_mask_errors() -> None:
    with qk.override_torch(), torch.no_grad():
        for mask in (torch.ones(4), torch.ones(3, dtype=torch.bool)):
            with pytest.raises(RuntimeError, match=r"mask: got .*; accepted: torch.bool of grad's shape \[4\]"):
                torch.ops.qkernels.fake_quantize_backward_bytes(torch.ones(4), mask)
            with pytest.raises(RuntimeError):
                A.fake_quantize_per_tensor_affine_cachemask_backward(torch.ones(4), mask)


def test_fault_nan_and_infinity() -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, -1e30, 1e19]])
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    calls = [
        lambda: A.fake_quantize_per_tensor_affine_cachemask(x, 1.0, 0, -8, 7),
        lambda: A._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(x, one, zero, one, -8, 7),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x, one, zero, 0, -8, 7),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x, one, zero + 0.0, 0, -8, 7),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x.double(), one, zero + 1.0, 0, -8, 8),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x, one, zero, 0, -(2**30), 2**30),
    ]
    for call in calls:
        (y, mask), (theirs, _) = both(call)
        assert not theirs[0, 0].isnan()
        assert y[0, 0].isnan()
        high, low = y[0, 1], y[0, 2]
        assert high > 6
        assert low < -6
        assert (y[0, 3:] == torch.stack([high, low, high])).all()
        assert not mask.any()


def test_fault_dead_channel() -> None:
    x = torch.tensor([[0.0, 0.0, 1.0]])
    zero = torch.zeros(1, dtype=torch.int32)
    for scale in (0.0, 1e-44):
        with qk.override_torch():
            y, mask = A.fake_quantize_per_channel_affine_cachemask(x, torch.tensor([scale]), zero, 0, -8, 7)
        assert (y[0, :2] == 0).all()
        assert mask[0, :2].all()
        assert y[0, 2] == 7 * torch.tensor(scale)


def test_fault_infinite_gradient_of_a_clipped_element() -> None:
    x = torch.tensor([100.0, 0.0], requires_grad=True)
    grad = torch.tensor([math.inf, 1.0])
    got, want = both(lambda: torch.autograd.grad(AFFINE["numbers"](x), x, grad)[0])
    assert want[0].isnan()
    assert got.tolist() == [0, 1]


@pytest.mark.parametrize("zero_point", [-1.0, -3.0, 2.5])
def test_fault_learnable_zero_point(zero_point: float) -> None:
    x = torch.randn(1000)

    def call() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), torch.tensor([0.1]).requires_grad_(), torch.tensor([zero_point])]
        leaves[2].requires_grad_()
        return gradients(lambda *a: torch._fake_quantize_learnable_per_tensor_affine(*a, -8, 7), leaves)

    got, theirs = both(call)
    args = torch.linspace(-1, 1, 1000), x, torch.tensor([0.1]), torch.tensor([zero_point]), -8, 7, 1.0
    right = qk.reference.fake_quantize_learnable.fake_quantize_learnable_backward(*args)
    assert (got[1] == right[0]).all()
    torch.testing.assert_close(got[2:], list(right[1:]), rtol=1e-5, atol=1e-5)
    assert (theirs[2] - right[1]).abs() > 1e-2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fault_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(4, 20).to(dtype).requires_grad_()
    scale, zero_point = torch.full((4,), 0.125), torch.tensor([-3, 0, 2, 7])
    want = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, -8, 7)
    one = torch.ones(1, dtype=torch.int64)
    stats = [torch.tensor([math.inf]), torch.tensor([-math.inf]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    with qk.override_torch():
        for zp in (zero_point, zero_point.short(), zero_point.to(torch.int8)):
            for s in (scale, scale.bfloat16(), scale.half(), scale.double()):
                same(torch.fake_quantize_per_channel_affine(x, s, zp, 0, -8, 7), want)
                same(torch.fake_quantize_per_channel_affine(x, s, zp, -2, -8, 7), want)
        for name, args in (("per_tensor", ()), ("per_channel", (0,))):
            n = 1 if name == "per_tensor" else 4
            learned = [torch.full((n,), 0.125, dtype=dtype), torch.zeros(n, dtype=dtype)]
            for leaf in learned:
                leaf.requires_grad_()
            y = getattr(torch, f"_fake_quantize_learnable_{name}_affine")(x, *learned, *args, -8, 7)
            y.sum().backward()
            assert all(leaf.grad.dtype == dtype and leaf.grad.isfinite().all() for leaf in learned)
        y = torch.fused_moving_avg_obs_fake_quant(x, one, one, *stats, 0.01, -128, 127, -1)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.dtype == dx.dtype == dtype
    assert stats[0] == x.min().float()
