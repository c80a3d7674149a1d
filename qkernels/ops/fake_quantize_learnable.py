"""The raw ops that give the gradients of a learned scale and zero point, in every straight-through convention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import library
from ..reference import fake_quantize_learnable as reference


def _fake(grad: Tensor, x: Tensor, scale: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


_define = partial(library.define, fake=_fake, cpu=("avx512", "avx2", "scalar"), triton=True)

learnable_backward = _define(
    "fake_quantize_learnable_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, float grad_factor, "
    "bool lsq=False) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_learnable_backward,
    cuda=True,
)
straight_through_backward = _define(
    "fake_quantize_straight_through_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, "
    "str straight_through, float ewgs_delta, float grad_factor) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_straight_through_backward,
)
