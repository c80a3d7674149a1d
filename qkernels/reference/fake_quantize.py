"""Fake quantization in plain torch.

y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale. Arithmetic is fp32 (fp64 for
fp64 inputs), 1/scale is computed once, rounding is half to even, and the output is rounded once to x's dtype. The shape
of scale is the granularity: one element, or x's rank with every dim dividing x's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..layouts import pack_mask, unpack_mask


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def expand(param: Tensor, x: Tensor) -> Tensor:
    """Repeats each element of ``param`` over its block of x."""
    if param.numel() == 1:
        return param.reshape(())
    for dim, (blocks, size) in enumerate(zip(param.shape, x.shape, strict=True)):
        if 1 < blocks < size:
            param = param.repeat_interleave(size // blocks, dim)
        elif size == 0:
            param = param.narrow(dim, 0, min(blocks, 0))
    return param


def qparams(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """scale, 1/scale and zero point in the compute dtype, expanded to x.

    A scale below the smallest normal fp32 acts as that value; a negative or NaN scale gives NaN. A float zero point is
    rounded half to even and clamped into the range, forward and backward alike. An integer zero point outside the range
    gives NaN; ``checks.fake_quantize`` refuses it, except on a GPU, where it does not look.
    """
    dtype = compute_dtype(x)
    s = expand(scale.detach(), x).to(dtype)
    s = torch.where(s < 0, torch.nan, s.clamp(min=torch.finfo(torch.float32).tiny))
    if zero_point is None:
        z = torch.zeros((), dtype=dtype, device=x.device)
    else:
        z = expand(zero_point.detach(), x).to(dtype)
        if zero_point.is_floating_point():
            z = z.round().clamp(quant_min, quant_max)
        else:
            z = torch.where((z < quant_min) | (z > quant_max), torch.nan, z)
    return s, 1 / s, z


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = (x.to(s.dtype) * inv).round() + z
    return torch.empty_like(x).copy_((q.clamp(quant_min, quant_max) - z) * s)


def inside_range(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> Tensor:
    """Where the gradient of x passes: a bool tensor, False for NaN.

    It passes where the rounded code lies in the range, bounds included; with lsq, where x/scale + zero_point lies in
    the range before rounding, bounds excluded.
    """
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    return counts_inside(x.to(s.dtype) * inv, z, quant_min, quant_max, lsq)


def counts_inside(steps: Tensor, z: Tensor, quant_min: int, quant_max: int, lsq: bool) -> Tensor:
    if lsq:
        return (steps > quant_min - z) & (steps < quant_max - z)
    q = steps.round() + z
    return (q >= quant_min) & (q <= quant_max)


def fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> tuple[Tensor, Tensor]:
    y = fake_quantize_forward(x, scale, zero_point, quant_min, quant_max)
    return y, pack_mask(inside_range(x, scale, zero_point, quant_min, quant_max, lsq), y)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    lsq: bool = False,
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    inside = inside_range(x, scale, zero_point, quant_min, quant_max, lsq)
    return torch.empty_like(x).copy_(torch.where(inside, grad, 0))


def fake_quantize_backward_mask(grad: Tensor, mask: Tensor) -> Tensor:
    checks.mask(mask, grad)
    return torch.where(unpack_mask(mask, grad), grad, 0)
