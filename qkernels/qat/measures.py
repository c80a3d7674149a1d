"""Measures of what quantization does to a tensor."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def sqnr(reference: Tensor, approximation: Tensor) -> float | None:
    """10·log10(Σ reference² / Σ (reference − approximation)²) in dB; inf if equal, None for a reference of zeros.

    −inf if the approximation is infinite somewhere, NaN if either holds NaN. None too if the shapes differ, which
    happens behind a routing that chose another way.
    """
    if reference.shape != approximation.shape:
        return None
    reference, approximation = reference.detach().double(), approximation.detach().double()
    signal, noise = float(reference.square().sum()), float((reference - approximation).square().sum())
    if signal == 0:
        return None
    ratio = signal / noise if noise else math.inf
    return 10 * math.log10(ratio) if ratio else -math.inf


def clipped_share(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> float:
    """The share of x's elements whose code lies outside the range."""
    if x.numel() == 0:
        return 0.0
    while scale.dim() == x.dim() and any(s not in (1, n) for s, n in zip(scale.shape, x.shape, strict=True)):
        repeats = [n // s if s not in (1, n) else 1 for s, n in zip(scale.shape, x.shape, strict=True)]
        for dim, repeat in enumerate(repeats):
            scale = scale.repeat_interleave(repeat, dim)
            zero_point = None if zero_point is None else zero_point.repeat_interleave(repeat, dim)
    q = (x.detach().float() / scale).round() + (0 if zero_point is None else zero_point)
    return float(((q < quant_min) | (q > quant_max)).float().mean())


def as_json(value: Any) -> Any:
    """The value with "inf", "-inf" and "nan" for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
