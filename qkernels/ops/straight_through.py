"""The raw op behind ``fake_quantize(..., straight_through=…)``."""

from __future__ import annotations

import torch

from .. import library
from ..reference import straight_through as reference

straight_through_backward = library.define(
    "fake_quantize_straight_through_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, "
    "str straight_through, float ewgs_delta, float grad_factor) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_straight_through_backward,
    lambda grad, x, scale, *_: (torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)),
    cpu=("avx512", "avx2", "scalar"),
    triton=True,
)
