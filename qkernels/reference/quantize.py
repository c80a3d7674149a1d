"""Quantization to integers in plain torch, q = clamp(round(x / scale) + zero_point, quant_min, quant_max), and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .fake_quantize import expand, qparams


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    checks.range_of_dtype(quant_min, quant_max, dtype)
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = ((x.to(s.dtype) * inv).round() + z).clamp(quant_min, quant_max)
    return torch.empty_like(x, dtype=dtype).copy_(torch.where(q.isnan(), z, q))


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    checks.dequantize(q, scale, zero_point, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    s = expand(scale, q).to(compute)
    s = torch.where(s < 0, torch.nan, s.clamp(min=torch.finfo(torch.float32).tiny))
    z = 0 if zero_point is None else expand(zero_point, q).to(compute).round()
    return torch.empty_like(q, dtype=dtype).copy_((q.to(compute) - z) * s)
