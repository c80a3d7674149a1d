"""Statistics for the choice of ranges, in plain torch: histograms and sums of squared quantization errors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .fake_quantize import compute_dtype, expand, fake_quantize_forward
from .fake_quantize_learnable import sum_to


def histogram(x: Tensor, low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Counts of x in equal bins of [low, high], and counts of the values below, above and NaN.

    A value inside counts in bin min(floor((x − low)·inv), bins − 1) with inv = bins/(high − low); each operation is
    rounded to fp32 (fp64 for fp64). If high = low, bin 0 counts the values that equal them.
    """
    checks.histogram(x, low, high, bins)
    dtype = compute_dtype(x)
    values = x.detach().to(dtype)
    lo, hi = expand(low.detach().to(dtype), x), expand(high.detach().to(dtype), x)
    inv = torch.full_like(lo, bins) / (hi - lo)  # torch computes int / tensor as int · (1 / tensor)
    at = ((values - lo) * inv).nan_to_num(0.0, posinf=float(bins)).clamp(0, bins - 1).long()
    at = torch.where(values <= hi, at + 1, bins + 1)  # slot 0: below; bins + 1: above; bins + 2: NaN
    at = torch.where(values >= lo, at, 0)
    at = torch.where(values.isnan(), bins + 2, at)
    slots = bins + 3
    channel = expand(torch.arange(low.numel(), device=x.device).reshape(low.shape), x)
    counts = torch.zeros(low.numel() * slots, dtype=torch.int64, device=x.device)  # torch.bincount would wait for a GPU
    counts = counts.scatter_add_(0, (at + channel * slots).reshape(-1), torch.ones_like(at).reshape(-1))
    counts = counts.reshape(*low.shape, slots)
    return counts[..., 1:-2].contiguous(), torch.cat((counts[..., :1], counts[..., -2:]), -1)


def blocks_of(x: Tensor, shape: torch.Size) -> Tensor:
    """x as ``[prod(shape), values of one block]``; ``shape`` is the granularity."""
    if shape.numel() == 1:
        return x.reshape(1, -1)
    split = [n for p, size in zip(shape, x.shape, strict=True) for n in (p, size // max(p, 1))]
    dims = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return x.reshape(split).permute(dims).reshape(shape.numel(), -1)


def quantization_errors(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Sums of (fake_quantize(x) − x)², in fp64, over the block of each element of each candidate scale[k].

    The fake-quantized value is not rounded to x's dtype. Zero points are rounded and clamped as in fake_quantize.
    """
    checks.quantization_errors(x, scale, zero_point, quant_min, quant_max)
    values = x.detach().to(compute_dtype(x))
    errors = scale.new_empty(scale.shape, dtype=torch.float64)
    for k, s in enumerate(scale):
        z = None if zero_point is None else zero_point[k]
        if s.numel():
            errors[k] = sum_to((fake_quantize_forward(values, s, z, quant_min, quant_max) - values).square(), s)
    return errors
