"""SwiGLU's product and dynamic quantization in one kernel: gate and up are read once from memory.

Groups of up to 16384 elements stay in registers; longer ones are read and computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..reference import silu_mul_quantize as reference
from .common import configs
from .common.activation import sigmoid
from .common.configs import ceil_div
from .common.granularity import load_params
from .common.groups import extremes, qparams, quantized, store_qparams
from .common.launch import launch
from .common.numerics import bound, is_inside, narrow, rint, widen


def unsupported(op: str, *args: Any) -> str | None:
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
        return "takes torch.float32, torch.float16 and torch.bfloat16, got torch.float64"
    if op == "silu_mul_fake_quantize_dynamic_backward":
        if args and args[3] is not None and args[3].numel() != 1 and args[3].shape[:-1] != args[1].shape[:-1]:
            return "takes one scale, or scales for each row"
    elif args and args[2] == 0:
        return "takes groups and rows (group_size None makes a scale of the whole tensor)"
    return None


@triton.jit
def product(gate_ptr, up_ptr, at, here):
    """silu(gate) · up, and 0 elsewhere."""
    g = widen(tl.load(gate_ptr + at, mask=here, other=0.0))
    return (g * sigmoid(g)) * widen(tl.load(up_ptr + at, mask=here, other=0.0))


@triton.jit
def silu_mul_forward_kernel(
    gate_ptr, up_ptr, y_ptr, scale_ptr, zero_point_ptr, quant_min, quant_max, steps, middle, groups, group_size,
    SYMMETRIC: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """A tile of whole groups."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    at = tl.arange(0, BLOCK_SIZE)[None, :]
    here = (group < groups) & (at < group_size)
    index = group * group_size + at
    v = product(gate_ptr, up_ptr, index, here)
    low, high = extremes(v, tl.zeros_like(v), tl.zeros_like(v), SYMMETRIC)
    scale, inv, z = qparams(low, high, quant_min, quant_max, steps, middle, SYMMETRIC)
    store_qparams(scale_ptr + group, zero_point_ptr + group, scale, z, group < groups)
    y = quantized(v, scale, inv, z, quant_min, quant_max, y_ptr.dtype.element_ty, SYMMETRIC)
    tl.store(y_ptr + index, y, mask=here)


@triton.jit
def silu_mul_long_forward_kernel(
    gate_ptr, up_ptr, y_ptr, scale_ptr, zero_point_ptr, quant_min, quant_max, steps, middle, groups, group_size,
    SYMMETRIC: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One group of any length, piece by piece, twice."""
    group = tl.program_id(0).to(tl.int64)
    low = tl.zeros([BLOCK_GROUPS, BLOCK_SIZE], tl.float32)
    high = tl.zeros([BLOCK_GROUPS, BLOCK_SIZE], tl.float32)
    for start in range(0, bound(group_size), BLOCK_SIZE):
        at = start + tl.arange(0, BLOCK_SIZE)[None, :]
        v = product(gate_ptr, up_ptr, group * group_size + at, at < group_size)
        low, high = extremes(v, low, high, SYMMETRIC)
    scale, inv, z = qparams(low, high, quant_min, quant_max, steps, middle, SYMMETRIC)
    one = tl.zeros([1, 1], tl.int64) + group
    store_qparams(scale_ptr + one, zero_point_ptr + one, scale, z, one < groups)
    for start in range(0, bound(group_size), BLOCK_SIZE):
        at = start + tl.arange(0, BLOCK_SIZE)[None, :]
        index = group * group_size + at
        v = product(gate_ptr, up_ptr, index, at < group_size)
        y = quantized(v, scale, inv, z, quant_min, quant_max, y_ptr.dtype.element_ty, SYMMETRIC)
        tl.store(y_ptr + index, y, mask=at < group_size)


def _run(
    gate: Tensor, up: Tensor, group_size: int, low: int, high: int, symmetric: bool, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    length = gate.shape[-1]
    group_size = length if group_size == -1 else group_size
    scale = torch.empty([*gate.shape[:-1], length // group_size], dtype=torch.float32, device=gate.device)
    zero_point = torch.empty_like(scale, dtype=torch.int32)
    whole, tile = configs.product_tile(scale.numel(), group_size)
    half = (high - low) // 2
    launch(
        silu_mul_forward_kernel if whole else silu_mul_long_forward_kernel,
        (ceil_div(scale.numel(), tile["BLOCK_GROUPS"]),), gate.contiguous(), up.contiguous(), y, scale, zero_point,
        float(low), float(high), float(half), float(high - half), scale.numel(), group_size, SYMMETRIC=symmetric,
        **tile,
    )  # fmt: skip
    return y, scale, zero_point


def silu_mul_fake_quantize_dynamic_forward(
    gate: Tensor, up: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.silu_mul(gate, up, group_size)
    checks.dynamic_range(quant_min, quant_max, None)
    args = (gate, up, group_size, quant_min, quant_max, symmetric)
    if gate.numel() == 0:
        return reference.silu_mul_fake_quantize_dynamic_forward(*args)
    return _run(*args, gate.new_empty(gate.shape))


def silu_mul_quantize_dynamic(
    gate: Tensor, up: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.silu_mul(gate, up, group_size)
    checks.dynamic_range(quant_min, quant_max, torch.int8)
    args = (gate, up, group_size, quant_min, quant_max, symmetric)
    if gate.numel() == 0:
        return reference.silu_mul_quantize_dynamic(*args)
    return _run(*args, gate.new_empty(gate.shape, dtype=torch.int8))


@triton.jit
def silu_mul_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, scale_ptr, zero_point_ptr, dgate_ptr, dup_ptr, quant_min, quant_max, groups, group_size,
    CLIPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """A tile of groups, or of a piece of one group."""
    pieces = (group_size - 1) // BLOCK_SIZE + 1  # group_size may be the last int32
    program = tl.program_id(0).to(tl.int64)
    group = program // pieces * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    at = program % pieces * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    here = (group < groups) & (at < group_size)
    index = group * group_size + at
    g = widen(tl.load(gate_ptr + index, mask=here, other=0.0))
    u = widen(tl.load(up_ptr + index, mask=here, other=0.0))
    dy = widen(tl.load(grad_ptr + index, mask=here, other=0.0))
    s = sigmoid(g)
    silu = g * s
    if CLIPS:
        channel = tl.minimum(group, groups - 1)
        _, inv, z = load_params(scale_ptr, zero_point_ptr, channel, quant_min, quant_max, tl.float32, 1)
        dy = tl.where(is_inside(rint((silu * u) * inv) + z, quant_min, quant_max), dy, 0.0)
    dgate = (dy * u) * (s + silu * (1.0 - s))
    tl.store(dgate_ptr + index, narrow(dgate, dgate_ptr.dtype.element_ty), mask=here)
    tl.store(dup_ptr + index, narrow(dy * silu, dup_ptr.dtype.element_ty), mask=here)


def silu_mul_fake_quantize_dynamic_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor]:
    checks.silu_mul(gate, up, 0)
    checks.grad(grad, gate)
    if scale is not None:
        checks.fake_quantize(gate, scale, zero_point, quant_min, quant_max)
    numel = gate.numel()
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if numel == 0:
        return dgate, dup
    groups = 1
    if scale is not None:
        scale, zero_point = scale.contiguous(), None if zero_point is None else zero_point.contiguous()
        groups = scale.numel()
    tile = configs.product_backward(numel // groups)
    pieces = ceil_div(numel // groups, tile["BLOCK_SIZE"])
    launch(
        silu_mul_backward_kernel, (ceil_div(groups, tile["BLOCK_GROUPS"]) * pieces,), grad.contiguous(),
        gate.contiguous(), up.contiguous(), scale, zero_point, dgate, dup, float(quant_min), float(quant_max), groups,
        numel // groups, CLIPS=scale is not None, **tile,
    )  # fmt: skip
    return dgate, dup
