"""Calibration statistics in Triton: exact counts by integer atomics, sums of squares in a fixed order without any."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..reference import statistics as reference
from ..reference.fake_quantize import compute_dtype
from .common import configs
from .common.configs import ceil_div
from .common.granularity import (
    COLUMN,
    LONG,
    ONE,
    TILE,
    block_index,
    channel_of,
    divide_by_magic,
    later_position,
    unsupported_granularity,
)
from .common.launch import launch
from .common.numerics import clamp, effective_scale, reciprocal, rint, widen
from .common.pointwise import blocks, dense_and_like, in_blocks


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    return unsupported_granularity(args[0], args[1]) if op == "histogram" else None


@triton.jit
def channels_of(
    start, index, view, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """The channel of each element ``start + index``, in a shape that broadcasts to index's."""
    if MODE == ONE:
        return tl.zeros_like(index)
    elif MODE == LONG:
        run = start // view.inner
        position = run % view.period
        after = tl.where(position + 1 == view.period, 0, position + 1)
        first = channel_of(position, view, DIGITS)
        return tl.where(index < (run + 1) * view.inner - start, first, channel_of(after, view, DIGITS))
    else:
        if MODE == TILE:
            run = start // INNER
            step = tl.arange(0, BLOCK // INNER)[:, None]
        elif MODE == COLUMN:
            run = start
            step = index
        else:
            run = start // view.inner
            step = divide_by_magic((start - run * view.inner).to(tl.int32) + index, view.inner_magic)
        return channel_of(later_position(run % view.period, step, view, WRAP), view, DIGITS)


@triton.jit
def slot_of(x, low, high, inv, bins):
    """Slot 0: below; 1 to bins: inside; then above and NaN."""
    t = (x - low) * inv
    t = tl.where(t == t, t, 0.0)  # 0·infinity: the range is empty, x is in it
    last = tl.cast(bins, x.dtype) - 1.0
    inside = tl.minimum(tl.maximum(t, 0.0), last).to(tl.int32) + 1  # the floor, as t is not negative
    slot = tl.where(x >= low, tl.where(x <= high, inside, bins + 1), 0)
    return tl.where(x == x, slot, bins + 2)


@triton.jit(do_not_specialize=["view", "bins"])
def histogram_kernel(
    x_ptr, low_ptr, high_ptr, inv_ptr, count_ptr, bins, numel, view,
    MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here))
    channel = channels_of(start, index, view, MODE, DIGITS, WRAP, BLOCK, INNER)
    low, high, inv = tl.load(low_ptr + channel), tl.load(high_ptr + channel), tl.load(inv_ptr + channel)
    slot = slot_of(x, low, high, inv, bins)
    if MODE == ONE:
        # All zeros go to one slot: counted one by one, those after a ReLU would wait for each other.
        zeros = tl.sum(((x == 0.0) & here).to(tl.int32))
        at = slot_of(tl.zeros_like(tl.load(low_ptr)), tl.load(low_ptr), tl.load(high_ptr), tl.load(inv_ptr), bins)
        tl.atomic_add(count_ptr + at, zeros.to(tl.int64), sem="relaxed")
        here = here & (x != 0.0)
    address = count_ptr + channel.to(tl.int64) * (bins + 3) + slot
    tl.atomic_add(address, tl.full(slot.shape, 1, tl.int64), mask=here, sem="relaxed")


def histogram(x: Tensor, low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    checks.histogram(x, low, high, bins)
    x, _ = dense_and_like(x)
    slots = torch.zeros((*low.shape, bins + 3), dtype=torch.int64, device=x.device)
    numel = x.numel()
    if numel:
        view, constexprs = in_blocks(x, low)
        lows, highs = low.to(compute_dtype(x)).contiguous(), high.to(compute_dtype(x)).contiguous()
        inv = torch.full_like(lows, bins) / (highs - lows)
        launch(
            histogram_kernel, blocks(numel, constexprs), x, lows, highs, inv, slots, bins, numel, view,
            num_warps=configs.warps(constexprs["BLOCK"]), **constexprs,
        )  # fmt: skip
    return slots[..., 1:-2].contiguous(), torch.cat((slots[..., :1], slots[..., -2:]), -1)


@triton.jit(do_not_specialize=["channels", "pieces"])
def quantization_errors_kernel(
    x_ptr, scale_ptr, zero_point_ptr, partial_ptr, quant_min, quant_max, channels, length, pieces,
    CANDIDATES: tl.constexpr, ZERO_POINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The errors of a piece of one channel, which stays in registers while all candidates are tried on it."""
    program = tl.program_id(0).to(tl.int64)
    channel, piece = program // pieces, program % pieces
    index = piece * BLOCK + tl.arange(0, BLOCK)
    here = index < length
    x = widen(tl.load(x_ptr + channel * length + index, mask=here, other=0.0))
    low, high = tl.cast(quant_min, x.dtype), tl.cast(quant_max, x.dtype)
    for k in range(CANDIDATES):
        at = k * channels + channel
        s = effective_scale(widen(tl.load(scale_ptr + at)).to(x.dtype))
        z = tl.zeros_like(s)
        if ZERO_POINT:
            raw = tl.load(zero_point_ptr + at)
            if raw.dtype.is_floating():
                z = clamp(rint(widen(raw).to(x.dtype)), low, high)
            else:
                z = raw.to(x.dtype)
                z = tl.where((z >= low) & (z <= high), z, float("nan"))  # no check looks at values on a GPU
        error = (clamp(rint(x * reciprocal(s)) + z, low, high) - z) * s - x
        total = tl.sum(tl.where(here, error * error, 0.0))
        tl.store(partial_ptr + at * pieces + piece, total.to(tl.float64))


def quantization_errors(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    checks.quantization_errors(x, scale, zero_point, quant_min, quant_max)
    shape, candidates = scale.shape[1:], scale.shape[0]
    channels = shape.numel()
    if x.numel() == 0 or scale.numel() == 0:
        return scale.new_zeros(scale.shape, dtype=torch.float64)
    rows = reference.blocks_of(x, shape).contiguous()  # a copy where channels are not the outermost dims
    length = rows.shape[1]
    block = configs.errors_block(length)
    pieces = ceil_div(length, block)
    partial = torch.empty((candidates, channels, pieces), dtype=torch.float64, device=x.device)
    launch(
        quantization_errors_kernel, (channels * pieces,), rows, scale.contiguous(),
        None if zero_point is None else zero_point.contiguous(), partial, float(quant_min), float(quant_max), channels,
        length, pieces, num_warps=configs.warps(block), CANDIDATES=candidates, ZERO_POINT=zero_point is not None,
        BLOCK=block,
    )  # fmt: skip
    return partial.sum(-1).reshape(scale.shape)
