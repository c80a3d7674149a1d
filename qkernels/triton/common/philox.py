"""Uniform numbers of the elements of a tensor in memory order, as qkernels/reference/stochastic.py defines them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .numerics import rint


class Philox(NamedTuple):
    """The generator's seed and offset. An int64 in the device's memory may be added to the offset."""

    seed: int
    offset: int
    offset_tensor: Tensor | None


@triton.jit
def words(block, philox):
    """The four random words of blocks of four elements; ``block`` is int64."""
    number = tl.cast(philox.offset, tl.int64)
    if philox.offset_tensor is not None:
        number += tl.load(philox.offset_tensor)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + number.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (number >> 32).to(tl.uint32)
    return tl.philox(tl.cast(philox.seed, tl.int64), c0, c1, c2, c3)


@triton.jit
def fraction(word, DTYPE: tl.constexpr):
    return (word >> 8).to(tl.int32).to(DTYPE) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def uniforms_of_blocks(block, philox, DTYPE: tl.constexpr):
    """u of the four elements of each block, one after the other along the last dim."""
    w0, w1, w2, w3 = words(block, philox)
    return fraction(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)), DTYPE)


@triton.jit
def uniforms(element, philox, DTYPE: tl.constexpr):
    """u of any elements, at four times the cost."""
    w0, w1, w2, w3 = words(element >> 2, philox)
    at = element & 3
    return fraction(tl.where(at < 2, tl.where(at == 0, w0, w1), tl.where(at == 2, w2, w3)), DTYPE)


@triton.jit
def round_stochastically(steps, u):
    # Not tl.floor, which flushes denormals. An infinity has a NaN fraction, and stays.
    nearest = rint(steps)
    low = tl.where(steps >= nearest, nearest, nearest - 1)
    return tl.where(u >= steps - low, low, low + 1)
