"""torch's fake-quantize ops with and without override_torch, and the drop-in functions."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laps import check, figures, forward_backward, interleaved, seconds_of
from operands import INT8
from torch import Tensor

import qkernels as qk


def ops(shape: tuple[int, ...]) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    x = torch.randn(shape)
    channels = shape[0]
    one, ones = torch.tensor([0.02]), torch.full((channels,), 0.02)
    zero, zeros = torch.zeros(1, dtype=torch.int32), torch.zeros(channels, dtype=torch.int32)
    on = torch.ones(1, dtype=torch.int64)
    stats = [torch.tensor([-1.0]), torch.tensor([1.0]), one.clone(), zero.clone()]
    learned = [x, one.clone(), zero.float()]
    learned_channels = [x, ones.clone(), zeros.float()]
    return {
        "numbers": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.02, 0, *INT8), [x]),
        "tensors": (lambda x: torch.fake_quantize_per_tensor_affine(x, one, zero, *INT8), [x]),
        "channels": (lambda x: torch.fake_quantize_per_channel_affine(x, ones, zeros, 0, *INT8), [x]),
        "learnable": (lambda *a: torch._fake_quantize_learnable_per_tensor_affine(*a, *INT8, 1.0), learned),
        "learnable channels": (
            lambda *a: torch._fake_quantize_learnable_per_channel_affine(*a, 0, *INT8, 1.0),
            learned_channels,
        ),
        "fused observer": (lambda x: torch.fused_moving_avg_obs_fake_quant(x, on, on, *stats, 0.0, *INT8, -1), [x]),
    }


def observed(x: Tensor) -> Tensor:
    on = torch.ones(1)
    stats = [torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    return qk.fused_moving_avg_obs_fake_quant(x, on, on, *stats, 0.0, *INT8)


@pytest.mark.parametrize("shape", [(2, 4), (256, 1024)], ids=["8", "256x1024"])
@pytest.mark.parametrize("name", list(ops((2, 4))))
def test_op(report: Callable[..., None], name: str, shape: tuple[int, ...]) -> None:
    """Forward alone, and with the gradients of all that is learned."""
    fn, leaves = ops(shape)[name]
    grad = torch.randn(shape)
    many = 200 if shape[0] == 2 else 1
    call = forward_backward(lambda: fn(*leaves), [leaf.requires_grad_() for leaf in leaves], grad)
    want = call()
    if name == "fused observer":  # torch's trains with another scale and zero point than it converts with
        with qk.use_kernel("reference"):
            want = forward_backward(lambda: observed(*leaves), leaves, grad)()
    with qk.override_torch():
        check(name, call(), want, 1e-4)
    with torch.no_grad():
        forward = interleaved(lambda: [fn(*leaves) for _ in range(many)], budget=0.05)
    both = interleaved(lambda: [call() for _ in range(many)], budget=0.05)
    for way, times in (("forward", forward), ("forward and backward", both)):
        per_call = {key: value / many for key, value in times.items()}
        report(f"{name}, {shape[0]}×{shape[1]}, {way}", **figures(per_call))


def test_channel_drop_in_overhead(report: Callable[..., None]) -> None:
    """qk.fake_quantize_per_channel_affine on 8 elements, against torch's op and the override's."""
    x, scale, zero_point = torch.randn(2, 4), torch.full((2,), 0.02), torch.zeros(2, dtype=torch.int32)
    for way in ("forward", "forward and backward"):
        x.requires_grad_(way != "forward")

        def timed(module: Any) -> float:
            def call() -> None:
                for _ in range(500):
                    y = module.fake_quantize_per_channel_affine(x, scale, zero_point, 0, *INT8)
                    if x.requires_grad:
                        torch.autograd.grad(y, x, y.detach())

            return statistics.median(seconds_of(call, 0.1, 5)) / 500

        rounds = [(timed(torch), timed(qk)) for _ in range(5)]
        theirs, ours = (statistics.median(values) for values in zip(*rounds, strict=True))
        report(
            f"drop-in per channel, 8 elements, {way}",
            **{"torch µs": round(1e6 * theirs, 2), "qkernels µs": round(1e6 * ours, 2)},
            **{"of torch's": round(ours / theirs, 2)},
        )
