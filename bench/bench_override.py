"""override_torch: torch.ao's modules and whole training steps with and without it."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable

import mobilenet
import pytest
import torch
import torch.ao.quantization as tq
from laps import figures, interleaved, seconds_of
from torch import Tensor

import qkernels as qk

SIZE = 32
# glibc may return memory to the kernel after a step, and the next one pays for every page again. Run also with
# MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_MAX_=0, which keeps it as the allocators of torch's tuning guide do.
MEMORY = ", memory kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else ""


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
