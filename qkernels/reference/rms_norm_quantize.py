"""RMSNorm and dynamic quantization in one, in plain torch.

v = (x · rstd) · weight with rstd = 1/sqrt(mean(x²) + eps) over the last dim. v stays in the compute dtype (fp32; fp64
for fp64 x): it is quantized, without rounding to x's dtype before, with the range of its own groups, as in
``fake_quantize_dynamic``. Only the sum of squares may run in any order. Given rstd, all bits are fixed: see
``given_rstd`` and ``given_rstd_quantized``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .dynamic import dynamic_qparams
from .fake_quantize import compute_dtype, fake_quantize_forward, inside_range
from .quantize import quantize


def rstd_of(x: Tensor, eps: float) -> Tensor:
    """1/sqrt(mean(x²) + eps) of each row, shape [..., 1]; squares are in the compute dtype, their sum in fp64."""
    values = x.to(compute_dtype(x))
    mean = values.square().sum(-1, keepdim=True, dtype=torch.float64).to(values.dtype) / x.shape[-1]
    return row_major(1 / (mean + eps).sqrt(), values.dtype)


def normalized(x: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    v = x.to(rstd.dtype) * rstd
    return v if weight is None else v * weight.to(rstd.dtype)


def row_major(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)


def given_rstd(
    x: Tensor, weight: Tensor | None, rstd: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, scale and zero point; each kernel gives these bits for the rstd that it computed."""
    v = normalized(x, weight, rstd)
    scale, zero_point = dynamic_qparams(v, group_size, quant_min, quant_max, symmetric)
    return row_major(fake_quantize_forward(v, scale, zero_point, quant_min, quant_max), x.dtype), scale, zero_point


def given_rstd_quantized(
    x: Tensor, weight: Tensor | None, rstd: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``given_rstd``, with codes instead of y."""
    v = normalized(x, weight, rstd)
    scale, zero_point = dynamic_qparams(v, group_size, quant_min, quant_max, symmetric)
    return row_major(quantize(v, scale, zero_point, quant_min, quant_max, torch.int8), torch.int8), scale, zero_point


def rms_norm_fake_quantize_dynamic_forward(
    x: Tensor, weight: Tensor | None, eps: float, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, scale, zero point (int32) and rstd."""
    checks.rms_norm(x, weight, group_size)
    checks.dynamic_range(quant_min, quant_max, None)
    rstd = rstd_of(x, eps)
    return *given_rstd(x, weight, rstd, group_size, quant_min, quant_max, symmetric), rstd


def rms_norm_quantize_dynamic(
    x: Tensor, weight: Tensor | None, eps: float, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (int8), scale, zero point (int32) and rstd; dequantized, q equals y of the fake-quantize op bit for bit."""
    checks.rms_norm(x, weight, group_size)
    checks.dynamic_range(quant_min, quant_max, torch.int8)
    rstd = rstd_of(x, eps)
    return *given_rstd_quantized(x, weight, rstd, group_size, quant_min, quant_max, symmetric), row_major(
        rstd, rstd.dtype
    )


def rms_norm_fake_quantize_dynamic_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dweight (empty unless weight_grad).

    scale and zero_point tell what was clipped; scale None means that nothing was. With n = x·rstd, dy = grad where
    nothing was clipped, else 0, and u = dy·weight: dx = (u − n·mean(u·n))·rstd, and dweight sums dy·n over the rows.
    """
    checks.rms_norm(x, weight, 0)
    checks.grad(grad, x)
    checks.rms_norm_rstd(rstd, x)
    if scale is not None:
        checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    n, dy = normalized(x, None, rstd), grad.to(rstd.dtype)
    if scale is not None:
        inside = inside_range(normalized(x, weight, rstd), scale, zero_point, quant_min, quant_max)
        dy = torch.where(inside, dy, 0)
    u = dy if weight is None else dy * weight.to(rstd.dtype)
    mean = (u * n).sum(-1, keepdim=True, dtype=torch.float64).to(u.dtype) / x.shape[-1]
    dx = row_major((u - n * mean) * rstd, x.dtype)
    if weight is None or not weight_grad:
        return dx, rstd.new_empty(0)
    return dx, (dy * n)[None].flatten(end_dim=-2).sum(0, dtype=torch.float64).to(weight.dtype)
