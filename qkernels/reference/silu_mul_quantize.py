"""SwiGLU's product and dynamic quantization in one, in plain torch.

v = silu(gate) · up, in the compute dtype (fp32; fp64 for fp64), is quantized with the range of its own groups, as in
``fake_quantize_dynamic``; it is not rounded to the inputs' dtype before that. The exponential is written out in
additions, multiplications and powers of two, each rounded once, so that every kernel gives the same bits on every
device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .fake_quantize import (
    check_grad,
    check_group_size,
    compute_dtype,
    dynamic_qparams,
    fake_quantize_forward,
    inside_range,
)
from .quantize import quantize
from .rms_norm_quantize import row_major


@dataclass(frozen=True)
class Exp:
    """How exp is computed in one dtype: 2**n · p(r), x = n·ln 2 + r, |r| ≤ ln(2)/2.

    ln2_high has so few bits that n·ln2_high is exact. coefficients are p's, the highest power first. Beyond low the
    result acts as exp(low), beyond high as infinity.
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


# Every constant is a number of its dtype. The fp32 polynomial has a relative error of 2**-28 (a minimax fit with the
# first two coefficients held at 1), the fp64 one, a Taylor series, 2**-57.
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


def exp(x: Tensor) -> Tensor:
    """e**x within 2 units in the last place, the same bits on every device."""
    c = EXP[x.dtype]
    x = x.clamp(c.low, c.high)
    n = (x * c.log2e).round()
    r = x - n * c.ln2_high
    r = r - n * c.ln2_low
    p = torch.full_like(r, c.coefficients[0])
    for coefficient in c.coefficients[1:]:
        p = p * r + coefficient
    power = ((n.nan_to_num().to(c.integer) + c.exponent_bias) << c.mantissa_bits).view(x.dtype)
    return p * power


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + exp(-x))


def check(gate: Tensor, up: Tensor, group_size: int) -> None:
    if not gate.is_floating_point():
        raise RuntimeError(
            f"gate: got {gate.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16"
        )
    if up.dtype != gate.dtype:
        raise RuntimeError(f"up: got {up.dtype}; accepted: gate's dtype, {gate.dtype}")
    if up.shape != gate.shape:
        raise RuntimeError(f"up: got shape {list(up.shape)}; accepted: gate's shape {list(gate.shape)}")
    if up.device != gate.device:
        raise RuntimeError(f"up: got a tensor on {up.device}; accepted: gate's device, {gate.device}")
    check_group_size(gate, group_size)


def product(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.to(compute_dtype(gate))
    return (g * sigmoid(g)) * up.to(g.dtype)


def silu_mul_fake_quantize_dynamic_forward(
    gate: Tensor, up: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, scale and zero point (int32)."""
    check(gate, up, group_size)
    v = product(gate, up)
    scale, zero_point = dynamic_qparams(v, group_size, quant_min, quant_max, symmetric)
    return row_major(fake_quantize_forward(v, scale, zero_point, quant_min, quant_max), gate.dtype), scale, zero_point


def silu_mul_quantize_dynamic(
    gate: Tensor, up: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q (int8), scale and zero point (int32): dequantized, the values of the fake-quantize op bit for bit."""
    check(gate, up, group_size)
    v = product(gate, up)
    scale, zero_point = dynamic_qparams(v, group_size, quant_min, quant_max, symmetric)
    return row_major(quantize(v, scale, zero_point, quant_min, quant_max, torch.int8), torch.int8), scale, zero_point


def silu_mul_fake_quantize_dynamic_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor]:
    """dgate and dup. A scale says what was clipped; without one nothing was."""
    check(gate, up, 0)
    check_grad(grad, gate)
    g = gate.to(compute_dtype(gate))
    u, dy = up.to(g.dtype), grad.to(g.dtype)
    if scale is not None:
        dy = torch.where(inside_range(product(gate, up), scale, zero_point, quant_min, quant_max), dy, 0)
    dgate, dup = gradients(dy, g, u, sigmoid(g))
    return row_major(dgate, gate.dtype), row_major(dup, gate.dtype)


def gradients(dy: Tensor, g: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Of g·s·u, where s is the sigmoid of g."""
    silu = g * s
    return (dy * u) * (s + silu * (1 - s)), dy * silu
