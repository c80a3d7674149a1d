"""Learned scales in Triton: dx bit for bit as the reference; sums in a fixed order, without atomics."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import fake_quantize_learnable as reference
from ..reference.fake_quantize import check, check_grad
from .common import configs
from .common.configs import ceil_div
from .common.granularity import channel_of, granularity_of, load_params, unsupported_granularity
from .common.launch import launch
from .common.numerics import (
    clamp,
    counts_inside,
    relu,
    rint,
    round_to,
    widen,
)
from .common.pointwise import dense_and_like, laid_out, zero_point_kind
from .common.ranges import column_tile, regroup, row_tile
from .common.sums import backward


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    return unsupported_granularity(args[1], args[2])


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
    check(x, scale, zero_point, quant_min, quant_max)
    check_grad(grad, x)
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


def fake_quantize_straight_through_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    straight_through: str,
    ewgs_delta: float,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, scale, zero_point, quant_min, quant_max)
    check_grad(grad, x)
    reference.check_variant(straight_through, ewgs_delta, reference.WITH_TERMS)
    return backward(straight_through, grad, x, scale, zero_point, quant_min, quant_max, grad_factor, delta=ewgs_delta)
