"""RMSNorm and dynamic quantization in one kernel: x is read once from memory, the result written once.

Rows of up to 16384 elements stay in registers; longer ones are read three times, from cache. In the backward pass each
of a fixed number of programs takes a share of the rows and adds up its dweight in registers. So dweight has the same
order of summation on every GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..reference import rms_norm_quantize as reference
from .common import configs
from .common.configs import ceil_div
from .common.granularity import load_params
from .common.groups import extremes, qparams, quantized, store_qparams
from .common.launch import launch
from .common.numerics import bound, divide, is_inside, narrow, reciprocal, rint, widen


def unsupported(op: str, *args: Any) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(t.dtype == torch.float64 for t in tensors):
        return "takes torch.float32, torch.float16 and torch.bfloat16, got torch.float64"
    if op == "rms_norm_fake_quantize_dynamic_backward":
        if args and args[4] is not None and args[4].numel() != 1 and args[4].shape[:-1] != args[1].shape[:-1]:
            return "takes one scale, or scales for each row"
    elif args and args[3] == 0:
        return "takes groups and rows (group_size None makes a scale of the whole tensor)"
    return None


@triton.jit
def rstd_of(total, length, eps):
    """1/sqrt(total / length + eps), rounded at each step."""
    return reciprocal(tl.sqrt_rn(divide(total, tl.cast(length, tl.float32)) + eps))


@triton.jit
def normalized(x_ptr, weight_ptr, rstd, column, here):
    """(x · rstd) · weight, and 0 beyond the row."""
    v = widen(tl.load(x_ptr + column, mask=here, other=0.0)) * rstd
    if weight_ptr is not None:
        v = v * widen(tl.load(weight_ptr + column, mask=here, other=0.0))
    return v


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, scale_ptr, zero_point_ptr, rstd_ptr, eps, quant_min, quant_max, steps, middle, length,
    group_size, SYMMETRIC: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One row, as a tile of its groups."""
    row = tl.program_id(0).to(tl.int64)
    groups = length // group_size
    x_ptr += row * length
    y_ptr += row * length
    group = tl.arange(0, BLOCK_GROUPS)[:, None]
    at = tl.arange(0, BLOCK_SIZE)[None, :]
    column = group * group_size + at
    here = (group < groups) & (at < group_size)
    x = widen(tl.load(x_ptr + column, mask=here, other=0.0))
    rstd = rstd_of(tl.sum(tl.sum(x * x, 1), 0), length, eps)
    tl.store(rstd_ptr + row, rstd)
    v = x * rstd
    if weight_ptr is not None:
        v = v * widen(tl.load(weight_ptr + column, mask=here, other=0.0))
    low, high = extremes(v, tl.zeros_like(v), tl.zeros_like(v), SYMMETRIC)
    scale, inv, z = qparams(low, high, quant_min, quant_max, steps, middle, SYMMETRIC)
    index = row * groups + group
    store_qparams(scale_ptr + index, zero_point_ptr + index, scale, z, group < groups)
    y = quantized(v, scale, inv, z, quant_min, quant_max, y_ptr.dtype.element_ty, SYMMETRIC)
    tl.store(y_ptr + column, y, mask=here)


@triton.jit
def rms_norm_long_forward_kernel(
    x_ptr, weight_ptr, y_ptr, scale_ptr, zero_point_ptr, rstd_ptr, eps, quant_min, quant_max, steps, middle, length,
    group_size, SYMMETRIC: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One row of any length, piece by piece: the sum of squares, then each tile of groups twice."""
    BLOCK: tl.constexpr = BLOCK_GROUPS * BLOCK_SIZE
    row = tl.program_id(0).to(tl.int64)
    groups = length // group_size
    x_ptr += row * length
    y_ptr += row * length
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, bound(length), BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = widen(tl.load(x_ptr + column, mask=column < length, other=0.0))
        total += x * x
    rstd = rstd_of(tl.sum(total, 0), length, eps)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, bound(groups), BLOCK_GROUPS):
        group = first + tl.arange(0, BLOCK_GROUPS)[:, None]
        low = tl.zeros([BLOCK_GROUPS, BLOCK_SIZE], tl.float32)
        high = tl.zeros([BLOCK_GROUPS, BLOCK_SIZE], tl.float32)
        for start in range(0, bound(group_size), BLOCK_SIZE):
            at = start + tl.arange(0, BLOCK_SIZE)[None, :]
            here = (group < groups) & (at < group_size)
            v = normalized(x_ptr, weight_ptr, rstd, group * group_size + at, here)
            low, high = extremes(v, low, high, SYMMETRIC)
        scale, inv, z = qparams(low, high, quant_min, quant_max, steps, middle, SYMMETRIC)
        index = row * groups + group
        store_qparams(scale_ptr + index, zero_point_ptr + index, scale, z, group < groups)
        for start in range(0, bound(group_size), BLOCK_SIZE):
            at = start + tl.arange(0, BLOCK_SIZE)[None, :]
            here = (group < groups) & (at < group_size)
            column = group * group_size + at
            v = normalized(x_ptr, weight_ptr, rstd, column, here)
            y = quantized(v, scale, inv, z, quant_min, quant_max, y_ptr.dtype.element_ty, SYMMETRIC)
            tl.store(y_ptr + column, y, mask=here)


def _arguments(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x.contiguous(), None if weight is None else weight.contiguous()


def _run(
    x: Tensor, weight: Tensor | None, eps: float, group_size: int, low: int, high: int, symmetric: bool, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = x.shape[-1]
    group_size = length if group_size == -1 else group_size
    scale = torch.empty([*x.shape[:-1], length // group_size], dtype=torch.float32, device=x.device)
    zero_point = torch.empty_like(scale, dtype=torch.int32)
    rstd = torch.empty([*x.shape[:-1], 1], dtype=torch.float32, device=x.device)
    whole, tile = configs.norm_tile(length, group_size)
    half = (high - low) // 2
    launch(
        rms_norm_forward_kernel if whole else rms_norm_long_forward_kernel, (x.numel() // length,),
        *_arguments(x, weight), y, scale, zero_point, rstd, eps, float(low), float(high), float(half),
        float(high - half), length, group_size, SYMMETRIC=symmetric, **tile,
    )  # fmt: skip
    return y, scale, zero_point, rstd


def rms_norm_fake_quantize_dynamic_forward(
    x: Tensor, weight: Tensor | None, eps: float, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.rms_norm(x, weight, group_size)
    checks.dynamic_range(quant_min, quant_max, None)
    args = (x, weight, eps, group_size, quant_min, quant_max, symmetric)
    if x.numel() == 0:
        return reference.rms_norm_fake_quantize_dynamic_forward(*args)
    return _run(*args, x.new_empty(x.shape))


def rms_norm_quantize_dynamic(
    x: Tensor, weight: Tensor | None, eps: float, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.rms_norm(x, weight, group_size)
    checks.dynamic_range(quant_min, quant_max, torch.int8)
    args = (x, weight, eps, group_size, quant_min, quant_max, symmetric)
    if x.numel() == 0:
        return reference.rms_norm_quantize_dynamic(*args)
    return _run(*args, x.new_empty(x.shape, dtype=torch.int8))


@triton.jit
def load_terms(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, zero_point_ptr, rstd, row, column, length, groups, group_size, low, high,
    CLIPS: tl.constexpr,
):  # fmt: skip
    """n, dy where nothing was clipped, and u = dy·weight, of elements of a row; 0 beyond it."""
    here = column < length
    n = widen(tl.load(x_ptr + row * length + column, mask=here, other=0.0)) * rstd
    dy = widen(tl.load(grad_ptr + row * length + column, mask=here, other=0.0))
    if weight_ptr is not None:
        w = widen(tl.load(weight_ptr + column, mask=here, other=0.0))
    if CLIPS:
        channel = row * groups + tl.minimum(column, length - 1) // group_size
        _, inv, z = load_params(scale_ptr, zero_point_ptr, channel, low, high, tl.float32, 1)
        v = n
        if weight_ptr is not None:
            v = n * w
        dy = tl.where(is_inside(rint(v * inv) + z, low, high), dy, 0.0)
    u = dy
    if weight_ptr is not None:
        u = dy * w
    return n, dy, u


@triton.jit(do_not_specialize=["rows", "groups", "share"])
def rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, scale_ptr, zero_point_ptr, dx_ptr, partial_ptr, quant_min, quant_max, rows,
    length, groups, group_size, share, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a share of the rows, and their part of dweight."""
    column = tl.arange(0, BLOCK)
    here = column < length
    first = tl.program_id(0).to(tl.int64) * share
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(bound(first), bound(tl.minimum(first + share, rows))):
        rstd = tl.load(rstd_ptr + row)
        n, dy, u = load_terms(
            grad_ptr, x_ptr, weight_ptr, scale_ptr, zero_point_ptr, rstd, row, column, length, groups, group_size,
            quant_min, quant_max, CLIPS,
        )  # fmt: skip
        mean = divide(tl.sum(u * n, 0), tl.cast(length, tl.float32))
        dx = narrow((u - n * mean) * rstd, dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * length + column, dx, mask=here)
        if partial_ptr is not None:
            dweight += dy * n
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * length + column, dweight, mask=here)


@triton.jit(do_not_specialize=["groups"])
def rms_norm_long_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, scale_ptr, zero_point_ptr, dx_ptr, quant_min, quant_max, length, groups,
    group_size, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row of any length: the mean first, then piece by piece."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, bound(length), BLOCK):
        n, _, u = load_terms(
            grad_ptr, x_ptr, weight_ptr, scale_ptr, zero_point_ptr, rstd, row, start + tl.arange(0, BLOCK), length,
            groups, group_size, quant_min, quant_max, CLIPS,
        )  # fmt: skip
        total += u * n
    mean = divide(tl.sum(total, 0), tl.cast(length, tl.float32))
    for start in range(0, bound(length), BLOCK):
        column = start + tl.arange(0, BLOCK)
        n, _, u = load_terms(
            grad_ptr, x_ptr, weight_ptr, scale_ptr, zero_point_ptr, rstd, row, column, length, groups, group_size,
            quant_min, quant_max, CLIPS,
        )  # fmt: skip
        dx = narrow((u - n * mean) * rstd, dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * length + column, dx, mask=column < length)


@triton.jit(do_not_specialize=["rows", "groups", "share"])
def rms_norm_long_weight_kernel(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, scale_ptr, zero_point_ptr, partial_ptr, quant_min, quant_max, rows, length,
    groups, group_size, share, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The part of dweight of a share of the rows, for some columns."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * share
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(bound(first), bound(tl.minimum(first + share, rows))):
        rstd = tl.load(rstd_ptr + row)
        n, dy, _ = load_terms(
            grad_ptr, x_ptr, weight_ptr, scale_ptr, zero_point_ptr, rstd, row, column, length, groups, group_size,
            quant_min, quant_max, CLIPS,
        )  # fmt: skip
        dweight += dy * n
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * length + column, dweight, mask=column < length)


def rms_norm_fake_quantize_dynamic_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    checks.rms_norm(x, weight, 0)
    checks.grad(grad, x)
    checks.rms_norm_rstd(rstd, x)
    if scale is not None:
        checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    if x.numel() == 0:
        return reference.rms_norm_fake_quantize_dynamic_backward(
            grad, x, weight, rstd, scale, zero_point, quant_min, quant_max, weight_grad
        )
    length = x.shape[-1]
    rows = x.numel() // length
    groups, group_size = 0, length  # one scale for all: no row moves on to the next
    if scale is not None:
        scale, zero_point = scale.contiguous(), None if zero_point is None else zero_point.contiguous()
        if scale.numel() > 1 or rows == 1:
            groups, group_size = scale.shape[-1], length // scale.shape[-1]
    block, share, config = configs.norm_backward(rows, length)
    x, weight = _arguments(x, weight)
    before = (grad.contiguous(), x, weight, rstd.contiguous(), scale, zero_point)
    bounds = (float(quant_min), float(quant_max))
    config["CLIPS"] = scale is not None
    dx, partial = torch.empty_like(x), None
    programs = ceil_div(rows, share)
    if weight is not None and weight_grad:
        partial = torch.empty(programs, length, dtype=torch.float32, device=x.device)
    if length <= block:
        sizes = (rows, length, groups, group_size, share)
        launch(rms_norm_backward_kernel, (programs,), *before, dx, partial, *bounds, *sizes, BLOCK=block, **config)
    else:
        launch(
            rms_norm_long_backward_kernel, (rows,), *before, dx, *bounds, length, groups, group_size, BLOCK=block,
            **config,
        )  # fmt: skip
        if partial is not None:
            grid = (programs, ceil_div(length, block))
            sizes = (rows, length, groups, group_size, share)
            launch(rms_norm_long_weight_kernel, grid, *before, partial, *bounds, *sizes, BLOCK=block, **config)
    if weight is None or partial is None:
        return dx, rstd.new_empty(0)
    return dx, partial.sum(0).to(weight.dtype)
