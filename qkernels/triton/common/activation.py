"""The activation functions of reference/activation.py in fp32, operation by operation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...reference import activation as reference
from .numerics import reciprocal

EXP = reference.EXP[torch.float32]
LOW: tl.constexpr = tl.constexpr(EXP.low)
HIGH: tl.constexpr = tl.constexpr(EXP.high)
LOG2E: tl.constexpr = tl.constexpr(EXP.log2e)
LN2_HIGH: tl.constexpr = tl.constexpr(EXP.ln2_high)
LN2_LOW: tl.constexpr = tl.constexpr(EXP.ln2_low)
C6: tl.constexpr = tl.constexpr(EXP.coefficients[0])
C5: tl.constexpr = tl.constexpr(EXP.coefficients[1])
C4: tl.constexpr = tl.constexpr(EXP.coefficients[2])
C3: tl.constexpr = tl.constexpr(EXP.coefficients[3])
C2: tl.constexpr = tl.constexpr(EXP.coefficients[4])
SQRT_HALF: tl.constexpr = tl.constexpr(reference.SQRT_HALF)
GELU_STEP: tl.constexpr = tl.constexpr(reference.GELU_STEP)
G5: tl.constexpr = tl.constexpr(reference.GELU[0])
G4: tl.constexpr = tl.constexpr(reference.GELU[1])
G3: tl.constexpr = tl.constexpr(reference.GELU[2])
G2: tl.constexpr = tl.constexpr(reference.GELU[3])
G1: tl.constexpr = tl.constexpr(reference.GELU[4])
G0: tl.constexpr = tl.constexpr(reference.GELU[5])


@triton.jit
def exp(x):
    """e**x, operation by operation as the reference; of a NaN it may make a number."""
    x = tl.minimum(tl.maximum(x, LOW), HIGH)
    # Adding 1.5·2**23 rounds to an integer, half to even, and leaves it in the low bits.
    shifted = x * LOG2E + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ((((C6 * r + C5) * r + C4) * r + C3) * r + C2) * r + 1.0
    p = p * r + 1.0
    return p * ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """1/(1 + exp(−x)); of a NaN it may make a number, but x·sigmoid(x) stays NaN."""
    return reciprocal(exp(-x) + 1.0)


@triton.jit
def gelu(x):
    z = tl.abs(x) * SQRT_HALF
    t = reciprocal(z * GELU_STEP + 1.0)
    tail = ((((G5 * t + G4) * t + G3) * t + G2) * t + G1) * t + G0
    tail = tail * t * exp(-(z * z))
    return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        return gelu(x)
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    else:
        return x
