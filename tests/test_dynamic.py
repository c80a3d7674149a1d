"""Quantization by ranges of x itself: fake_quantize_dynamic and quantize_dynamic against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FLOATS, channels_last
from compare import same
from conftest import kernels_of
from gradients import saved_bytes

import qkernels as qk
from qkernels.ops import dynamic
from qkernels.reference import dynamic as dynamic_reference
from qkernels.reference import fake_quantize as reference

pytestmark = pytest.mark.sanitized


@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic"), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_equal_the_reference(kernel: str, dtype: torch.dtype, symmetric: bool) -> None:
    base = (torch.randn(6, 64) * 3).to(dtype)
    bad = base.clone()
    bad[1, 3], bad[2, 1], bad[3], bad[4] = math.nan, math.inf, 0, 1e-41
    inputs = [base, bad, base.t(), base[:, ::2], channels_last(torch.randn(2, 8, 4, 4).to(dtype))]
    inputs += [torch.empty(0, 8, dtype=dtype), torch.empty(3, 0, dtype=dtype), torch.randn(777).to(dtype)]
    for x in inputs:
        for bits in (8, 4, 2):
            for group in (-1, None, 2, 16):
                if group and group > 0 and x.shape[-1] % group:
                    continue
                expected = dynamic_reference.quantize_dynamic(
                    x, group or 0, *qk.ops.dynamic.range_of_bits(bits), symmetric
                )
                got = qk.quantize_dynamic(x, bits=bits, group_size=group, symmetric=symmetric)
                for a, b in zip(got, expected, strict=True):
                    same(a, b)


def test_error_of_codes_is_at_most_half_a_step() -> None:
    x = torch.randn(32, 128)
    for symmetric in (True, False):
        q, scale, zero_point = qk.quantize_dynamic(x, symmetric=symmetric)
        # An asymmetric zero point is rounded, which can move an end of the range by half a step more.
        bound = scale * (0.5001 if symmetric else 1.0001)
        assert ((qk.dequantize(q, scale, zero_point) - x).abs() <= bound).all()


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantize_equals_the_reference(kernel: str, dtype: torch.dtype, symmetric: bool) -> None:
    base = (torch.randn(6, 64) * 3).to(dtype)
    bad = base.clone()
    bad[1, 3], bad[2, 1], bad[3], bad[4] = math.nan, math.inf, 0, 1e-41
    inputs = [
        base,
        bad,
        base.t(),
        base[:, ::2],
        channels_last(torch.randn(2, 8, 4, 4).to(dtype)),
        torch.empty(0, 8, dtype=dtype),
        torch.empty(3, 0, dtype=dtype),
        (torch.rand(5, 37) + 1).to(dtype),
        (torch.randn(700) - 9).to(dtype),
    ]
    for x in inputs:
        for bits in (8, 4, 2):
            for group in (-1, 0, 2, 16, 32, 37):
                if group > 0 and x.shape[-1] % group:
                    continue
                args = (x, group, *qk.ops.dynamic.range_of_bits(bits), symmetric)
                expected = dynamic_reference.fake_quantize_dynamic_forward(*args)
                for got, want in zip(dynamic._dynamic_forward(*args), expected, strict=True):
                    same(got, want)


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"), indirect=True)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradient(kernel: str, bits: int) -> None:
    x = torch.randn(16, 64, requires_grad=True)
    grad = torch.randn(16, 64)
    y, scale, zero_point = qk.fake_quantize_dynamic(x, bits=bits, group_size=32, return_qparams=True)
    assert scale.shape == (16, 2)
    assert (zero_point == 0).all()
    amax = x.detach().reshape(16, 2, 32).abs().amax(-1)
    torch.testing.assert_close(scale, amax / (2 ** (bits - 1) - 1), rtol=0, atol=0)
    same(torch.autograd.grad(y, x, grad)[0], grad)
    y, scale, zero_point = qk.fake_quantize_dynamic(x * 1, bits=bits, symmetric=False, return_qparams=True)
    low, high = qk.ops.dynamic.range_of_bits(bits)
    inside = reference.inside_range(x.detach(), scale, zero_point, low, high)
    same(torch.autograd.grad(y, x, grad)[0], torch.where(inside, grad, 0))
    assert not scale.requires_grad


def test_fault_symmetric_int4_does_not_clip_the_maximum() -> None:
    """torchao's symmetric int4 clips the largest weight of a group and stops its gradient."""
    x = torch.randn(256, 128, requires_grad=True)
    y = qk.fake_quantize_dynamic(x, bits=4, group_size=32)
    groups, out = x.detach().reshape(-1, 32), y.detach().reshape(-1, 32)
    at = groups.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(out.gather(1, at), groups.gather(1, at), rtol=1e-6, atol=0)
    y.sum().backward()
    assert (x.grad == 1).all()


def test_fault_dead_channels() -> None:
    """Real networks hold all-zero channels: a dynamic scale must not turn them into NaN."""
    x = torch.randn(4, 64)
    x[2] = 0
    for symmetric in (True, False):
        y, scale, _ = qk.fake_quantize_dynamic(x, symmetric=symmetric, return_qparams=True)
        assert (y[2] == 0).all()
        assert (scale > 0).all()
        assert y.isfinite().all()


X = torch.randn(4, 6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck_of_codes(symmetric: bool) -> None:
    x = torch.randn(4, 6)
    args = (x, -1, -128, 127, True) if symmetric else (x.t(), 0, -8, 7, False)
    torch.library.opcheck(torch.ops.qkernels.quantize_dynamic.default, args)


def test_memory_saved_for_backward() -> None:
    activation = torch.randn(64, 1024, requires_grad=True) * 2
    assert saved_bytes(lambda: qk.fake_quantize_dynamic(activation)) == 0
    assert saved_bytes(lambda: qk.fake_quantize_dynamic(activation, symmetric=False)) == activation.numel() // 8


BAD = {
    "group_size": (lambda: qk.fake_quantize_dynamic(X, group_size=4), "group_size: got 4; accepted: -1"),
    "group_size 0": (lambda: qk.fake_quantize_dynamic(X, group_size=0), "group_size: got 0"),
    "group_size of codes": (lambda: qk.quantize_dynamic(X, group_size=5), "group_size: got 5"),
}


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        call()


def test_bits_out_of_range() -> None:
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits: got {bits}; accepted: 2 to 8"):
            qk.fake_quantize_dynamic(X, bits=bits)
