"""Statistics for calibration, ``histogram`` and ``quantization_errors``, and the ranges that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import checks, library, samples
from ..reference import statistics as reference
from ..reference.ranges import qparams_of_range

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"))

# "mse" tries these fractions of the full range: 64 steps of 7 %, down to 1/79. Near its minimum the error grows with
# the square of the distance, so that half a step costs less than 0.3 % of the error.
CANDIDATES, CANDIDATES_PER_OCTAVE = 64, 10


def _histogram_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for shape in samples.granularities(x):
        yield x, -2 * torch.rand(shape), torch.rand(shape), 37
    yield x, torch.tensor([-2.0]), torch.tensor([2.0]), 2048


def _errors_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for shape in samples.granularities(x):
            scale = 0.01 + torch.rand(3, *shape)
            yield x, scale, None, *samples.INT4
            yield x, scale, torch.randint(-8, 8, scale.shape, dtype=torch.int32), *samples.INT4


_histogram = _define(
    "histogram",
    "(Tensor x, Tensor low, Tensor high, SymInt bins) -> (Tensor, Tensor)",
    reference.histogram,
    lambda x, low, high, bins: (
        low.new_empty((*low.shape, bins), dtype=torch.int64),
        low.new_empty((*low.shape, 3), dtype=torch.int64),
    ),
    triton=True,
    samples=_histogram_samples,
)
_quantization_errors = _define(
    "quantization_errors",
    "(Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max) -> Tensor",
    reference.quantization_errors,
    lambda x, scale, zero_point, quant_min, quant_max: scale.new_empty(scale.shape, dtype=torch.float64),
    triton=True,
    samples=_errors_samples,
    sums=(0,),
)


def histogram(x: Tensor, low: Tensor, high: Tensor, *, bins: int) -> tuple[Tensor, Tensor]:
    """Counts the values of x in ``bins`` equal bins of [low, high], and all others, without synchronisation.

    Args:
        x: any shape; fp32, fp64, fp16 or bf16.
        low, high: ends of the range, both inclusive, on x's device. Their shape is the granularity, as is scale's in
            ``fake_quantize``: one element, or x's rank with every dim dividing x's.
        bins: 1 to 2**20.

    Returns:
        counts (int64, ``[*low.shape, bins]``) and outside (int64, ``[*low.shape, 3]``): the values below low, above
        high, and NaN. A value inside counts in bin min(floor((x − low)·inv), bins − 1), inv = bins/(high − low). Each
        operation is rounded to fp32 (fp64 for fp64), so that every kernel gives the same counts.

    Raises:
        RuntimeError: an argument's dtype, device, shape or value does not fit; the message names it.
    """
    return _histogram(x.detach(), low.detach(), high.detach(), bins)


def quantization_errors(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, quant_min: int, quant_max: int
) -> Tensor:
    """Sums of squared quantization errors of x for many candidate scales, in one pass over x (not differentiable).

    Args:
        x: any shape; fp32, fp64, fp16 or bf16.
        scale: ``[K, *granularity]``: each scale[k] is one candidate, with a shape as in ``fake_quantize``.
        zero_point: None (0), or of scale's shape. A float one is clamped into the range.
        quant_min, quant_max: inclusive integer range, within ±2**24.

    Returns:
        fp64, of scale's shape: Σ (fake_quantize(x, scale[k]) − x)² over the values that share each element of scale.
        Terms are fp32 (fp64 for fp64); sums are deterministic.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    return _quantization_errors(x.detach(), scale.detach(), zero_point, quant_min, quant_max)


def check_percentile(percentile: float) -> None:
    if not (isinstance(percentile, Real) and 50 < float(percentile) <= 100):
        raise ValueError(f"percentile: got {percentile!r}; accepted: above 50, at most 100")


def percentile_range(x: Tensor, low: Tensor, high: Tensor, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The part of [low, high] that holds ``percentile`` % of |x| (symmetric), or of x counted from either end.

    The ends are values of x: each is the smallest value that at least ``percentile`` % of the values do not exceed.
    """
    check_percentile(percentile)
    checks.granularity("min_val", low, x)
    blocks = reference.blocks_of(x.detach().to(low.dtype), low.shape)
    if blocks.shape[1] == 0:
        return low, high
    rank = max(1, math.ceil(percentile / 100 * blocks.shape[1]))
    if symmetric:
        bound = blocks.abs().kthvalue(rank).values.reshape(low.shape)
        return torch.maximum(low, -bound), torch.minimum(high, bound)
    top = blocks.kthvalue(rank).values.reshape(low.shape)
    bottom = blocks.kthvalue(blocks.shape[1] + 1 - rank).values.reshape(low.shape)
    return torch.maximum(low, bottom), torch.minimum(high, top)


def fractions_of(low: Tensor) -> Tensor:
    """The fractions of the range [low, high] that "mse" tries, ``[K, 1, …]``; made on the device, without a copy."""
    steps = torch.arange(CANDIDATES, dtype=torch.float64, device=low.device)
    return torch.exp2(steps / -CANDIDATES_PER_OCTAVE).to(low.dtype).reshape(-1, *[1] * low.dim())


def candidate_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``fractions_of(low)``, and the scale and zero point of each, ``[K, *low.shape]``."""
    fractions = fractions_of(low)
    ends = low * fractions, high * fractions
    return fractions, *qparams_of_range(*ends, quant_min, quant_max, symmetric, eps)


def best_of(fractions: Tensor, errors: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range shrunk to the fraction with the smallest error; among equal errors the widest range wins."""
    best = fractions.reshape(-1)[errors.argmin(0)]
    return low * best, high * best


def mse_range(
    x: Tensor, low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """[low, high] shrunk to the fraction that quantizes x with the smallest squared error."""
    fractions, scale, zero_point = candidate_qparams(low, high, quant_min, quant_max, symmetric, eps)
    errors = quantization_errors(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max)
    return best_of(fractions, errors, low, high)
