"""Stochastic rounding: ``fake_quantize_stochastic`` (differentiable) and ``quantize_stochastic`` (integers)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import library, samples
from ..layouts import mask_like
from ..reference import stochastic as reference
from ..reference import transforms
from .autograd import already_masked, learnable, transformed
from .quantize import range_of_codes

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), triton=True)


def _stochastic_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in samples.quantizer(x):
        yield *case, 3, 4, None
        yield *case, -5, 0, torch.tensor([2**40])


def _stochastic_backward_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for case in samples.backward(_stochastic_samples)(x):
            yield *case, 0.5


def _quantize_stochastic_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in _stochastic_samples(x):
        yield *case, torch.int8


_forward = _define(
    "fake_quantize_stochastic_forward",
    "(Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, SymInt seed, SymInt offset, "
    "Tensor? offset_tensor) -> (Tensor, Tensor)",
    reference.fake_quantize_stochastic_forward,
    lambda x, *_: (torch.empty_like(x), mask_like(x)),
    samples=_stochastic_samples,
)
_backward = _define(
    "fake_quantize_stochastic_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, SymInt seed, "
    "SymInt offset, Tensor? offset_tensor, float grad_factor) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_stochastic_backward,
    lambda grad, x, scale, *_: (torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)),
    samples=_stochastic_backward_samples,
    sums=(1, 2),
)
_quantize = _define(
    "quantize_stochastic",
    "(Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, SymInt seed, SymInt offset, "
    "Tensor? offset_tensor, ScalarType dtype) -> Tensor",
    reference.quantize_stochastic,
    lambda x, *rest: torch.empty_like(x, dtype=rest[-1]),
    samples=_quantize_stochastic_samples,
)


# ``learnable`` wants tensors first, hence the order here. The backward pass draws the same random numbers again.
_learnable = learnable(
    lambda x, scale, zero_point, offset_tensor, *numbers: _forward(x, scale, zero_point, *numbers, offset_tensor)[0],
    lambda grad, x, scale, zero_point, offset_tensor, *numbers: _backward(
        grad, x, scale, zero_point, *numbers[:-1], offset_tensor, numbers[-1]
    ),
    no_second="fake_quantize_stochastic: learned scales have no second derivative; detach scale and zero_point",
    tensors=4,
    taken=8,
)


def fake_quantize_stochastic(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int | Tensor = 0,
    grad_factor: float = 1.0,
) -> Tensor:
    """``fake_quantize`` that rounds up with the fraction as probability: right on average (E[y] = x in the range).

    Args:
        x, scale, zero_point, quant_min, quant_max, grad_factor: as in ``fake_quantize``, with scale a tensor.
        seed: any 64-bit integer; tensors that should be rounded independently need different seeds.
        offset: any 64-bit integer, usually the step of the training loop. It may be a one-element int64 tensor on x's
            device; the op then reads it there, without synchronisation, so that a CUDA graph that increments it draws
            anew at each replay and a compiled function needs no recompilation. It must not change between the forward
            and the backward pass.

    Returns:
        A tensor of x's shape, dtype and memory layout. Infinities saturate, NaN stays NaN.

    For element i of x in memory order the op compares the fraction of x/scale with u_i, 24 bits of Philox-4x32-10
    (Salmon et al., SC 2011) with seed as key at counter (i // 4, offset). So the same seed and offset give the same y
    on every device and kernel, with any number of threads, and when activation checkpointing computes it twice. u has a
    resolution of 2**-24, so the average is right to 2**-24 steps.

    dx is dy where the drawn integer lies in the range; scale and zero_point learn as in LSQ, with that integer. The
    backward pass keeps one bit per element, or x if scale or zero_point requires grad.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    numbers = seed_and_offset(seed, offset)
    if transformed():
        return transforms.fake_quantize_stochastic(x, scale, zero_point, quant_min, quant_max, *numbers, grad_factor)
    if not torch.is_grad_enabled():
        return _forward(x, scale, zero_point, quant_min, quant_max, *numbers)[0]
    if scale.requires_grad or (zero_point is not None and zero_point.requires_grad):
        seed, start, offset_tensor = numbers
        return _learnable(x, scale, zero_point, offset_tensor, quant_min, quant_max, seed, start, grad_factor)
    y, mask = _forward(x.detach(), scale, zero_point, quant_min, quant_max, *numbers)
    return already_masked(x, y, mask) if x.requires_grad else y


def quantize_stochastic(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int | None = None,
    quant_max: int | None = None,
    seed: int,
    offset: int | Tensor = 0,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """The integers of ``fake_quantize_stochastic`` for the same seed and offset; int8 training rounds gradients so.

    Arguments are those of ``quantize`` and ``fake_quantize_stochastic``. NaN becomes the zero point. ``dequantize`` of
    the result equals ``fake_quantize_stochastic`` bit for bit where x is not NaN. Not differentiable.
    """
    quant_min, quant_max = range_of_codes(quant_min, quant_max, dtype)
    return _quantize(x, scale, zero_point, quant_min, quant_max, *seed_and_offset(seed, offset), dtype)


def seed_and_offset(seed: int, offset: int | Tensor) -> tuple[int, int, Tensor | None]:
    return (seed, 0, offset) if isinstance(offset, Tensor) else (seed, offset, None)
