"""Real quantization in plain torch: q = clamp(round(x / scale) + zero_point, quant_min, quant_max), and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake_quantize import check, check_granularity, expand, qparams

INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int32)


def check_integer_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in INTEGER_DTYPES:
        raise RuntimeError(f"{name}: got {dtype}; accepted: torch.int8, torch.uint8, torch.int32")


def check_codes(quant_min: int, quant_max: int, dtype: torch.dtype) -> None:
    check_integer_dtype("dtype", dtype)
    info = torch.iinfo(dtype)
    if quant_min < info.min or quant_max > info.max:
        raise RuntimeError(
            f"quant_min, quant_max: got {quant_min}, {quant_max}; accepted: what {dtype} holds, {info.min} to "
            f"{info.max}"
        )


def check_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
    check_integer_dtype("q", q.dtype)
    if not dtype.is_floating_point:
        raise RuntimeError(f"dtype: got {dtype}; accepted: a floating dtype")
    check_granularity("scale", scale, q)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    check(x, scale, zero_point, quant_min, quant_max)
    check_codes(quant_min, quant_max, dtype)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = ((x.to(s.dtype) * inv).round() + z).clamp(quant_min, quant_max)
    return torch.empty_like(x, dtype=dtype).copy_(torch.where(q.isnan(), z, q))


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    check_dequantize(q, scale, zero_point, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    s = expand(scale, q).to(compute)
    s = torch.where(s < 0, torch.nan, s.clamp(min=torch.finfo(torch.float32).tiny))
    z = 0 if zero_point is None else expand(zero_point, q).to(compute).round()
    return torch.empty_like(q, dtype=dtype).copy_((q.to(compute) - z) * s)
