"""A matrix and its transpose as int8 codes in Triton: one launch for the magnitudes, one for the codes of both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks, layouts
from ..reference.fake_quantize import compute_dtype
from .common import configs
from .common.configs import ceil_div
from .common.launch import launch
from .common.numerics import TINY, clamp, divide, reciprocal, rint, widen, within_reach
from .common.philox import Philox, round_stochastically, uniforms, uniforms_of_blocks


@triton.jit
def magnitude(x):
    """|x| as an integer: ordered as the floats are, with NaN above infinity."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def transposed_magnitudes_kernel(
    x_ptr, largest_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """The largest magnitude of each row, then of each column; a maximum of integers has no order to depend on."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    tile = tl.program_id(0).to(tl.int64)
    row = tile // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tile % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    bits = magnitude(widen(tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=here, other=0.0)))
    tl.atomic_max(largest_ptr + row, tl.max(bits, 1), mask=row < rows, sem="relaxed")
    tl.atomic_max(largest_ptr + rows + column, tl.max(bits, 0), mask=column < columns, sem="relaxed")


@triton.jit
def scales(largest_ptr, index, here, quant_max, dtype: tl.constexpr):
    """Scale and its reciprocal."""
    amax = tl.load(largest_ptr + index, mask=here, other=0).to(dtype, bitcast=True)
    scale = divide(within_reach(amax), tl.zeros_like(amax) + quant_max)
    scale = tl.maximum(scale, TINY, propagate_nan=tl.PropagateNan.ALL)
    return scale, reciprocal(scale)


@triton.jit
def code(q, quant_max):
    q = clamp(q, -quant_max, quant_max)
    return tl.where(q == q, q, 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["philox"])
def transposed_codes_kernel(
    x_ptr, largest_ptr, q_ptr, scale_ptr, q_t_ptr, scale_t_ptr, quant_max, rows, columns, q_stride, q_t_stride, philox,
    STOCHASTIC: tl.constexpr, QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    tile = tl.program_id(0).to(tl.int64)
    first_column = tile % across * BLOCK_COLUMNS
    row = tile // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    in_rows, in_columns = row < rows, column < columns
    here = in_rows[:, None] & in_columns[None, :]
    element = row[:, None] * columns + column[None, :]
    x = widen(tl.load(x_ptr + element, mask=here, other=0.0))
    bound = tl.cast(quant_max, x.dtype)
    scale, inverse = scales(largest_ptr, row, in_rows, bound, x.dtype)
    scale_t, inverse_t = scales(largest_ptr + rows, column, in_columns, bound, x.dtype)
    tl.store(scale_ptr + row, scale, mask=in_rows & (tile % across == 0))
    tl.store(scale_t_ptr + column, scale_t, mask=in_columns & (tile < across))
    steps, steps_t = x * inverse[:, None], x * inverse_t[None, :]
    if STOCHASTIC:
        if QUADS:
            block = (row * columns + first_column)[:, None] // 4 + tl.arange(0, BLOCK_COLUMNS // 4)[None, :]
            u = uniforms_of_blocks(block, philox, x.dtype)
        else:
            u = uniforms(element, philox, x.dtype)
        q, q_t = round_stochastically(steps, u), round_stochastically(steps_t, u)
    else:
        q, q_t = rint(steps), rint(steps_t)
    tl.store(q_ptr + row[:, None] * q_stride + column[None, :], code(q, bound), mask=here)
    turned = q_t_ptr + column[:, None] * q_t_stride + row[None, :]
    tl.store(turned, tl.trans(code(q_t, bound)), mask=in_columns[:, None] & in_rows[None, :])


def quantize_dynamic_transposed(
    x: Tensor, quant_max: int, seed: int | None, offset: int, offset_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.quantize_transposed(x, quant_max)
    if seed is not None:
        checks.offset(offset_tensor, x)
    x = x.contiguous()
    rows, columns = x.shape
    dtype = compute_dtype(x)
    q, q_t = layouts.empty_aligned_rows(x, rows, columns), layouts.empty_aligned_rows(x, columns, rows)
    scale, scale_t = x.new_empty((rows, 1), dtype=dtype), x.new_empty((columns, 1), dtype=dtype)
    if x.numel() == 0:
        tiny = torch.finfo(torch.float32).tiny
        return q, scale.fill_(tiny), q_t, scale_t.fill_(tiny)
    largest = x.new_zeros(rows + columns, dtype=torch.int64 if dtype == torch.float64 else torch.int32)
    tile = configs.transposed_tile(rows, columns)
    grid = (ceil_div(rows, tile["BLOCK_ROWS"]) * ceil_div(columns, tile["BLOCK_COLUMNS"]),)
    launch(transposed_magnitudes_kernel, grid, x, largest, rows, columns, **tile)
    philox = None if seed is None else Philox(seed, offset, offset_tensor)
    launch(
        transposed_codes_kernel, grid, x, largest, q, scale, q_t, scale_t, float(quant_max), rows, columns, q.stride(0),
        q_t.stride(0), philox, STOCHASTIC=philox is not None, QUADS=columns % 4 == 0, **tile,
    )  # fmt: skip
    return q, scale, q_t, scale_t
