"""Real quantization in Triton, bit for bit as the reference."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .common.granularity import block_index, block_params, unsupported_granularity
from .common.launch import launch
from .common.numerics import clamp, narrow, rint, widen
from .common.pointwise import blocks, dense_and_like, pointwise_arguments


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    return unsupported_granularity(args[0], args[1])


@triton.jit(do_not_specialize=["view"])
def quantize_kernel(
    x_ptr, q_ptr, scale, zero_point, quant_min, quant_max, numel, view,
    ZERO_POINT: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here, other=0.0))
    low, high = tl.cast(quant_min, x.dtype), tl.cast(quant_max, x.dtype)
    _s, inv, z = block_params(
        start, index, scale, zero_point, low, high, view, x.dtype, ZERO_POINT, MODE, DIGITS, WRAP, BLOCK, INNER
    )
    q = clamp(rint(x * inv) + z, low, high)
    q = tl.where(q != q, tl.where(z != z, low, z), q)
    tl.store(q_ptr + start + index, q.to(tl.int32).to(q_ptr.dtype.element_ty), mask=here)


def fill(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, q: Tensor) -> None:
    """Fills q with the codes of a dense x."""
    numel = x.numel()
    if numel == 0:
        return
    scale, zero_point, view, constexprs = pointwise_arguments(x, scale, zero_point)
    launch(
        quantize_kernel, blocks(numel, constexprs), x, q, scale, zero_point, float(quant_min), float(quant_max), numel,
        view, **constexprs,
    )  # fmt: skip


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    checks.range_of_dtype(quant_min, quant_max, dtype)
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    x, q = dense_and_like(x, dtype)
    fill(x, scale, zero_point, quant_min, quant_max, q)
    return q


@triton.jit(do_not_specialize=["view"])
def dequantize_kernel(
    q_ptr, y_ptr, scale, zero_point, numel, view,
    ZERO_POINT: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    q = tl.load(q_ptr + start + index, mask=here).to(dtype)
    no_low, no_high = tl.cast(float("-inf"), dtype), tl.cast(float("inf"), dtype)
    s, _inv, z = block_params(
        start, index, scale, zero_point, no_low, no_high, view, dtype, ZERO_POINT, MODE, DIGITS, WRAP, BLOCK, INNER
    )
    tl.store(y_ptr + start + index, narrow((q - z) * s, y_ptr.dtype.element_ty), mask=here)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    checks.dequantize(q, scale, zero_point, dtype)
    q, y = dense_and_like(q, dtype)
    numel = q.numel()
    if numel:
        scale, zero_point, view, constexprs = pointwise_arguments(q, scale, zero_point)
        launch(
            dequantize_kernel,
            blocks(numel, constexprs),
            q,
            y,
            scale,
            zero_point,
            numel,
            view,
            **constexprs,
        )
    return y
