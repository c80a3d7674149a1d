"""Quantization by the ranges of x itself in Triton, bit for bit as the reference."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..reference.fake_quantize import compute_dtype
from .common import configs
from .common.configs import ceil_div
from .common.granularity import rows_of
from .common.launch import launch
from .common.numerics import (
    choose_qparams,
    clamp,
    highest,
    is_inside,
    lowest,
    narrow,
    reciprocal,
    rint,
    widen,
)
from .common.pointwise import dense_and_like, empty_mask
from .common.ranges import join_ranges, range_partials
from .fake_quantize import forward
from .quantize import fill


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    x = args[0]
    contiguous = x.dim() < 6 or x.is_contiguous()
    return None if contiguous else f"takes at most 5 dims where x is not contiguous, got {x.dim()}"


@triton.jit(do_not_specialize=["rows"])
def dynamic_rows_kernel(
    x_ptr, y_ptr, scale_ptr, zero_point_ptr, mask_ptr, rows, length, quant_min, quant_max, steps, middle, floor,
    SYMMETRIC: tl.constexpr, MASK: tl.constexpr, INTEGER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Each row gives its own scale and is quantized with it while it is in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    here = (row < rows) & (col < length)
    x = widen(tl.load(x_ptr + row * length + col, mask=here, other=0.0))
    if SYMMETRIC:
        top = highest(tl.abs(x), 1)
        bottom = tl.zeros_like(top)
    else:
        bottom, top = lowest(x, 1), highest(x, 1)
    low, high = tl.cast(quant_min, x.dtype), tl.cast(quant_max, x.dtype)
    scale, zero_point = choose_qparams(
        bottom, top, low, high, tl.cast(steps, x.dtype), tl.cast(middle, x.dtype), tl.cast(floor, x.dtype), SYMMETRIC
    )
    out = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(scale_ptr + out, scale, mask=out < rows)
    tl.store(zero_point_ptr + out, zero_point.to(tl.int32), mask=out < rows)
    z = zero_point[:, None]
    q = rint(x * reciprocal(scale)[:, None]) + z
    y = clamp(q, low, high)
    if INTEGER:
        y = tl.where(y != y, z, y).to(tl.int32).to(y_ptr.dtype.element_ty)
    else:
        y = narrow((y - z) * scale[:, None], y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * length + col, y, mask=here)
    if MASK:
        # Rows are whole bytes long, or there is only one.
        bits = tl.reshape(is_inside(q, low, high) & here, [ROWS, COLS // 8, 8]).to(tl.int32)
        bits = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
        byte = tl.arange(0, COLS // 8)[None, :]
        at = row * (length // 8) + byte
        tl.store(mask_ptr + at, bits, mask=(row < rows) & (byte * 8 < length))


@triton.jit(do_not_specialize=["outer", "period", "inner", "low_ptr", "high_ptr"])
def dynamic_qparams_kernel(
    low_ptr, high_ptr, scale_ptr, zero_point_ptr, outer, period, inner, quant_min, quant_max, steps, middle, floor,
    SYMMETRIC: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    low, high = join_ranges(low_ptr, high_ptr, channel, outer, period, inner, CHANNELS, PARTS)
    scale, zero_point = choose_qparams(low, high, quant_min, quant_max, steps, middle, floor, SYMMETRIC)
    here = channel < period
    tl.store(scale_ptr + channel, scale, mask=here)
    tl.store(zero_point_ptr + channel, zero_point.to(tl.int32), mask=here)


def dynamic(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fake_quantize_dynamic_forward (dtype None), or quantize_dynamic with codes of ``dtype``."""
    checks.dynamic(x, group_size)
    checks.floats_and_range(x, quant_min, quant_max)
    shape = [1] * x.dim() if group_size == 0 else [*x.shape[:-1], 1 if group_size == -1 else x.shape[-1] // group_size]
    compute = compute_dtype(x)
    scale = torch.empty(shape, dtype=compute, device=x.device)
    zero_point = torch.empty(shape, dtype=torch.int32, device=x.device)
    dense, y = dense_and_like(x, dtype)
    with_mask = dtype is None and not symmetric
    mask = empty_mask(x) if with_mask else torch.empty(0, dtype=torch.uint8, device=x.device)
    rows, numel = scale.numel(), x.numel()
    if rows == 0:
        return y, scale, zero_point, mask
    length = numel // rows
    half = (quant_max - quant_min) // 2
    rule = (float(quant_min), float(quant_max), float(half), float(quant_max - half), torch.finfo(torch.float32).tiny)
    in_order = group_size == 0 or dense.is_contiguous()
    if in_order and length <= configs.ONE_PASS and (not with_mask or length % 8 == 0 or rows == 1):
        tile = configs.rows_in_registers(rows, length, 8 if with_mask else 1)
        launch(
            dynamic_rows_kernel, (ceil_div(rows, tile["ROWS"]),), dense, y, scale, zero_point, mask, rows, length,
            *rule, SYMMETRIC=symmetric, MASK=with_mask, INTEGER=dtype is not None, **tile,
            num_warps=configs.warps(tile["ROWS"] * tile["COLS"]),
        )  # fmt: skip
        return y, scale, zero_point, mask
    # Long rows, and those that do not lie one after the other: their ranges first, then all elements in x's own order.
    values = dense if in_order else x.contiguous()
    partial, (outer, period, inner) = range_partials(values, rows_of(rows, length))
    tile = configs.join(outer, period, inner)
    launch(
        dynamic_qparams_kernel, (ceil_div(period, tile["CHANNELS"]),), *partial.unbind(), scale, zero_point, outer,
        period, inner, *rule, SYMMETRIC=symmetric, **tile,
    )  # fmt: skip
    if dtype is None:
        forward(dense, scale, zero_point, quant_min, quant_max, y, mask if with_mask else None)
    else:
        fill(dense, scale, zero_point, quant_min, quant_max, y)
    return y, scale, zero_point, mask


def fake_quantize_dynamic_forward(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dynamic(x, group_size, quant_min, quant_max, symmetric, None)


def quantize_dynamic(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return dynamic(x, group_size, quant_min, quant_max, symmetric, torch.int8)[:3]
