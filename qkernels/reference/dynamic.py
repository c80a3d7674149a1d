"""Quantization with the range of x itself, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .fake_quantize import compute_dtype, fake_quantize_forward_mask
from .quantize import quantize
from .ranges import qparams_of_range


def fake_quantize_dynamic_forward(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, scale, zero point (int32) and the packed mask; each group of x has its own range."""
    checks.dynamic(x, group_size)
    checks.dynamic_range(quant_min, quant_max, None)
    scale, zero_point = dynamic_qparams(x, group_size, quant_min, quant_max, symmetric)
    y, mask = fake_quantize_forward_mask(x, scale, zero_point, quant_min, quant_max)
    return y, scale, zero_point, mask if not symmetric else mask.new_empty(0)


def dynamic_qparams(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and int32 zero point of each group: the whole of x (0), a row (-1), or group_size elements of a row."""
    values = x.detach().to(compute_dtype(x))
    rows = x.shape[:-1]
    shape = [1] * x.dim() if group_size == 0 else [*rows, 1 if group_size == -1 else x.shape[-1] // group_size]
    count = torch.Size(shape).numel()
    groups = values.reshape(count, values.numel() // max(count, 1))
    if groups.shape[1] == 0:
        groups = groups.new_zeros(groups.shape[0], 1)
    scale, zero_point = qparams_of_range(groups.amin(1), groups.amax(1), quant_min, quant_max, symmetric, 0.0)
    return scale.reshape(shape), zero_point.reshape(shape)


def quantize_dynamic(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.dynamic(x, group_size)
    checks.dynamic_range(quant_min, quant_max, torch.int8)
    scale, zero_point = dynamic_qparams(x, group_size, quant_min, quant_max, symmetric)
    return quantize(x, scale, zero_point, quant_min, quant_max, torch.int8), scale, zero_point
