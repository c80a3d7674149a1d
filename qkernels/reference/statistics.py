"""Statistics that calibration chooses ranges by, in plain torch: histograms and sums of squared quantization errors."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake_quantize import EXACT_INT, check_granularity, compute_dtype, expand, fake_quantize_forward
from .fake_quantize_learnable import sum_to

MAX_BINS = 2**20


def check_histogram(x: Tensor, low: Tensor, high: Tensor, bins: int) -> None:
    if not x.is_floating_point():
        raise RuntimeError(f"x: got {x.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16")
    if not 1 <= bins <= MAX_BINS:
        raise RuntimeError(f"bins: got {bins}; accepted: 1 to {MAX_BINS}")
    for name, param in (("low", low), ("high", high)):
        if param.device != x.device:
            raise RuntimeError(f"{name}: got a tensor on {param.device}; accepted: x's device, {x.device}")
        if not param.is_floating_point():
            raise RuntimeError(f"{name}: got {param.dtype}; accepted: a floating dtype")
        check_granularity(name, param, x)
    if high.shape != low.shape:
        raise RuntimeError(f"high: got shape {list(high.shape)}; accepted: low's shape {list(low.shape)}")


def histogram(x: Tensor, low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Counts of x in equal bins of [low, high], and of what lies outside: below, above, NaN.

    Bin of a value inside: min(floor((x − low)·inv), bins − 1) with inv = bins/(high − low), each operation rounded to
    fp32 (fp64 for fp64). An empty range (high = low) counts the values that equal it in bin 0.
    """
    check_histogram(x, low, high, bins)
    dtype = compute_dtype(x)
    values = x.detach().to(dtype)
    lo, hi = expand(low.detach().to(dtype), x), expand(high.detach().to(dtype), x)
    inv = torch.full_like(lo, bins) / (hi - lo)  # bins / tensor would be bins · (1 / tensor)
    at = ((values - lo) * inv).nan_to_num(0.0, posinf=float(bins)).clamp(0, bins - 1).long()
    at = torch.where(values <= hi, at + 1, bins + 1)  # slot 0: below; bins + 1: above; bins + 2: NaN
    at = torch.where(values >= lo, at, 0)
    at = torch.where(values.isnan(), bins + 2, at)
    slots = bins + 3
    channel = expand(torch.arange(low.numel(), device=x.device).reshape(low.shape), x)
    counts = torch.zeros(low.numel() * slots, dtype=torch.int64, device=x.device)  # torch.bincount waits for a GPU
    counts = counts.scatter_add_(0, (at + channel * slots).reshape(-1), torch.ones_like(at).reshape(-1))
    counts = counts.reshape(*low.shape, slots)
    return counts[..., 1:-2].contiguous(), torch.cat((counts[..., :1], counts[..., -2:]), -1)


def blocks_of(x: Tensor, shape: torch.Size) -> Tensor:
    """x as ``[prod(shape), values that one element of shape speaks for]``."""
    if shape.numel() == 1:
        return x.reshape(1, -1)
    split = [n for p, size in zip(shape, x.shape, strict=True) for n in (p, size // max(p, 1))]
    dims = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return x.reshape(split).permute(dims).reshape(shape.numel(), -1)


def check_errors(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    if not x.is_floating_point():
        raise RuntimeError(f"x: got {x.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16")
    if quant_min > quant_max or quant_min < -EXACT_INT or quant_max > EXACT_INT:
        raise RuntimeError(
            f"quant_min, quant_max: got {quant_min}, {quant_max}; accepted: {-EXACT_INT} to {EXACT_INT} in order"
        )
    if not scale.is_floating_point():
        raise RuntimeError(f"scale: got {scale.dtype}; accepted: a floating dtype")
    for name, param in (("scale", scale), ("zero_point", zero_point)):
        if param is not None and param.device != x.device:
            raise RuntimeError(f"{name}: got a tensor on {param.device}; accepted: x's device, {x.device}")
    if scale.dim() == 0:
        raise RuntimeError("scale: got 0 dims; accepted: a first dim for the candidates, then the granularity")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise RuntimeError(
            f"zero_point: got shape {list(zero_point.shape)}; accepted: scale's shape {list(scale.shape)}"
        )
    check_granularity("scale[0]", scale.new_empty(scale.shape[1:]), x)


def quantization_errors(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Sums of (fake_quantize(x) − x)² for each candidate scale[k] over the blocks its elements speak for, in fp64.

    The fake-quantized value is not rounded to x's dtype. Zero points are rounded and clamped as in fake_quantize.
    """
    check_errors(x, scale, zero_point, quant_min, quant_max)
    values = x.detach().to(compute_dtype(x))
    errors = scale.new_empty(scale.shape, dtype=torch.float64)
    for k, s in enumerate(scale):
        z = None if zero_point is None else zero_point[k]
        if s.numel():
            errors[k] = sum_to((fake_quantize_forward(values, s, z, quant_min, quant_max) - values).square(), s)
    return errors
