"""The arithmetic of the kernels: exact rounding, IEEE division, scales with a floor, one bit per element.

On a GPU the exact operations are single PTX instructions. The interpreter knows no PTX and gets the same bits from
plain arithmetic. Kernels must be launched without FMA contraction (see launch.py).
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32
# The largest finite numbers, less four units in the last place.
TOP: tl.constexpr = tl.constexpr(3.4028226550889045e38)
TOP64: tl.constexpr = tl.constexpr(1.7976927062588728e308)


@triton.jit
def bound(n):
    """n as a bound of range(). In the interpreter n is an array of one element, which new versions of numpy refuse."""
    if INTERPRETED:
        return n.handle.data.item()
    else:
        return n


@triton.jit
def widen(x):
    """x in the dtype that kernels compute in: fp32, or fp64 where x is fp64."""
    if x.dtype == tl.float64:
        return x
    elif INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter's own conversion is wrong for denormals.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded once, half to even, to a floating dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion truncates.
        y = x.to(tl.float32)
        bits = y.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(y != y, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """An fp64 in another floating dtype, by way of fp32 as torch does."""
    if dtype == tl.float64:
        return x
    else:
        return narrow(x.to(tl.float32), dtype)


def bits_of(number: float) -> int:
    """The bits of a double as an integer: Triton passes a float to a kernel in fp32."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


@triton.jit
def float_of_bits(bits, dtype: tl.constexpr):
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def rint(x):
    """x rounded to an integer, half to even; NaN and infinities stay."""
    if INTERPRETED:
        if x.dtype == tl.float64:
            big = 6755399441055744.0  # 1.5 · 2**52
            return tl.where(tl.abs(x) < 4503599627370496.0, (x + big) - big, x)
        else:
            return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, _rint_large(x))
    elif x.dtype == tl.float64:
        return tl.inline_asm_elementwise("cvt.rni.f64.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _rint_large(x):
    # From 2**22 to 2**23 there are halves; beyond, every fp32 is an integer. Exact in fp64.
    return tl.where(
        tl.abs(x) < 8388608.0, ((x.to(tl.float64) + 6755399441055744.0) - 6755399441055744.0).to(tl.float32), x
    )


@triton.jit
def divide(a, b):
    """a / b, correctly rounded."""
    if INTERPRETED:
        return a / b
    elif b.dtype == tl.float64:
        return tl.inline_asm_elementwise(
            "div.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], dtype=tl.float64, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded."""
    if INTERPRETED:
        return 1.0 / x
    elif x.dtype == tl.float64:
        return tl.inline_asm_elementwise("rcp.rn.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def effective_scale(scale):
    """A scale below the smallest normal fp32 acts as that value; a negative or NaN one is NaN."""
    return tl.where(scale >= TINY, scale, tl.where(scale >= 0, TINY, float("nan")).to(scale.dtype))


@triton.jit
def clamp(x, low, high):
    """x between low and high; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(x):
    """x where it is positive, else 0; NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_inside(q, low, high):
    return (q >= low) & (q <= high)


@triton.jit
def counts_inside(steps, q, z, low, high, LSQ: tl.constexpr):
    """Where the gradient passes: where the code q is in the range; with LSQ where x/scale is, bounds excluded."""
    if LSQ:
        return (steps > low - z) & (steps < high - z)
    else:
        return is_inside(q, low, high)


@triton.jit
def store_bits(mask_ptr, inside, first, count, BLOCK: tl.constexpr):
    """Stores BLOCK truth values (of any shape) as bits, low bit first: those of ``count`` elements from ``first`` on.

    ``first`` is a multiple of 8; bits beyond ``count`` must be False already.
    """
    bits = tl.reshape(inside, [BLOCK // 8, 8]).to(tl.int32) << tl.arange(0, 8)[None, :]
    index = tl.arange(0, BLOCK // 8)
    tl.store(mask_ptr + first // 8 + index, tl.sum(bits, 1).to(tl.uint8), mask=index < (count - first + 7) // 8)


@triton.jit
def _ordered(x):
    """Integers that compare as the floats do."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(key):
    if key.dtype == tl.int64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lowest(x, axis: tl.constexpr):
    """The minimum along an axis, or NaN if there is one: as an integer NaN is the lowest here."""
    key = _ordered(x)
    return _from_ordered(
        tl.min(tl.where(x != x, (tl.zeros_like(key) - 1) << (key.dtype.primitive_bitwidth - 1), key), axis)
    )


@triton.jit
def highest(x, axis: tl.constexpr):
    """The maximum along an axis, or NaN if there is one: as an integer NaN is the highest here."""
    key = _ordered(x)
    return _from_ordered(
        tl.max(tl.where(x != x, ~((tl.zeros_like(key) - 1) << (key.dtype.primitive_bitwidth - 1)), key), axis)
    )


@triton.jit
def within_reach(high):
    """High ends of ranges, finite ones at most four roundings below the largest number: see the reference."""
    if high.dtype == tl.float64:
        return tl.where((high > TOP64) & (high < float("inf")), TOP64, high)
    else:
        return tl.where((high > TOP) & (high < float("inf")), TOP, high)


@triton.jit
def choose_qparams(low, high, quant_min, quant_max, steps, middle, floor, SYMMETRIC: tl.constexpr):
    """Scale and zero point (a float that holds an integer) that cover [low, high] and zero; NaN gives a NaN scale."""
    low = tl.minimum(low, 0.0, propagate_nan=tl.PropagateNan.ALL)
    high = tl.maximum(high, 0.0, propagate_nan=tl.PropagateNan.ALL)
    low, high = -within_reach(-low), within_reach(high)
    if SYMMETRIC:
        amax = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
        scale = divide(amax, tl.zeros_like(amax) + steps)
        zero_point = tl.zeros_like(scale) + middle
    else:
        # Half the range over half the steps: the same bits, and no range overflows.
        scale = divide(high * 0.5 - low * 0.5, tl.zeros_like(low) + (quant_max - quant_min) * 0.5)
    scale = tl.maximum(scale, floor, propagate_nan=tl.PropagateNan.ALL)
    if not SYMMETRIC:
        zero_point = clamp(quant_min - rint(divide(low, scale)), quant_min, quant_max)
        zero_point = tl.where(zero_point != zero_point, quant_min, zero_point)
    return scale, zero_point
