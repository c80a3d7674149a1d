"""The linear layer on weights of 2 to 4 bits in plain torch: an exact sum for each group, then floats in fixed order.

With the parameters of its group along K, a weight is code·scale, (code − zero_point)·scale, or (code + 8)·scale +
minimum; ``minimum`` is the value of the smallest code, as GGUF's Q4_1 stores it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gemm_checks, layouts
from .int8_gemm import TINY, exact_mm, quantize_codes, static_qparams

MAX_GROUP = 32768  # longer groups are summed in parts: 16 * 15 * 128 * MAX_GROUP < 2**31


def int4_pack(q: Tensor, bits: int = 4) -> Tensor:
    """Codes [N, K] of 2, 3 or 4 bits, in the layout of a CPU."""
    gemm_checks.matrix_of_codes("q", q)
    gemm_checks.bits(bits)
    return layouts.int4_pack(q, bits)


def int4_unpack(data: Tensor, n: int, k: int) -> Tensor:
    gemm_checks.shape_of_weight(n, k)
    gemm_checks.int4_data(data, n, k, k)
    return layouts.int4_unpack(data, n, k, k)


def quantize_input(
    x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Codes [M, K] of x's rows, scales (one element or [M, 1]) and zero points (an int, one element or [M, 1])."""
    rows = x.detach().reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    if x.dtype == torch.int8:
        assert input_scale is not None
        z = 0 if input_zero_point is None else input_zero_point.reshape(-1, 1).long()
        return rows, input_scale.detach().float().reshape(-1, 1), z
    zero_point: Tensor | int
    if input_scale is None:
        half = (quant_max - quant_min) // 2
        zero_point = quant_max - half
        amax = rows.float().abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(rows.shape[0], 1).float()
        scale = (amax / half).clamp(min=TINY)
        scale = torch.where(scale.isfinite(), scale, torch.nan)
    else:
        scale, zero_point = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max)
    q, nan = quantize_codes(rows, scale, zero_point, quant_min, quant_max)
    return q, torch.where(nan.any(1, keepdim=True), torch.nan, scale), zero_point


def offset_of(scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> Tensor | None:
    """The value of code −8, in fp32; None without zero points and minima."""
    if minimum is not None:
        return minimum.float()
    return None if zero_point is None else -(zero_point.float() + 8) * scale.float()


def int4_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    weight_sum: Tensor,
    bias: Tensor | None,
    group_size: int,
    act_bits: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
) -> Tensor:
    gemm_checks.int4_linear(
        x, data, scale, zero_point, minimum, weight_sum, bias, group_size, act_bits, input_scale, input_zero_point,
        quant_min, quant_max, out_dtype,
    )  # fmt: skip
    n, k = weight_sum.numel(), x.shape[-1]
    q = layouts.int4_unpack(data, n, k, group_size)
    layout = layouts.int4_layout(data)
    scale = layouts.by_group(scale, n, layout).float()
    offset = offset_of(
        scale,
        None if zero_point is None else layouts.by_group(zero_point, n, layout),
        None if minimum is None else layouts.by_group(minimum, n, layout),
    )
    if act_bits == 16:
        rows = x.detach().reshape(-1, k) if k else x.new_empty(x.shape[:-1].numel(), 0)
        y = rows.float() @ weight_of(q, scale, offset, group_size).float().t()
    else:
        codes, scale_x, zero_x = quantize_input(x, input_scale, input_zero_point, quant_min, quant_max)
        y = torch.zeros(codes.shape[0], n, device=x.device)
        for group in range(scale.shape[1] if k else 0):
            for first in range(group * group_size, (group + 1) * group_size, MAX_GROUP):
                last = min(first + MAX_GROUP, (group + 1) * group_size)
                a, w = codes[:, first:last], q[:, first:last]
                if offset is not None:
                    w = w + 8
                    y = y + offset[:, group] * a.sum(1, keepdim=True, dtype=torch.int64).float()
                y = y + scale[:, group] * exact_mm(a, w.t()).float()
        if isinstance(zero_x, Tensor):
            y = y - zero_x.float() * weight_sum
        elif zero_x:
            y = y - zero_x * weight_sum
        y = y * scale_x
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype).reshape(*x.shape[:-1], n)


def weight_of(q: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """The weight [N, K] in fp64: exact, except that offset is rounded to fp32."""
    codes = q.double().reshape(q.shape[0], scale.shape[1], group_size)
    if offset is None:
        return (codes * scale.double()[..., None]).reshape(q.shape)
    return ((codes + 8) * scale.double()[..., None] + offset.double()[..., None]).reshape(q.shape)


def weight_sum_of(q: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """The sum of each output channel's weights [N], rounded once to fp32."""
    sums = q.reshape(q.shape[0], scale.shape[1], group_size).sum(-1, dtype=torch.int64).double()
    if offset is None:
        return (sums * scale.double()).sum(1).float()
    return ((sums + 8 * group_size) * scale.double() + group_size * offset.double()).sum(1).float()
