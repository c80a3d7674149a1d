"""Which elements of x share a scale: x as runs of elements in memory order, and the channel of each run.

A dense x in memory order is a sequence of runs. A run is ``inner`` elements that share one channel, i.e. one element of
scale. The pattern of channels repeats after ``period`` runs. Within a period the channel is the number of the run, or a
mixed-radix number of three or six digits (size0, size1, …), each with its stride in scale. Three digits are enough for
blocks of two dims, and six for blocks of one dim of four in any memory order.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import clamp, effective_scale, reciprocal, rint, widen

# How a block of elements finds its parameters: the kernels' MODE.
ONE: tl.constexpr = tl.constexpr(0)  # one channel for all
NUMBERS: tl.constexpr = tl.constexpr(1)  # one channel, given by value
LONG: tl.constexpr = tl.constexpr(2)  # runs are as long as a block or longer: it meets two channels at most
TILE: tl.constexpr = tl.constexpr(3)  # a block is whole runs, whose length is a power of two
SHORT: tl.constexpr = tl.constexpr(4)  # other runs that are shorter than a block: each element finds its own channel
COLUMN: tl.constexpr = tl.constexpr(5)  # runs of one element


class View(NamedTuple):
    """The numbers that kernels take as one argument. ``*_magic`` is ceil(2**31 / n): to multiply by it divides by n."""

    inner: int
    inner_magic: int
    period: int
    period_magic: int
    size1: int
    size2: int
    size3: int
    size4: int
    size5: int
    stride0: int
    stride1: int
    stride2: int
    stride3: int
    stride4: int
    stride5: int


class Granularity(NamedTuple):
    view: View
    channels: int
    runs: int
    digits: int  # 1: the channel is the number of the run in its period; 3, 6: it has that many digits


def _magic(n: int) -> int:
    return 0 if n < 2 else -(-(2**31) // n)


def _view(inner: int, period: int, digits: tuple[tuple[int, int], ...] = ()) -> View:
    sizes, strides = zip(*digits, *[(1, 0)] * (6 - len(digits)), strict=True)
    return View(inner, _magic(inner), period, _magic(period), *sizes[1:], *strides)


ONE_CHANNEL = Granularity(_view(1, 1), 1, 1, 1)


@functools.lru_cache(4096)
def factors_of(
    shape: tuple[int, ...], strides: tuple[int, ...], scale_shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(size, stride in scale) of the steps of a dense x in memory order, outermost first; stride 0: one channel."""
    scale_stride, step = [0] * len(scale_shape), 1
    for dim in reversed(range(len(scale_shape))):
        scale_stride[dim] = step
        step *= scale_shape[dim]
    factors: list[tuple[int, int]] = []
    for dim in sorted(range(len(shape)), key=lambda dim: -strides[dim]):
        blocks = scale_shape[dim]
        for size, stride in ((blocks, scale_stride[dim] if blocks > 1 else 0), (shape[dim] // blocks, 0)):
            if size == 1:
                continue
            if factors and factors[-1][1] == size * stride:
                factors[-1] = (factors[-1][0] * size, stride)
            else:
                factors.append((size, stride))
    return tuple(factors)


@functools.lru_cache(4096)
def _granularity(shape: tuple[int, ...], strides: tuple[int, ...], scale_shape: tuple[int, ...]) -> Granularity | None:
    factors = list(factors_of(shape, strides, scale_shape))
    inner = factors.pop()[0] if factors[-1][1] == 0 else 1
    runs = math.prod(shape) // inner
    period = runs
    if factors[0][1] == 0:
        period //= factors.pop(0)[0]
    channels = math.prod(scale_shape)
    if len(factors) == 1 and factors[0][1] == 1:
        return Granularity(_view(inner, period), channels, runs, 1)
    if len(factors) > 6:
        return None
    count = 3 if len(factors) <= 3 else 6
    digits = ((1, 0),) * (count - len(factors)) + tuple(factors)
    return Granularity(_view(inner, period, digits), channels, runs, count)


def granularity_of(x: Tensor, scale: Tensor) -> Granularity:
    """The granularity of a scale for a dense, non-empty x that is not ``unsupported_granularity``."""
    found = ONE_CHANNEL if scale.numel() == 1 else _granularity(x.shape, x.stride(), scale.shape)
    assert found is not None
    return found


def rows_of(rows: int, length: int) -> Granularity:
    """A contiguous x in rows of ``length`` elements, each a channel."""
    return Granularity(_view(length, rows), rows, rows, 1)


def unsupported_granularity(x: Tensor, scale: Tensor) -> str | None:
    if x.dim() < 3 or scale.numel() == 1 or scale.dim() != x.dim() or x.numel() == 0:
        return None
    for blocks, size in zip(scale.shape, x.shape, strict=True):
        if blocks == 0 or size % blocks:
            return None  # refused with a message, later
    if _granularity(x.shape, torch.empty_like(x, device="meta").stride(), scale.shape) is None:
        return f"takes scales of at most six factors in memory order, got {list(scale.shape)} for {list(x.shape)}"
    return None


# In the kernels.


@triton.jit
def block_index(MODE: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr):
    """Offsets of a block's elements from its first: [BLOCK], or [runs, INNER] where it is a tile of whole runs."""
    if MODE == TILE:
        return tl.arange(0, BLOCK // INNER)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    else:
        return tl.arange(0, BLOCK)


@triton.jit
def divide_by_magic(n, magic):
    """n // m with magic = ceil(2**31 / m), m ≥ 2: exact while n · m < 2**31."""
    return tl.umulhi(n.to(tl.uint32) * 2, magic.to(tl.uint32)).to(tl.int32)


@triton.jit
def channel_of(position, view, DIGITS: tl.constexpr):
    """The channel of runs by their positions in the period."""
    if DIGITS == 1:
        return position
    channel = tl.zeros_like(position)
    if DIGITS == 6:
        channel += position % view.size5 * view.stride5
        position = position // view.size5
        channel += position % view.size4 * view.stride4
        position = position // view.size4
        channel += position % view.size3 * view.stride3
        position = position // view.size3
    channel += position % view.size2 * view.stride2
    position = position // view.size2
    return channel + position // view.size1 * view.stride0 + position % view.size1 * view.stride1


@triton.jit
def later_position(position, step, view, WRAP: tl.constexpr):
    """Positions in the period that are ``step`` runs (a block of int32) after ``position`` (an int64)."""
    if WRAP == 0:  # there is one period, and a block may go beyond its end
        return tl.minimum(position + step, view.period - 1)
    elif WRAP == 1:  # a period is longer than a block
        there = position + step
        return tl.where(there >= view.period, there - view.period, there)
    else:
        there = position.to(tl.int32) + step
        return there - divide_by_magic(there, view.period_magic) * view.period


@triton.jit
def load_params(
    scale, zero_point, channel, low, high, DTYPE: tl.constexpr, ZERO_POINT: tl.constexpr, MODE: tl.constexpr = ONE
):
    """Scale, 1/scale and zero point of channels. A float zero point is rounded half to even and clamped."""
    if MODE == NUMBERS:
        s = effective_scale(tl.cast(scale, DTYPE))
        return s, reciprocal(s), tl.cast(zero_point, DTYPE)
    else:
        s = effective_scale(widen(tl.load(scale + channel)).to(DTYPE))
        if ZERO_POINT == 0:
            z = tl.zeros_like(s)
        else:
            if ZERO_POINT == 1:
                raw = tl.load(zero_point + channel)
            else:
                raw = tl.load(zero_point)
            if raw.dtype.is_floating():
                z = clamp(rint(widen(raw).to(DTYPE)), low, high)
            else:
                z = raw.to(DTYPE)
                z = tl.where((z >= low) & (z <= high), z, float("nan"))  # no check looks at values on a GPU
        return s, reciprocal(s), z


@triton.jit
def block_params(
    start, index, scale, zero_point, low, high, view,
    DTYPE: tl.constexpr, ZERO_POINT: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Scale, 1/scale and zero point of the elements ``start + index``, in a shape that broadcasts to index's."""
    if MODE == ONE or MODE == NUMBERS:  # noqa: SIM109
        return load_params(scale, zero_point, 0, low, high, DTYPE, ZERO_POINT, MODE)
    elif MODE == LONG:
        run = start // view.inner
        edge = (run + 1) * view.inner - start
        position = run % view.period
        after = tl.where(position + 1 == view.period, 0, position + 1)
        s0, i0, z0 = load_params(scale, zero_point, channel_of(position, view, DIGITS), low, high, DTYPE, ZERO_POINT)
        s1, i1, z1 = load_params(scale, zero_point, channel_of(after, view, DIGITS), low, high, DTYPE, ZERO_POINT)
        first = index < edge
        return tl.where(first, s0, s1), tl.where(first, i0, i1), tl.where(first, z0, z1)
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
        position = later_position(run % view.period, step, view, WRAP)
        return load_params(scale, zero_point, channel_of(position, view, DIGITS), low, high, DTYPE, ZERO_POINT)
