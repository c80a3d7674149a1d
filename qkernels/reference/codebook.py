"""Non-uniform quantization in plain torch: y = level · scale, with the level of the codebook nearest to x / scale.

Arithmetic is fp32 (fp64 for fp64 inputs) and 1/scale is computed once, as in fake_quantize. The midpoints between
neighbouring levels decide which level is nearest: if n midpoints lie below x·(1/scale), it is level n of the ascending
levels, counted from 0. So an x on a midpoint goes to the lower level. NaN stays NaN; infinities go to the end levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..layouts import pack_mask
from .fake_quantize import compute_dtype, expand, qparams
from .fake_quantize_learnable import sum_to


class Levels(NamedTuple):
    """A codebook in ascending order."""

    ascending: Tensor
    midpoints: Tensor  # one fewer than levels
    order: Tensor  # index of each ascending level in the codebook


def sound(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """The levels in the compute dtype; if one is not finite all become NaN, so that a training run shows it."""
    levels = codebook.detach().to(dtype)
    return torch.where(levels.isfinite().all(), levels, torch.nan)


def levels_of(codebook: Tensor, dtype: torch.dtype) -> Levels:
    ascending, order = torch.sort(sound(codebook, dtype), stable=True)
    midpoints = ascending[:-1] * 0.5 + ascending[1:] * 0.5  # halves first: two levels of 3e38 must not overflow
    return Levels(ascending, midpoints.nan_to_num(nan=torch.inf), order)


def nearest(v: Tensor, levels: Levels) -> Tensor:
    """How many midpoints lie below v: the index of the nearest of the ascending levels; 0 for NaN."""
    return torch.bucketize(torch.where(v.isnan(), -torch.inf, v).contiguous(), levels.midpoints)


def quantized(v: Tensor, levels: Levels) -> Tensor:
    return torch.where(v.isnan(), v, levels.ascending[nearest(v, levels)])


def inside_levels(v: Tensor, levels: Levels) -> Tensor:
    """Whether v lies between the lowest and the highest level, both included; False for NaN."""
    return (v >= levels.ascending[0]) & (v <= levels.ascending[-1])


def scaled(x: Tensor, scale: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Levels]:
    """x/scale, scale (both in the compute dtype) and the levels."""
    s, inv, _ = qparams(x, scale, None, 0, 0)
    return x.detach().to(s.dtype) * inv, s, levels_of(codebook, s.dtype)


def inside_codebook(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    v, _, levels = scaled(x, scale, codebook)
    return inside_levels(v, levels)


def fake_quantize_codebook_forward(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    checks.codebook(x, scale, codebook)
    v, s, levels = scaled(x, scale, codebook)
    return torch.empty_like(x).copy_(quantized(v, levels) * s)


def fake_quantize_codebook_forward_mask(x: Tensor, scale: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the mask: one bit per element, whether the gradient passes."""
    y = fake_quantize_codebook_forward(x, scale, codebook)
    return y, pack_mask(inside_codebook(x, scale, codebook), y)


def fake_quantize_codebook_backward(grad: Tensor, x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    checks.values("x", x)
    checks.grad(grad, x)
    checks.codebook(x, scale, codebook)
    return torch.empty_like(x).copy_(torch.where(inside_codebook(x, scale, codebook), grad, 0))


def fake_quantize_codebook_learnable_backward(
    grad: Tensor, x: Tensor, scale: Tensor, codebook: Tensor, grad_factor: float, learn_codebook: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and codebook (empty unless learn_codebook), straight through the choice of the level.

    dx = dy inside the codebook's range, else 0; dscale sums dy·(level − x/scale) inside and dy·level outside; the
    gradient of a level sums dy·scale over the elements that are quantized to it (NaN counts for the lowest).
    """
    checks.values("x", x)
    checks.grad(grad, x)
    checks.codebook(x, scale, codebook)
    v, s, levels = scaled(x, scale, codebook)
    inside = inside_levels(v, levels)
    dy = grad.to(s.dtype)
    dscale = dy * (quantized(v, levels) - torch.where(inside, v, 0))
    dlevels = codebook.new_zeros(codebook.numel() if learn_codebook else 0, dtype=torch.float64)
    if learn_codebook:
        sums = torch.zeros_like(dlevels).index_add_(0, nearest(v, levels).reshape(-1), (dy * s).double().reshape(-1))
        dlevels.scatter_(0, levels.order, sums)
    return (
        torch.empty_like(x).copy_(torch.where(inside, grad, 0)),
        (sum_to(dscale, scale) * grad_factor).to(scale.dtype),
        (dlevels * grad_factor).to(codebook.dtype),
    )


def quantize_codebook(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Codes: the index of the nearest level in the codebook as given. NaN gets the code of 0."""
    checks.codebook(x, scale, codebook)
    v, _, levels = scaled(x, scale, codebook)
    codes = levels.order[nearest(torch.where(v.isnan(), 0, v), levels)]
    return torch.empty_like(x, dtype=torch.uint8).copy_(codes)


def dequantize_codebook(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """codebook[code] · scale; a code beyond the last level gives NaN."""
    checks.dequantize_codebook(codes, scale, codebook, dtype)
    levels = sound(codebook, compute_dtype(torch.empty(0, dtype=dtype)))
    s = expand(scale.detach(), codes).to(levels.dtype)
    s = torch.where(s < 0, torch.nan, s.clamp(min=torch.finfo(torch.float32).tiny))
    values = torch.nn.functional.pad(levels, (0, checks.LEVELS[1] - levels.numel()), value=torch.nan)[codes.long()]
    return torch.empty_like(codes, dtype=dtype).copy_(values * s)
