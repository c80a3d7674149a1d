"""Fake quantization against torch's own ops, relu (the floor), and the formula in eager torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
from laps import Call, forward_backward
from operands import INT8, Compare, as_granularity, dtypes, granularities, operands
from torch import Tensor

import qkernels as qk
from qkernels.reference import fake_quantize as reference


def ours(x: Tensor, scale: Tensor, zero_point: Tensor) -> Call:
    scale, zero_point = as_granularity(scale), as_granularity(zero_point)
    return lambda: qk.fake_quantize(x, scale, zero_point, quant_min=-128, quant_max=127)


def drop_in(x: Tensor, scale: Tensor, zero_point: Tensor) -> Call:
    if scale.numel() == 1:
        return lambda: qk.fake_quantize_per_tensor_affine(x, scale, zero_point, *INT8)
    return lambda: qk.fake_quantize_per_channel_affine(x, scale, zero_point, 0, *INT8)


def torchs(x: Tensor, scale: Tensor, zero_point: Tensor) -> Call:
    if scale.numel() == 1:
        return lambda: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *INT8)
    return lambda: torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, *INT8)


@granularities
@dtypes
def test_forward(compare: Compare, dtype: torch.dtype, per_channel: bool) -> None:
    x, scale, zero_point = operands(256, 1024, per_channel, dtype)
    expected = reference.fake_quantize_forward(x, as_granularity(scale), None, *INT8)
    with torch.no_grad():
        torch_call = peers.find("torch", lambda: torchs(x, scale, zero_point))
        compare(ours(x, scale, zero_point), {"torch": torch_call}, expected)


@granularities
@dtypes
def test_forward_against_relu(compare: Compare, dtype: torch.dtype, per_channel: bool) -> None:
    """relu is the floor, not a peer that gives the same: its ratio is below 1 where it is faster."""
    x, scale, zero_point = operands(256, 1024, per_channel, dtype)
    expected = reference.fake_quantize_forward(x, as_granularity(scale), None, *INT8)
    with torch.no_grad():
        compare(ours(x, scale, zero_point), {"relu": lambda: torch.relu(x)}, expected, peer_tolerance=10)


@granularities
@dtypes
def test_forward_backward(compare: Compare, dtype: torch.dtype, per_channel: bool) -> None:
    x, scale, zero_point = operands(256, 1024, per_channel, dtype)
    x.requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    spread = as_granularity(scale)
    expected = (
        reference.fake_quantize_forward(x.detach(), spread, None, *INT8),
        reference.fake_quantize_backward(grad, x.detach(), spread, None, *INT8),
    )
    candidate, peer = (forward_backward(function(x, scale, zero_point), [x], grad) for function in (ours, torchs))
    compare(candidate, {"torch": peer}, expected)


@dtypes
def test_forward_backward_against_relu(compare: Compare, dtype: torch.dtype) -> None:
    """The floor again: what autograd costs with the cheapest of ops."""
    x, scale, zero_point = operands(256, 1024, False, dtype)
    x.requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    expected = (
        reference.fake_quantize_forward(x.detach(), scale, None, *INT8),
        reference.fake_quantize_backward(grad, x.detach(), scale, None, *INT8),
    )
    candidate = forward_backward(ours(x, scale, zero_point), [x], grad)
    relu = forward_backward(lambda: torch.relu(x), [x], grad)
    compare(candidate, {"relu": relu}, expected, peer_tolerance=10)


@granularities
@pytest.mark.parametrize("backward", [False, True], ids=["no-grad", "forward-backward"])
def test_call_overhead(compare: Compare, backward: bool, per_channel: bool) -> None:
    """8 elements: what a call costs beside its work."""
    x, scale, zero_point = operands(2, 4, per_channel, torch.float32)
    expected = reference.fake_quantize_forward(x, as_granularity(scale), None, *INT8)
    grad = torch.ones_like(x)
    dx = reference.fake_quantize_backward(grad, x, as_granularity(scale), None, *INT8)
    x.requires_grad_(backward)
    calls = [function(x, scale, zero_point) for function in (ours, drop_in, torchs)]
    if backward:
        calls = [forward_backward(call, [x], grad) for call in calls]
    compare(calls[0], {"drop-in": calls[1], "torch": calls[2]}, (expected, dx) if backward else expected)


@pytest.mark.parametrize("backward", [False, True], ids=["no-grad", "forward-backward"])
def test_call_overhead_of_numbers(compare: Compare, backward: bool) -> None:
    """The overload whose scale and zero point are numbers."""
    x = torch.randn(8, requires_grad=backward)
    grad, spread = torch.ones_like(x), torch.tensor([0.02])
    expected = reference.fake_quantize_forward(x.detach(), spread, None, *INT8)
    calls = [
        lambda: qk.fake_quantize_per_tensor_affine(x, 0.02, 0, *INT8),
        lambda: torch.fake_quantize_per_tensor_affine(x, 0.02, 0, *INT8),
    ]
    if backward:
        expected = expected, reference.fake_quantize_backward(grad, x.detach(), spread, None, *INT8)
        calls = [forward_backward(call, [x], grad) for call in calls]
    compare(calls[0], {"torch": calls[1]}, expected)


def bytes_saved(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, beside what the caller holds anyway."""
    held = {x.untyped_storage().data_ptr()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(saved.values())


@pytest.mark.parametrize("kept", [True, False], ids=["x-kept", "x-not-kept"])
def test_bytes_saved(report: Callable[..., None], kept: bool) -> None:
    """Per element, for x that lives anyway (a weight, a relu's output) and for x that nobody keeps."""
    leaf = torch.randn(1024, 1024, requires_grad=True)
    x = leaf if kept else leaf + 1  # an addition keeps nothing
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "qkernels": lambda t: qk.fake_quantize_per_tensor_affine(t, 0.02, 0, *INT8),
        "torch": lambda t: torch.fake_quantize_per_tensor_affine(t, 0.02, 0, *INT8),
        "eager LSQ": lambda t: peers.lsq(t, torch.tensor([0.02]), *INT8),
    }
    figures = {name: bytes_saved(function, x) / x.numel() for name, function in functions.items()}
    if not kept:
        assert figures["qkernels"] <= 1 / 8
    report(f"bytes saved per element, {'x kept anyway' if kept else 'x not kept'}", **figures)
