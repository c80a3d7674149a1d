"""Observed fake quantization in Triton, bit for bit as the reference."""

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
from .common.numerics import (
    choose_qparams,
)
from .common.pointwise import dense_and_like, empty_mask
from .common.ranges import join_ranges, range_partials
from .fake_quantize import forward


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    return unsupported_granularity(args[0], args[5])


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
    checks.observe(x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point, quant_min, quant_max)
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
