"""override_torch: torch's own calls with and without it, op by op, module by module, and whole training steps."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import mobilenet
import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor

import qkernels as qk

INT8 = (-128, 127)
SIZE = 32
# glibc may return memory to the kernel after a step, and the next one pays for every page again. Run also with
# MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_MAX_=0, which keeps it as the allocators of torch's tuning guide do.
MEMORY = ", memory kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else ""
Call = Callable[[], Any]


def results(call: Call) -> list[Tensor]:
    value = call()
    return [value.detach()] if isinstance(value, Tensor) else [t.detach() for t in value]


def check(call: Call, want: list[Tensor]) -> None:
    """Never time a wrong kernel: what the call gives inside the override must be what is wanted."""
    with qk.override_torch():
        for got, expected in zip(results(call), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def seconds_of(call: Call, budget: float, least: int) -> list[float]:
    laps: list[float] = []
    end = time.perf_counter() + budget
    while len(laps) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        laps.append(time.perf_counter() - start)
    return laps


def interleaved(call: Call, *, blocks: int = 4, budget: float = 0.1, least: int = 3) -> dict[str, float]:
    """Median milliseconds of the call without and with the override, in alternating blocks after one of each."""
    laps: dict[str, list[float]] = {"torch": [], "override": []}
    for block in range(blocks + 1):
        for name in laps:
            handle = qk.override_torch() if name == "override" else None
            measured = seconds_of(call, budget if block else 0, least if block else 1)
            if handle is not None:
                handle.restore()
            laps[name] += measured if block else []
    return {name: 1e3 * statistics.median(values) for name, values in laps.items()}


def figures(times: dict[str, float]) -> dict[str, float]:
    return {
        "torch ms": round(times["torch"], 4),
        "override ms": round(times["override"], 4),
        "times faster": round(times["torch"] / times["override"], 2),
    }


def with_gradient(fn: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Call:
    def call() -> tuple[Tensor, ...]:
        y = fn(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    return call


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
    call = with_gradient(fn, [leaf.requires_grad_() for leaf in leaves], grad)
    want = results(call)
    if name == "fused observer":  # torch's trains with another scale and zero point than it converts with
        with qk.use_kernel("reference"):
            want = results(with_gradient(observed, leaves, grad))
    check(call, want)
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


MODULES = {
    "FakeQuantize": lambda: tq.FakeQuantize(
        tq.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8, qscheme=torch.per_tensor_affine
    ),
    "FusedMovingAvgObsFakeQuantize": lambda: tq.FusedMovingAvgObsFakeQuantize(
        tq.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8, qscheme=torch.per_tensor_affine
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_module(report: Callable[..., None], kind: str) -> None:
    """torch.ao's modules on a 16×96×16×16 activation, forward and backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = MODULES[kind]()
    x, grad = torch.randn(16, 96, 16, 16, requires_grad=True), torch.randn(16, 96, 16, 16)

    def call() -> tuple[Tensor, ...]:
        y = module(x)
        return y, *torch.autograd.grad(y, x, grad)

    call()
    report(f"{kind}, 16×96×16×16{MEMORY}", **figures(interleaved(call)))


@pytest.mark.parametrize(("width", "batch"), [(1.0, 16), (0.5, 16), (1.0, 4)])
@pytest.mark.parametrize("name", mobilenet.QCONFIGS)
def test_training(report: Callable[..., None], name: str, width: float, batch: int) -> None:
    """A MobileNetV2-like network on images of 32×32: a whole step, and the quantizers of a step alone.

    With 4 images most activations fit the cache, with 16 they stream from memory; half the width quarters the matmuls.

    The quantizers' floor is relu on the same tensors, forward and backward; their observers alone stay torch's.
    """
    losses = {}
    for way in ("torch", "override"):
        step = mobilenet.Training(mobilenet.prepared(mobilenet.QCONFIGS[name](), 0.25), 4, SIZE)
        handle = qk.override_torch() if way == "override" else None
        losses[way] = torch.stack([step() for _ in range(5)])
        if handle is not None:
            handle.restore()
    if name == "fbgemm, version 0":
        assert torch.equal(losses["torch"], losses["override"])
    torch.testing.assert_close(losses["override"], losses["torch"], rtol=0.05, atol=0.05)

    model = mobilenet.prepared(mobilenet.QCONFIGS[name](), width)
    step = mobilenet.Training(model, batch, SIZE)
    calls = mobilenet.recorded_calls(model, step)
    quantizers = mobilenet.Quantizers(calls)

    def relu() -> None:
        for (_, x), dy in zip(calls, quantizers.grads, strict=True):
            y = torch.relu(x)
            if x.requires_grad:
                torch.autograd.grad(y, x, dy)

    whole, alone = (interleaved(call, blocks=2, budget=0, least=1) for call in (step, quantizers))
    case = f"{name}, width {width}, batch {batch}{MEMORY}"
    report(f"step, {case}", **figures(whole))
    floor = 1e3 * statistics.median(seconds_of(relu, 0, 3))
    share = alone["torch"] / whole["torch"]
    shares = {"relu ms": round(floor, 2), "share of torch's step": round(share, 3)}
    report(f"quantizers of a step, {case}", **figures(alone), **shares)
