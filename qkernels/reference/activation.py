"""Activation functions that give the same bits in every kernel on every device.

The exponential consists of additions, multiplications and powers of two, each rounded once; the other functions use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exp:
    """How exp is computed in one dtype: 2**n · p(r), x = n·ln 2 + r, |r| ≤ ln(2)/2.

    ln2_high has so few bits that n·ln2_high is exact. coefficients are those of p, the highest power first. Below low
    the result is exp(low), above high it is infinity.
    """

    low: float
    high: float
    log2e: float
    ln2_high: float
    ln2_low: float
    coefficients: tuple[float, ...]
    integer: torch.dtype
    exponent_bias: int
    mantissa_bits: int


# Its dtype holds every constant exactly. The fp32 polynomial is a minimax fit with the first two coefficients held at 1
# and has a relative error of 2**-28; the fp64 polynomial is a Taylor series and has one of 2**-57.
EXP = {
    torch.float32: Exp(
        low=-87.25,
        high=88.75,
        log2e=1.4426950216293335,
        ln2_high=0.693359375,
        ln2_low=-0.00021219444170128554,
        coefficients=(
            0.001381422160193324,
            0.00836889911442995,
            0.04166840389370918,
            0.1666651964187622,
            0.4999999403953552,
            1.0,
            1.0,
        ),
        integer=torch.int32,
        exponent_bias=127,
        mantissa_bits=23,
    ),
    torch.float64: Exp(
        low=-708.25,
        high=710.0,
        log2e=1.4426950408889634,
        ln2_high=0.6931471806019545,
        ln2_low=-4.2009150726810846e-11,
        coefficients=tuple(1 / math.factorial(k) for k in range(13, -1, -1)),
        integer=torch.int64,
        exponent_bias=1023,
        mantissa_bits=52,
    ),
}


def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, r and 2**n: e**x is (p·r + 1)·2**n."""
    c = EXP[x.dtype]
    x = x.clamp(c.low, c.high)
    n = (x * c.log2e).round()
    r = x - n * c.ln2_high
    r = r - n * c.ln2_low
    p = torch.full_like(r, c.coefficients[0])
    for coefficient in c.coefficients[1:-1]:
        p = p * r + coefficient
    # A table of powers of two, made from their bits: up to torch 2.11 vmap takes no view of n's bits in another dtype.
    exponents = torch.arange(2 * c.exponent_bias + 2, dtype=c.integer, device=x.device)
    powers = (exponents << c.mantissa_bits).view(x.dtype)
    return p, r, powers[n.nan_to_num().to(c.integer) + c.exponent_bias]


def exp(x: Tensor) -> Tensor:
    """e**x within 2 units in the last place, the same bits on every device."""
    p, r, power = _split(x)
    return (p * r + 1) * power


def expm1(x: Tensor) -> Tensor:
    """e**x − 1 for x ≤ 0, also near 0 within a few units in the last place."""
    p, r, power = _split(x)
    return p * r * power + (power - 1)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + exp(-x))


def _signed(magnitude: Tensor, x: Tensor) -> Tensor:
    return torch.where(x >= 0, magnitude, 0 - magnitude)


def tanh(x: Tensor) -> Tensor:
    """tanh(|x|) = −t/(2 + t), where t = e**(−2|x|) − 1."""
    t = expm1(x.abs() * -2)
    return _signed((0 - t) / (t + 2), x)


def times_sigmoid(x: Tensor, gate: Tensor) -> Tensor:
    """x·sigmoid(gate) by one division."""
    return x / (1 + exp(-gate))


def tanh_times_sigmoid(x: Tensor, gate: Tensor) -> Tensor:
    """tanh(x)·sigmoid(gate) by one division."""
    t = expm1(x.abs() * -2)
    return _signed((0 - t) / ((t + 2) * (1 + exp(-gate))), x)


# gelu(x) = x·Φ(x), and Φ(−|x|) = erfc(z)/2 = exp(−z²)·t·q(t), where z = |x|/√2 and t = 1/(1 + GELU_STEP·z). The
# coefficients of q, the highest power first, are a minimax fit: in real numbers gelu's error is below 4e-9.
SQRT_HALF = 0.7071067690849304
GELU_STEP = 0.3984375
GELU = (
    -0.10470201075077057,
    0.377718985080719,
    -0.22054575383663177,
    0.2596719563007355,
    0.07092434912919998,
    0.11693238466978073,
)


def relu(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0, x)


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x) for fp32 x, the form with the error function, within 4e-7 for |x| ≤ 12."""
    z = x.abs() * SQRT_HALF
    t = 1 / (1 + z * GELU_STEP)
    tail = torch.full_like(t, GELU[0])
    for coefficient in GELU[1:]:
        tail = tail * t + coefficient
    tail = tail * t * exp(-(z * z))
    return x * torch.where(x < 0, tail, 1 - tail)


GELU_TANH = (1.5957691669464111, 0.07135481387376785)  # 2·√(2/π), and 0.044715 times it


def gelu_tanh(x: Tensor) -> Tensor:
    """The form with tanh: x·(1 + tanh(u))/2 = x·sigmoid(2u) with 2u = x·(GELU_TANH[0] + GELU_TANH[1]·x²)."""
    return times_sigmoid(x, x * (x * x * GELU_TANH[1] + GELU_TANH[0]))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)


def hardsigmoid(x: Tensor) -> Tensor:
    return clamp(x + 3, 0, 6) / 6


def hardswish(x: Tensor) -> Tensor:
    return x * clamp(x + 3, 0, 6) / 6


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, x, x * slope)


# What the linear layers accept.
FUNCTIONS = {"none": lambda x: x, "relu": relu, "gelu": gelu, "silu": silu}
