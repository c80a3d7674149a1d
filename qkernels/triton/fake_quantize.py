"""Fake quantization in Triton, bit for bit as the reference."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .common import configs
from .common.configs import ceil_div
from .common.granularity import (
    ONE_CHANNEL,
    block_index,
    block_params,
    unsupported_granularity,
)
from .common.launch import launch
from .common.numerics import (
    clamp,
    counts_inside,
    narrow,
    relu,
    rint,
    store_bits,
    widen,
)
from .common.pointwise import blocks, dense_and_like, empty_mask, laid_out, pointwise_arguments


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    if op in ("fake_quantize_forward", "fake_quantize_forward_mask"):
        return unsupported_granularity(args[0], args[1])
    return unsupported_granularity(args[1], args[2]) if op == "fake_quantize_backward" else None


@triton.jit(do_not_specialize=["view"])
def fake_quantize_forward_kernel(
    x_ptr, y_ptr, mask_ptr, on_ptr, scale, zero_point, quant_min, quant_max, numel, view,
    MASK: tl.constexpr, ZERO_POINT: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, RELU: tl.constexpr, LSQ: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    raw = tl.load(x_ptr + start + index, mask=here)
    x = widen(raw)
    if RELU:
        x = relu(x)
    low, high = tl.cast(quant_min, x.dtype), tl.cast(quant_max, x.dtype)
    s, inv, z = block_params(
        start, index, scale, zero_point, low, high, view, x.dtype, ZERO_POINT, MODE, DIGITS, WRAP, BLOCK, INNER
    )
    steps = x * inv
    q = rint(steps) + z
    y = narrow((clamp(q, low, high) - z) * s, y_ptr.dtype.element_ty)
    inside = counts_inside(steps, q, z, low, high, LSQ) & here
    if RELU:
        inside = inside & (x > 0)
    if on_ptr is not None:
        off = tl.load(on_ptr) == 0
        y = tl.where(off, raw, y)
        inside = inside | off
    tl.store(y_ptr + start + index, y, mask=here)
    if MASK:
        store_bits(mask_ptr, inside, start, numel, BLOCK)


def forward(
    x: Tensor,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    y: Tensor,
    mask: Tensor | None = None,
    on: Tensor | None = None,
    rectify: bool = False,
    lsq: bool = False,
) -> None:
    """Fills y and mask; x is dense, its scale a tensor or a number. Where ``on`` holds 0, y is x, every bit is set."""
    numel = x.numel()
    if numel == 0:
        return
    scale, zero_point, view, constexprs = pointwise_arguments(x, scale, zero_point)
    launch(
        fake_quantize_forward_kernel, blocks(numel, constexprs), x, y, mask, on, scale, zero_point, float(quant_min),
        float(quant_max), numel, view, MASK=mask is not None, RELU=rectify, LSQ=lsq, **constexprs,
        maxnreg=configs.UNSPILLED,
    )  # fmt: skip


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    forward(x, scale, zero_point, quant_min, quant_max, y)
    return y


def fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> tuple[Tensor, Tensor]:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    mask = empty_mask(x)
    forward(x, scale, zero_point, quant_min, quant_max, y, mask, lsq=lsq)
    return y, mask


@triton.jit(do_not_specialize=["view"])
def fake_quantize_backward_kernel(
    grad_ptr, x_ptr, dx_ptr, scale, zero_point, quant_min, quant_max, numel, view,
    ZERO_POINT: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, RELU: tl.constexpr, LSQ: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here))
    grad = tl.load(grad_ptr + start + index, mask=here)
    low, high = tl.cast(quant_min, x.dtype), tl.cast(quant_max, x.dtype)
    _s, inv, z = block_params(
        start, index, scale, zero_point, low, high, view, x.dtype, ZERO_POINT, MODE, DIGITS, WRAP, BLOCK, INNER
    )
    steps = x * inv
    inside = counts_inside(steps, rint(steps) + z, z, low, high, LSQ)
    if RELU:  # what is not positive must not count; the rest is what relu leaves alone
        inside = inside & (x > 0)
    tl.store(dx_ptr + start + index, tl.where(inside, grad, tl.zeros_like(grad)), mask=here)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    rectify: bool = False,
    lsq: bool = False,
) -> Tensor:
    x, dx = dense_and_like(x)
    numel = x.numel()
    if numel == 0:
        return dx
    grad = laid_out(grad, x)
    scale, zero_point, view, constexprs = pointwise_arguments(x, scale, zero_point)
    launch(
        fake_quantize_backward_kernel, blocks(numel, constexprs), grad, x, dx, scale, zero_point, float(quant_min),
        float(quant_max), numel, view, RELU=rectify, LSQ=lsq, **constexprs,
    )  # fmt: skip
    return dx


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    lsq: bool = False,
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    return backward(grad, x, scale, zero_point, quant_min, quant_max, lsq=lsq)


# Scale and zero point as numbers: fp32 arguments of the kernels. fp64 gets tensors, filled on the device.


def _check_numbers(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> tuple[Any, Any]:
    checks.floats_and_range(x, quant_min, quant_max)
    checks.zero_point_values(zero_point, zero_point, quant_min, quant_max)
    if x.dtype == torch.float64:
        return x.new_full((1,), scale), torch.full((1,), zero_point, dtype=torch.int32, device=x.device)
    return float(scale), float(zero_point)


def fake_quantize_forward_scalar(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    params = _check_numbers(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    forward(x, *params, quant_min, quant_max, y)
    return y


def fake_quantize_forward_mask_scalar(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    params = _check_numbers(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    mask = empty_mask(x)
    forward(x, *params, quant_min, quant_max, y, mask)
    return y, mask


def fake_quantize_backward_scalar(
    grad: Tensor, x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> Tensor:
    params = _check_numbers(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    return backward(grad, x, *params, quant_min, quant_max)


@triton.jit
def fake_quantize_backward_mask_kernel(grad_ptr, mask_ptr, dx_ptr, numel, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK // 8)[:, None]
    bit = tl.arange(0, 8)[None, :]
    here = byte * 8 + bit < numel - start
    grad = tl.load(grad_ptr + start + byte * 8 + bit, mask=here)
    bits = tl.load(mask_ptr + start // 8 + byte, mask=byte * 8 < numel - start, other=0).to(tl.int32)
    inside = (bits >> bit) & 1 != 0
    tl.store(dx_ptr + start + byte * 8 + bit, tl.where(inside, grad, tl.zeros_like(grad)), mask=here)


def fake_quantize_backward_mask(grad: Tensor, mask: Tensor) -> Tensor:
    checks.mask(mask, grad)
    grad, dx = dense_and_like(grad)
    numel = grad.numel()
    if numel:
        block = configs.block(ONE_CHANNEL, numel)
        launch(
            fake_quantize_backward_mask_kernel,
            (ceil_div(numel, block),),
            grad,
            mask.contiguous(),
            dx,
            numel,
            BLOCK=block,
        )
    return dx
