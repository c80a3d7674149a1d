"""What int8_program computes for one convolution, in plain torch without looking at values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .int8_gemm import quantize_codes, static_qparams


def int8_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    *geometry: Any,
) -> Tensor:
    """weight: codes, in torch's shape; geometry: the last arguments of torch.convolution."""
    by_channel = (-1, *[1] * (x.dim() - 2))
    s, zero_point = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max)
    q, nan = quantize_codes(x, s, zero_point, quant_min, quant_max)
    # (q - zero_point) is zero in the padding, because the zero point is the code of an exact 0.
    acc = torch.convolution((q.long() - zero_point).double(), weight.double(), None, *geometry)
    y = acc.float() * scale.view(by_channel) * s
    finite = scale.isfinite().all() & s.isfinite()
    if bias is not None:
        y = y + bias.float().view(by_channel)
        finite = finite & bias.isfinite().all()
    image_is_nan = nan.flatten(1).any(1).view(-1, *[1] * (x.dim() - 1))
    return torch.where(image_is_nan | ~finite, torch.nan, y).to(x.dtype)
