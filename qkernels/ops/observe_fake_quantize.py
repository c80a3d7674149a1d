"""Observed fake quantization: ``observe_fake_quantize``, which updates moving averages of the range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .. import library, samples
from ..layouts import mask_like
from ..reference import observe_fake_quantize as reference
from ..reference import transforms
from .autograd import already_masked, transformed


def _observe_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    on = torch.ones(1, dtype=torch.int64)
    for shape in {(1,), (x.shape[0], *[1] * (x.dim() - 1)) if x.dim() else (1,)}:
        for symmetric in ((127.0, 1), (0.0, 0)):
            low, high = -torch.rand(shape), torch.rand(shape)
            zero_point = torch.zeros(shape, dtype=torch.int32)
            yield x, on, on, low, high, torch.ones(shape), zero_point, 0.1, *samples.INT8, *symmetric


_observe = library.define(
    "observe_fake_quantize",
    "(Tensor x, Tensor observer_on, Tensor fake_quant_on, Tensor(a!) running_min, Tensor(b!) running_max, "
    "Tensor(c!) scale, Tensor(d!) zero_point, float averaging_const, SymInt quant_min, SymInt quant_max, "
    "float symmetric_steps, SymInt symmetric_zero_point) -> (Tensor, Tensor)",
    reference.observe_fake_quantize,
    lambda x, *_: (torch.empty_like(x), mask_like(x)),
    cpu=("avx512", "avx2", "scalar"),
    cuda=True,
    triton=True,
    samples=_observe_samples,
)


def observe_fake_quantize(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> Tensor:
    """Updates moving-average statistics from x, then fake-quantizes x with them; no host synchronisation.

    The op changes the four statistics in place; they have one shape, which is the granularity (see ``fake_quantize``).
    A batch that is empty or whose range is not finite does not change them.

    Args:
        x: any shape; fp32, fp64, fp16 or bf16.
        observer_on, fake_quant_on: one-element tensors, read on the device: whether x moves the statistics, and whether
            the op quantizes x.
        running_min, running_max: fp32; infinite values mean "none yet".
        scale: fp32.
        zero_point: int32 or int64.
        averaging_const: the share of the new range: running += averaging_const·(new − running).
        quant_min, quant_max: inclusive integer range, within ±2**24.
        symmetric: whether the zero point is the middle of the range; a scale then never clips the observed extremes.

    Returns:
        A tensor of x's shape, dtype and memory layout, with x's values if fake_quant_on is 0. dx is dy where x was not
        clipped.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    steps = float((quant_max - quant_min) // 2) if symmetric else 0.0
    return observed(
        x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point,
        averaging_const, quant_min, quant_max, steps, (quant_min + quant_max + 1) // 2,
    )  # fmt: skip


def observed(x: Tensor, *args: Any) -> Tensor:
    """``observe_fake_quantize`` with the raw op's arguments, differentiable."""
    if transformed():
        return _observed_in_transforms(x, *args)
    y, mask = _observe(x.detach(), *args)
    if torch.is_grad_enabled() and x.requires_grad:
        return already_masked(x, y, mask)
    return y


def _observed_in_transforms(x: Tensor, *args: Any) -> Tensor:
    """Updates the statistics from the plain values, outside the transforms, one batch at a time."""
    _, fake_quant_on, _, _, scale, zero_point, _, quant_min, quant_max, *_ = args
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        _observe(*(_plain(t).detach() for t in (x, *args[:6])), *args[6:])
    return transforms.observe_fake_quantize(x, fake_quant_on, scale, zero_point, quant_min, quant_max)


def _plain(t: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            raise RuntimeError(
                "x: got a batch of vmap where moving averages are updated in place; accepted: other transforms, or "
                "vmap with the observer off the path (eval mode, or another quantizer)"
            )
        t = torch._C._functorch.get_unwrapped(t)
    return t
