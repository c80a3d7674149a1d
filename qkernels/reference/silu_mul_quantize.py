"""SwiGLU's product and dynamic quantization in one, in plain torch.

v = silu(gate) · up is in the compute dtype (fp32; fp64 for fp64) and is quantized, without rounding to the inputs'
dtype before, with the range of its own groups, as in ``fake_quantize_dynamic``. silu is that of activation.py, which
gives the same bits in every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .activation import sigmoid
from .dynamic import dynamic_qparams
from .fake_quantize import compute_dtype, fake_quantize_forward, inside_range
from .quantize import quantize
from .rms_norm_quantize import row_major


def product(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.to(compute_dtype(gate))
    return (g * sigmoid(g)) * up.to(g.dtype)


def silu_mul_fake_quantize_dynamic_forward(
    gate: Tensor, up: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, scale and zero point (int32)."""
    checks.silu_mul(gate, up, group_size)
    checks.dynamic_range(quant_min, quant_max, None)
    v = product(gate, up)
    scale, zero_point = dynamic_qparams(v, group_size, quant_min, quant_max, symmetric)
    return row_major(fake_quantize_forward(v, scale, zero_point, quant_min, quant_max), gate.dtype), scale, zero_point


def silu_mul_quantize_dynamic(
    gate: Tensor, up: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q (int8), scale and zero point (int32); dequantized, q equals y of the fake-quantize op bit for bit."""
    checks.silu_mul(gate, up, group_size)
    checks.dynamic_range(quant_min, quant_max, torch.int8)
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
    """dgate and dup. scale and zero_point tell what was clipped; scale None means that nothing was."""
    checks.silu_mul(gate, up, 0)
    checks.grad(grad, gate)
    if scale is not None:
        checks.fake_quantize(gate, scale, zero_point, quant_min, quant_max)
    g = gate.to(compute_dtype(gate))
    u, dy = up.to(g.dtype), grad.to(g.dtype)
    if scale is not None:
        dy = torch.where(inside_range(product(gate, up), scale, zero_point, quant_min, quant_max), dy, 0)
    dgate, dup = gradients(dy, g, u, sigmoid(g))
    return row_major(dgate, gate.dtype), row_major(dup, gate.dtype)


def gradients(dy: Tensor, g: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of g·s·u in g and u, where s is the sigmoid of g."""
    silu = g * s
    return (dy * u) * (s + silu * (1 - s)), dy * silu
