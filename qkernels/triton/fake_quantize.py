"""Fake quantization in Triton: elementwise bit for bit as the reference; sums in a fixed order, without atomics."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import fake_quantize as reference
from .common import configs
from .common.configs import ceil_div
from .common.granularity import (
    ONE_CHANNEL,
    block_index,
    block_params,
    channel_of,
    granularity_of,
    load_params,
    rows_of,
    unsupported_granularity,
)
from .common.launch import launch
from .common.numerics import (
    choose_qparams,
    clamp,
    counts_inside,
    highest,
    is_inside,
    lowest,
    narrow,
    reciprocal,
    relu,
    rint,
    round_to,
    store_bits,
    widen,
)
from .common.pointwise import blocks, dense_and_like, empty_mask, laid_out, pointwise_arguments, zero_point_kind
from .common.ranges import column_tile, dynamic_qparams_kernel, join_ranges, range_partials, regroup, row_tile


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    if op in ("fake_quantize_forward", "fake_quantize_forward_mask"):
        return unsupported_granularity(args[0], args[1])
    if op in ("fake_quantize_backward", "fake_quantize_learnable_backward"):
        return unsupported_granularity(args[1], args[2])
    if op == "observe_fake_quantize":
        return unsupported_granularity(args[0], args[5])
    if op == "fake_quantize_dynamic_forward":
        return unsupported_rows(args[0])
    return None


def unsupported_rows(x: Tensor) -> str | None:
    contiguous = x.dim() < 6 or x.is_contiguous()
    return None if contiguous else f"takes at most 5 dims where x is not contiguous, got {x.dim()}"


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
    reference.check(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    forward(x, scale, zero_point, quant_min, quant_max, y)
    return y


def fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> tuple[Tensor, Tensor]:
    reference.check(x, scale, zero_point, quant_min, quant_max)
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
    reference.check(x, scale, zero_point, quant_min, quant_max)
    reference.check_grad(grad, x)
    return backward(grad, x, scale, zero_point, quant_min, quant_max, lsq=lsq)


# Scale and zero point as numbers: fp32 arguments of the kernels. fp64 gets tensors, filled on the device.


def _check_numbers(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> tuple[Any, Any]:
    reference.check_input(x, quant_min, quant_max)
    reference.check_zero_point(zero_point, zero_point, quant_min, quant_max)
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
    reference.check_grad(grad, x)
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
    reference.check_mask(mask, grad)
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


# Learned scales: dx, and the sums for scale and zero point, in one pass over memory.


@triton.jit
def _learnable_terms(grad, x, s, inv, z, low, high, RELU: tl.constexpr, LSQ: tl.constexpr):
    """What each element adds to the gradients of scale and zero point, and whether its own gradient passes.

    Select, never multiply, so that an infinite gradient outside the range does not become NaN.
    """
    dy = widen(grad)
    if RELU:
        x = relu(x)
    steps = x * inv
    q = rint(steps) + z
    inside = counts_inside(steps, q, z, low, high, LSQ)
    ds = dy * ((clamp(q, low, high) - z) - tl.where(inside, steps, 0.0))
    dz = tl.where(inside, 0.0, (0.0 - dy) * s)
    if RELU:
        inside = inside & (x > 0)
    return ds, dz, inside


@triton.jit(do_not_specialize=["view", "pieces", "steps", "dscale_ptr", "dzero_point_ptr"])
def learnable_rows_kernel(
    grad_ptr, x_ptr, dx_ptr, dscale_ptr, dzero_point_ptr, scale, zero_point, quant_min, quant_max, runs, inner, pieces,
    steps, view, ZERO_POINT: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    RELU: tl.constexpr, LSQ: tl.constexpr,
):  # fmt: skip
    run, col = row_tile(ROWS, COLS)
    first = tl.program_id(1).to(tl.int64) * (steps * COLS)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    low, high = tl.cast(quant_min, dtype), tl.cast(quant_max, dtype)
    channel = channel_of(tl.minimum(run, runs - 1) % view.period, view, DIGITS)
    s, inv, z = load_params(scale, zero_point, channel, low, high, dtype, ZERO_POINT)
    dscale = tl.zeros([ROWS, COLS], dtype)
    dzero_point = tl.zeros([ROWS, COLS], dtype)
    step = 0
    while step < steps:
        at = first + step * COLS + col
        here = (run < runs) & (at < inner)
        at = run * inner + at
        x = widen(tl.load(x_ptr + at, mask=here, other=0.0))
        grad = tl.load(grad_ptr + at, mask=here, other=0.0)
        ds, dz, inside = _learnable_terms(grad, x, s, inv, z, low, high, RELU, LSQ)
        tl.store(dx_ptr + at, tl.where(inside, grad, tl.zeros_like(grad)), mask=here)
        dscale += ds
        dzero_point += dz
        step += 1
    out = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = out * pieces + tl.program_id(1)
    tl.store(dscale_ptr + at, tl.sum(dscale, 1), mask=out < runs)
    tl.store(dzero_point_ptr + at, tl.sum(dzero_point, 1), mask=out < runs)


@triton.jit(do_not_specialize=["view", "outer", "steps", "dscale_ptr", "dzero_point_ptr"])
def learnable_columns_kernel(
    grad_ptr, x_ptr, dx_ptr, dscale_ptr, dzero_point_ptr, scale, zero_point, quant_min, quant_max, outer, width,
    steps, view, ZERO_POINT: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    RELU: tl.constexpr, LSQ: tl.constexpr,
):  # fmt: skip
    col = column_tile(COLS)
    first = tl.program_id(1).to(tl.int64) * (steps * ROWS)
    row = tl.arange(0, ROWS)[:, None]
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    low, high = tl.cast(quant_min, dtype), tl.cast(quant_max, dtype)
    channel = channel_of(tl.minimum(col, width - 1) // view.inner, view, DIGITS)
    s, inv, z = load_params(scale, zero_point, channel, low, high, dtype, ZERO_POINT)
    dscale = tl.zeros([ROWS, COLS], dtype)
    dzero_point = tl.zeros([ROWS, COLS], dtype)
    step = 0
    while step < steps:
        at = first + step * ROWS + row
        here = (at < outer) & (col < width)
        at = at * width + col
        x = widen(tl.load(x_ptr + at, mask=here, other=0.0))
        grad = tl.load(grad_ptr + at, mask=here, other=0.0)
        ds, dz, inside = _learnable_terms(grad, x, s, inv, z, low, high, RELU, LSQ)
        tl.store(dx_ptr + at, tl.where(inside, grad, tl.zeros_like(grad)), mask=here)
        dscale += ds
        dzero_point += dz
        step += 1
    out = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    at = tl.program_id(1).to(tl.int64) * width + out
    tl.store(dscale_ptr + at, tl.sum(dscale, 0), mask=out < width)
    tl.store(dzero_point_ptr + at, tl.sum(dzero_point, 0), mask=out < width)


@triton.jit(do_not_specialize=["outer", "period", "inner", "dscale_ptr", "dzero_point_ptr"])
def learnable_join_kernel(
    dscale_ptr, dzero_point_ptr, out_scale_ptr, out_zero_point_ptr, outer, period, inner, factor, factor_rest,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds up partial sums in fp64, times grad_factor (an fp64 in two fp32), rounded once to scale's dtype."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    dscale = tl.zeros([CHANNELS, PARTS], tl.float64)
    dzero_point = tl.zeros([CHANNELS, PARTS], tl.float64)
    first = 0
    while first < outer * inner:
        part = first + tl.arange(0, PARTS)[None, :]
        at = ((part // inner).to(tl.int64) * period + channel[:, None]) * inner + part % inner
        here = (part < outer * inner) & (channel[:, None] < period)
        dscale += tl.load(dscale_ptr + at, mask=here, other=0.0).to(tl.float64)
        dzero_point += tl.load(dzero_point_ptr + at, mask=here, other=0.0).to(tl.float64)
        first += PARTS
    grad_factor = tl.cast(factor, tl.float64) + tl.cast(factor_rest, tl.float64)
    dtype: tl.constexpr = out_scale_ptr.dtype.element_ty
    here = channel < period
    tl.store(out_scale_ptr + channel, round_to(tl.sum(dscale, 1) * grad_factor, dtype), mask=here)
    tl.store(out_zero_point_ptr + channel, round_to(tl.sum(dzero_point, 1) * grad_factor, dtype), mask=here)


def learnable_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    rectify: bool = False,
    lsq: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check(x, scale, zero_point, quant_min, quant_max)
    reference.check_grad(grad, x)
    x, dx = dense_and_like(x)
    numel = x.numel()
    if numel == 0:
        return dx, scale.new_zeros(scale.shape), scale.new_zeros(scale.shape)
    grad = laid_out(grad, x)
    walk = granularity_of(x, scale)
    cut = configs.cut(walk, numel)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(2, cut.outer * cut.period * cut.inner, dtype=dtype, device=x.device)
    arguments = (
        grad, x, dx, *partial.unbind(), scale.contiguous(), None if zero_point is None else zero_point.contiguous(),
        float(quant_min), float(quant_max),
    )  # fmt: skip
    kernel: Any = learnable_rows_kernel
    sizes: tuple[int, ...] = (walk.runs, cut.length, cut.inner, cut.steps)
    if cut.columns:
        kernel, sizes = learnable_columns_kernel, (cut.height, cut.width, cut.steps)
    launch(
        kernel, cut.grid, *arguments, *sizes, walk.view, ZERO_POINT=zero_point_kind(scale, zero_point),
        DIGITS=walk.digits, ROWS=cut.rows, COLS=cut.cols, RELU=rectify, LSQ=lsq,
    )  # fmt: skip
    partial, (outer, period, inner) = regroup(
        partial, cut, walk, lambda part, dims: part.double().sum([d + 1 for d in dims])
    )
    dscale, dzero_point = (torch.empty(scale.shape, dtype=scale.dtype, device=x.device) for _ in range(2))
    factor = ctypes.c_float(grad_factor).value
    tile = configs.join(outer, period, inner)
    launch(
        learnable_join_kernel, (ceil_div(period, tile["CHANNELS"]),), *partial.unbind(), dscale, dzero_point, outer,
        period, inner, factor, grad_factor - factor, **tile,
    )  # fmt: skip
    return dx, dscale, dzero_point


def fake_quantize_learnable_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    lsq: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return learnable_backward(grad, x, scale, zero_point, quant_min, quant_max, grad_factor, lsq=lsq)


# Ranges taken from x itself.


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


def dynamic(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fake_quantize_dynamic_forward (dtype None), or quantize_dynamic with codes of ``dtype``."""
    reference.check_group_size(x, group_size)
    reference.check_input(x, quant_min, quant_max)
    shape = [1] * x.dim() if group_size == 0 else [*x.shape[:-1], 1 if group_size == -1 else x.shape[-1] // group_size]
    compute = reference.compute_dtype(x)
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
        quantize(dense, scale, zero_point, quant_min, quant_max, y)
    return y, scale, zero_point, mask


def fake_quantize_dynamic_forward(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dynamic(x, group_size, quant_min, quant_max, symmetric, None)


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


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, q: Tensor) -> None:
    """Fills q with the codes of a dense x."""
    numel = x.numel()
    if numel == 0:
        return
    scale, zero_point, view, constexprs = pointwise_arguments(x, scale, zero_point)
    launch(
        quantize_kernel, blocks(numel, constexprs), x, q, scale, zero_point, float(quant_min), float(quant_max), numel,
        view, **constexprs,
    )  # fmt: skip


# Observer and fake quantization.


@triton.jit
def moving_average(running, batch, momentum):
    distance = batch - running
    far = (1.0 - momentum) * running + momentum * batch  # two finite values may lie further apart than fp32 goes
    moved = tl.where(tl.abs(distance) == float("inf"), far, running + momentum * distance)
    return tl.where(tl.abs(running) == float("inf"), batch, moved)


@triton.jit(do_not_specialize=["outer", "period", "inner", "low_ptr", "high_ptr"])
def observe_fake_quantize_kernel(
    low_ptr, high_ptr, observer_on, running_min, running_max, scale_ptr, zero_point_ptr, outer, period, inner,
    averaging_const, quant_min, quant_max, steps, middle, floor,
    SYMMETRIC: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Moves the statistics of CHANNELS channels towards the range of the batch where it counts."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < period
    low, high = join_ranges(low_ptr, high_ptr, channel, outer, period, inner, CHANNELS, PARTS)
    low, high = low.to(tl.float32), high.to(tl.float32)
    finite = (low - low == 0) & (high - high == 0)
    learn = here & finite & (tl.load(observer_on) != 0)
    momentum = tl.cast(averaging_const, tl.float32)
    low = moving_average(tl.load(running_min + channel, mask=here, other=0.0), low, momentum)
    high = moving_average(tl.load(running_max + channel, mask=here, other=0.0), high, momentum)
    scale, zero_point = choose_qparams(low, high, quant_min, quant_max, steps, middle, floor, SYMMETRIC)
    tl.store(running_min + channel, low, mask=learn)
    tl.store(running_max + channel, high, mask=learn)
    tl.store(scale_ptr + channel, scale, mask=learn)
    tl.store(zero_point_ptr + channel, zero_point.to(zero_point_ptr.dtype.element_ty), mask=learn)


def observe_fake_quantize(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    symmetric_steps: float,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    reference.check_input(x, quant_min, quant_max)
    for name, stat in (("running_min", running_min), ("running_max", running_max), ("scale", scale)):
        reference.check_granularity(name, stat, x)
        if stat.dtype != torch.float32 or not stat.is_contiguous() or stat.numel() != scale.numel():
            raise RuntimeError(
                f"{name}: got {stat.dtype} of shape {list(stat.shape)}; accepted: contiguous torch.float32 of one "
                "shape for all statistics"
            )
    integers = zero_point.dtype in (torch.int32, torch.int64)
    if not integers or not zero_point.is_contiguous() or zero_point.numel() != scale.numel():
        raise RuntimeError(
            f"zero_point: got {zero_point.dtype} of shape {list(zero_point.shape)}; accepted: contiguous torch.int32 "
            f"or torch.int64 of scale's shape {list(scale.shape)}"
        )
    x, y = dense_and_like(x)
    mask = empty_mask(x)
    if x.numel() == 0:
        return y, mask
    partial, (outer, period, inner) = range_partials(x, granularity_of(x, scale))
    tile = configs.join(outer, period, inner)
    launch(
        observe_fake_quantize_kernel, (ceil_div(period, tile["CHANNELS"]),), *partial.unbind(), observer_on,
        running_min, running_max, scale, zero_point, outer, period, inner, averaging_const, float(quant_min),
        float(quant_max), symmetric_steps, float(symmetric_zero_point), torch.finfo(torch.float32).eps,
        SYMMETRIC=symmetric_steps != 0, **tile,
    )  # fmt: skip
    forward(x, scale, zero_point, quant_min, quant_max, y, mask, fake_quant_on)
    return y, mask
