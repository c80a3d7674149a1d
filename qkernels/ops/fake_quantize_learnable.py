"""The raw ops that give the gradients of a learned scale and zero point, in every straight-through convention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks, library, samples
from ..reference import fake_quantize_learnable as reference


def _straight_through_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for *case, factor in samples.learnable(x):
        for variant in checks.WITH_TERMS:
            yield *case, variant, 0.2, factor


def _fake(grad: Tensor, x: Tensor, scale: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


_define = partial(library.define, fake=_fake, cpu=("avx512", "avx2", "scalar"), triton=True)

learnable_backward = _define(
    "fake_quantize_learnable_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, float grad_factor, "
    "bool lsq=False) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_learnable_backward,
    cuda=True,
    samples=samples.with_lsq(samples.learnable),
    sums=(1, 2),
)
straight_through_backward = _define(
    "fake_quantize_straight_through_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, "
    "str straight_through, float ewgs_delta, float grad_factor) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_straight_through_backward,
    samples=_straight_through_samples,
    sums=(1, 2),
)
