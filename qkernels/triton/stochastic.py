"""Stochastic rounding in Triton: the reference's numbers, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .common.granularity import block_index, block_params, unsupported_granularity
from .common.launch import launch
from .common.numerics import clamp, is_inside, narrow, store_bits, widen
from .common.philox import Philox, round_stochastically, uniforms_of_blocks
from .common.pointwise import blocks, dense_and_like, empty_mask, pointwise_arguments
from .common.sums import learnable_backward


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    x, scale = args[1:3] if op == "fake_quantize_stochastic_backward" else args[:2]
    return unsupported_granularity(x, scale)


@triton.jit(do_not_specialize=["view", "philox"])
def fake_quantize_stochastic_forward_kernel(
    x_ptr, y_ptr, mask_ptr, scale, zero_point, quant_min, quant_max, philox, numel, view,
    CODES: tl.constexpr, ZERO_POINT: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here))
    low, high = tl.cast(quant_min, x.dtype), tl.cast(quant_max, x.dtype)
    s, inv, z = block_params(
        start, index, scale, zero_point, low, high, view, x.dtype, ZERO_POINT, MODE, DIGITS, WRAP, BLOCK, INNER
    )
    u = uniforms_of_blocks(start // 4 + tl.arange(0, BLOCK // 4), philox, x.dtype)
    q = round_stochastically(x * inv, tl.reshape(u, x.shape)) + z
    clamped = clamp(q, low, high)
    if CODES:
        code = tl.where(clamped == clamped, clamped, tl.where(z == z, z, low))
        tl.store(y_ptr + start + index, code.to(y_ptr.dtype.element_ty), mask=here)
    else:
        y = (clamped - z) * s
        tl.store(y_ptr + start + index, narrow(y, y_ptr.dtype.element_ty), mask=here)
        store_bits(mask_ptr, is_inside(q, low, high) & here, start, numel, BLOCK)


def _forward(
    x: Tensor, y: Tensor, mask: Tensor | None, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int,
    philox: Philox,
) -> None:  # fmt: skip
    """Fills y and mask, or with no mask a y of integers."""
    numel = x.numel()
    if numel == 0:
        return
    scale, zero_point, view, constexprs = pointwise_arguments(x, scale, zero_point)
    launch(
        fake_quantize_stochastic_forward_kernel, blocks(numel, constexprs), x, y, mask, scale, zero_point,
        float(quant_min), float(quant_max), philox, numel, view, CODES=mask is None, **constexprs,
    )  # fmt: skip


def fake_quantize_stochastic_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int,
    offset_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.offset(offset_tensor, x)
    x, y = dense_and_like(x)
    mask = empty_mask(x)
    _forward(x, y, mask, scale, zero_point, quant_min, quant_max, Philox(seed, offset, offset_tensor))
    return y, mask


def quantize_stochastic(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int,
    offset_tensor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    checks.range_of_dtype(quant_min, quant_max, dtype)
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.offset(offset_tensor, x)
    x, codes = dense_and_like(x, dtype)
    _forward(x, codes, None, scale, zero_point, quant_min, quant_max, Philox(seed, offset, offset_tensor))
    return codes


def fake_quantize_stochastic_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int,
    offset_tensor: Tensor | None,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    checks.offset(offset_tensor, x)
    philox = Philox(seed, offset, offset_tensor)
    return learnable_backward(
        "stochastic", grad, x, scale, zero_point, quant_min, quant_max, grad_factor, philox=philox
    )
