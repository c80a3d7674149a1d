"""Scales that follow the range of what they quantize, in Triton: bit for bit as the reference, without a wait."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .common import configs
from .common.configs import ceil_div
from .common.granularity import granularity_of, unsupported_granularity
from .common.launch import launch
from .common.numerics import choose_qparams, narrow, widen
from .common.pointwise import dense_and_like
from .common.ranges import join_ranges, range_partials


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    return unsupported_granularity(args[0], args[1])


@triton.jit
def moved(old, new, part):
    return tl.where(part == 1, new, old + part * (new - old))


@triton.jit(do_not_specialize=["outer", "period", "inner", "low_ptr", "high_ptr"])
def follow_range_kernel(
    low_ptr, high_ptr, scale_ptr, zero_point_ptr, outer, period, inner, up, down, quant_min, quant_max, steps, middle,
    floor, SYMMETRIC: tl.constexpr, ZERO_POINT: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Moves the scales and zero points of CHANNELS channels."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < period
    low, high = join_ranges(low_ptr, high_ptr, channel, outer, period, inner, CHANNELS, PARTS)
    low, high = low.to(tl.float32), high.to(tl.float32)
    known = (low - low == 0) & (high - high == 0) & ((low != 0) | (high != 0))
    scale, zero_point = choose_qparams(low, high, quant_min, quant_max, steps, middle, floor, SYMMETRIC)
    old = tl.load(scale_ptr + channel, mask=here, other=1.0)
    part = tl.where(scale > old, tl.cast(up, tl.float32), tl.cast(down, tl.float32))
    moves = here & known & (part != 0)
    tl.store(scale_ptr + channel, moved(old, scale, part), mask=moves)
    if ZERO_POINT:
        dtype: tl.constexpr = zero_point_ptr.dtype.element_ty
        old_point = tl.load(zero_point_ptr + channel, mask=here, other=0)
        if dtype == tl.int32:
            new_point = moved(old_point.to(tl.float32), zero_point, part).to(tl.int32)
        else:
            new_point = narrow(moved(widen(old_point).to(tl.float32), zero_point, part), dtype)
        tl.store(zero_point_ptr + channel, new_point, mask=moves)


def follow_range(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    up: float,
    down: float,
) -> None:
    checks.follow_range(x, scale, zero_point, quant_min, quant_max, up, down)
    if x.numel() == 0:
        return
    x, _ = dense_and_like(x)
    partial, (outer, period, inner) = range_partials(x, granularity_of(x, scale))
    tile = configs.join(outer, period, inner)
    steps = (quant_max - quant_min) // 2
    launch(
        follow_range_kernel, (ceil_div(period, tile["CHANNELS"]),), *partial.unbind(), scale,
        scale if zero_point is None else zero_point, outer, period, inner, up, down, float(quant_min), float(quant_max),
        float(steps), float(quant_max - steps), torch.finfo(torch.float32).tiny, SYMMETRIC=symmetric,
        ZERO_POINT=zero_point is not None, **tile,
    )  # fmt: skip
