"""What the fused dynamic kernels share: groups of a row, each of which chooses its own scale."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import TINY, choose_qparams, clamp, highest, lowest, narrow, reciprocal, rint


@triton.jit
def extremes(v, low, high, SYMMETRIC: tl.constexpr):
    """The lowest and highest value so far, element by element; where symmetric, the highest |v|. NaN stays."""
    if SYMMETRIC:
        return low, tl.maximum(high, tl.abs(v), propagate_nan=tl.PropagateNan.ALL)
    else:
        low = tl.minimum(low, v, propagate_nan=tl.PropagateNan.ALL)
        return low, tl.maximum(high, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def qparams(low, high, quant_min, quant_max, steps, middle, SYMMETRIC: tl.constexpr):
    """Scale, its reciprocal and zero point, [groups, 1] each, from the ``extremes`` of [groups, size].

    Every range includes zero, so lanes beyond a group may hold it.
    """
    if SYMMETRIC:
        # The bits of what is not negative order as integers, with NaN above infinity: no lane hides it.
        top = tl.max(high.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
        bottom = tl.zeros_like(top)
    else:
        bottom, top = lowest(low, 1), highest(high, 1)
    scale, zero_point = choose_qparams(bottom, top, quant_min, quant_max, steps, middle, TINY, SYMMETRIC)
    return scale[:, None], reciprocal(scale)[:, None], zero_point[:, None]


@triton.jit
def quantized(v, scale, inv, zero_point, quant_min, quant_max, dtype: tl.constexpr, SYMMETRIC: tl.constexpr):
    """The codes of v where dtype is int8, else v quantized and back. NaN has no code: it gets the zero point."""
    q = rint(v * inv) + zero_point
    if not SYMMETRIC:  # a symmetric range holds all of its values
        q = clamp(q, quant_min, quant_max)
    if dtype == tl.int8:
        return tl.where(q != q, zero_point, q).to(tl.int8)
    else:
        return narrow((q - zero_point) * scale, dtype)


@triton.jit
def store_qparams(scale_ptr, zero_point_ptr, scale, zero_point, here):
    """[groups, 1] each, to pointers of that shape."""
    tl.store(scale_ptr, scale, mask=here)
    tl.store(zero_point_ptr, zero_point.to(tl.int32), mask=here)
