"""int8 matrix multiplication in plain torch: exact integer sums, then one fixed order of float operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gemm_checks, layouts
from .activation import FUNCTIONS

TINY = torch.finfo(torch.float32).tiny


def exact_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product in int64: every partial sum is an integer below 2**53, which fp64 holds."""
    return (a.double() @ b.double()).long()


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    gemm_checks.int8_mm(a, b)
    return exact_mm(a, b).int()


def epilogue(
    acc: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """Scales, bias, activation and output. acc is [M, N], scale_a one element or [M, 1], scale_b one element or [N]."""
    y = acc.float() * scale_b.float() * scale_a.float()
    if bias is not None:
        y = y + bias.float()
    y = FUNCTIONS[activation](y)
    if out_scale is None:
        return y.to(out_dtype)
    scale, zero_point = static_qparams("out", out_scale, out_zero_point, -128, 127)
    q = ((y * (1 / scale)).round() + zero_point).clamp(-128, 127)
    return torch.where(q.isnan(), zero_point, q).to(torch.int8)


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    zero_point_a: Tensor | None,
    colsum_b: Tensor | None,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    output = (activation, out_dtype, out_scale, out_zero_point)
    gemm_checks.int8_scaled_mm(a, b, scale_a, scale_b, zero_point_a, colsum_b, bias, *output)
    acc = exact_mm(a, b)
    if zero_point_a is not None:
        acc = acc - zero_point_a.long().reshape(-1, 1) * b.sum(0, dtype=torch.int64)
    return epilogue(acc, scale_a.reshape(-1, 1), scale_b.reshape(-1), bias, *output)


def int8_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K] in panels, and the sum of each output channel's codes."""
    gemm_checks.matrix_of_codes("w", w)
    return layouts.int8_pack(w), w.sum(1, dtype=torch.int32)


def int8_unpack(data: Tensor, n: int, k: int) -> Tensor:
    gemm_checks.shape_of_weight(n, k)
    gemm_checks.int8_data(data, n, k)
    return layouts.int8_unpack(data, n, k)


def static_qparams(
    of: str, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """The scale as fp32, at least the smallest normal number and NaN if it is negative; and the zero point.

    A zero point beyond the range makes the scale NaN, because on a GPU the host cannot check it without waiting.
    """
    gemm_checks.static(of, scale, zero_point, quant_min, quant_max)
    s = scale.detach().float().reshape(())
    s = torch.where(s < 0, torch.nan, s.clamp(min=TINY))
    if zero_point is None:
        return s, torch.zeros((), dtype=torch.int64, device=s.device)
    z = zero_point.reshape(()).long()
    return torch.where((z >= quant_min) & (z <= quant_max), s, torch.nan), z


def quantize_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Codes, and which elements are NaN (their code is quant_min; the caller makes their outputs NaN)."""
    t = x.float() * (1 / scale)
    q = (t.round() + zero_point).clamp(quant_min, quant_max)
    return torch.where(t.isnan(), quant_min, q).to(torch.int8), t.isnan()


def quantize_rows(
    rows: Tensor, scale: Tensor | None, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Codes of floats [M, K], the scale of each row and the zero point. No scale: each row has its own."""
    offset: Tensor | int
    if scale is None:
        half = (quant_max - quant_min) // 2
        offset = quant_max - half
        amax = rows.float().abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(rows.shape[0], 1).float()
        scale_a = (amax / half).clamp(min=TINY)
        scale_a = torch.where(scale_a.isfinite(), scale_a, torch.nan)
    else:
        scale_a, offset = static_qparams("input", scale, zero_point, quant_min, quant_max)
    q, nan = quantize_codes(rows, scale_a, offset, quant_min, quant_max)
    return q, torch.where(nan.any(1, keepdim=True), torch.nan, scale_a), offset


def int8_linear(
    x: Tensor,
    data: Tensor,
    colsum: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    output = (activation, out_dtype, out_scale, out_zero_point)
    gemm_checks.int8_linear(x, data, colsum, scale, bias, input_scale, input_zero_point, quant_min, quant_max, *output)
    n, k = colsum.numel(), x.shape[-1]
    rows = x.detach().reshape(-1, k) if k else x.new_empty(x.shape[:-1].numel(), 0)
    zero_point: Tensor | int
    if x.dtype == torch.int8:
        assert input_scale is not None
        q, scale_a = rows, input_scale.detach().reshape(-1, 1)
        zero_point = 0 if input_zero_point is None else input_zero_point.reshape(-1, 1).long()
    else:
        q, scale_a, zero_point = quantize_rows(rows, input_scale, input_zero_point, quant_min, quant_max)
    acc = exact_mm(q, int8_unpack(data, n, k).t()) - zero_point * colsum.long()
    return epilogue(acc, scale_a, scale, bias, *output).reshape(*x.shape[:-1], n)
