"""Quantization to integers and back: ``quantize``, ``dequantize``, ``choose_qparams``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks, library, samples
from ..reference import quantize as reference
from ..reference import transforms
from ..reference.ranges import qparams_of_range, stored
from .autograd import transformed
from .statistics import mse_range, percentile_range

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), cuda=True, triton=True)


def _quantize_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in samples.quantizer(x):
        yield *case, torch.int8


def _dequantize_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for scale, zero_point in samples.qparams(x):
        yield torch.randint(-128, 128, x.shape, dtype=torch.int8), scale, zero_point, x.dtype


_quantize = _define(
    "quantize",
    "(Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, ScalarType dtype) -> Tensor",
    reference.quantize,
    lambda x, scale, zero_point, quant_min, quant_max, dtype: torch.empty_like(x, dtype=dtype),
    samples=_quantize_samples,
)
dequantize_op = _define(
    "dequantize",
    "(Tensor q, Tensor scale, Tensor? zero_point, ScalarType dtype) -> Tensor",
    reference.dequantize,
    lambda q, scale, zero_point, dtype: torch.empty_like(q, dtype=dtype),
    samples=_dequantize_samples,
)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int | None = None,
    quant_max: int | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """Quantizes x to integers q = clamp(round(x/scale) + zero_point, quant_min, quant_max).

    Args:
        x: any shape; fp32, fp64, fp16 or bf16.
        scale, zero_point: as in ``fake_quantize``; the shape of scale is the granularity.
        quant_min, quant_max: inclusive range; by default all of dtype (for int32 the ±2**24 that fp32 holds exactly).
        dtype: torch.int8, torch.uint8 or torch.int32.

    Returns:
        A tensor of x's shape and memory layout. Infinities saturate; NaN becomes the zero point. Where x is not NaN,
        ``dequantize(quantize(x, …), …)`` equals ``fake_quantize(x, …)`` bit for bit. Integers carry no gradient;
        ``fake_quantize`` does.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    return _quantize(x, scale, zero_point, *range_of_codes(quant_min, quant_max, dtype), dtype)


def range_of_codes(quant_min: int | None, quant_max: int | None, dtype: torch.dtype) -> tuple[int, int]:
    """The given range; by default all codes of dtype that fp32 holds exactly."""
    checks.code_dtype("dtype", dtype)
    info, bound = torch.iinfo(dtype), checks.EXACT_INT
    return (
        max(info.min, -bound) if quant_min is None else quant_min,
        min(info.max, bound) if quant_max is None else quant_max,
    )


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(q − zero_point)·scale, computed in fp32 (fp64 for fp64) and rounded once to dtype.

    Args:
        q: int8, uint8 or int32, any shape.
        scale, zero_point: as in ``fake_quantize``.
        dtype: dtype of the result: torch.float32, torch.float64, torch.float16 or torch.bfloat16.

    Returns:
        A tensor of q's shape and memory layout, differentiable in scale and, straight through its rounding, in a float
        zero_point.

    Raises:
        RuntimeError: an argument's dtype, device or shape does not fit; the message names it.
    """
    if transformed() or (
        torch.is_grad_enabled() and (scale.requires_grad or (zero_point is not None and zero_point.requires_grad))
    ):
        return transforms.dequantize(q, scale, zero_point, dtype)
    return dequantize_op(q, scale, zero_point, dtype)


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    symmetric: bool = True,
    eps: float = 0.0,
    method: str = "minmax",
    x: Tensor | None = None,
    percentile: float = 99.99,
) -> tuple[Tensor, Tensor]:
    """Scale (dtype of min_val) and int32 zero point that cover [min_val, max_val] and zero, element by element.

    Symmetric: scale = max(|min|, |max|) / ((quant_max − quant_min) // 2), which never clips an extreme. Asymmetric:
    scale = (max − min) / (quant_max − quant_min), zero_point = quant_min − round(min/scale). A scale is at least eps
    and at least the smallest normal fp32. For fp16 and bf16 ranges it is computed in fp32, then rounded to the nearest
    positive value of the dtype.

    Args:
        min_val, max_val: the range, both of one shape; for "percentile" and "mse" the shape is the granularity. fp32,
            fp64, fp16 or bf16.
        quant_min, quant_max: inclusive integer range.
        symmetric: whether the zero point is 0 and the range its own mirror image.
        eps: the smallest scale.
        method: how much of the range to cover; clipping a few outliers makes the steps finer for all other values.
            "minmax": all. "percentile": the part that holds ``percentile`` % of |x| (symmetric) or of x counted from
            either end. "mse": the fraction, out of 64 from 1 down to 1/79, that quantizes x with the smallest squared
            error.
        x: the values themselves, for "percentile" and "mse".
        percentile: above 50, at most 100.

    Returns:
        scale and zero_point, of min_val's shape.

    Raises:
        RuntimeError: another dtype, shape or range.
        ValueError: another method or percentile, or no x although the method needs it.
    """
    for name, t in (("min_val", min_val), ("max_val", max_val)):
        checks.dense(name, t)
        if t.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            accepted = "torch.float32, torch.float64, torch.float16, torch.bfloat16"
            raise RuntimeError(f"{name}: got {t.dtype}; accepted: {accepted}")
    if min_val.shape != max_val.shape:
        raise RuntimeError(f"max_val: got shape {list(max_val.shape)}; accepted: min_val's, {list(min_val.shape)}")
    if quant_min >= quant_max:
        raise RuntimeError(f"quant_min: got {quant_min}; accepted: below quant_max {quant_max}")
    if method not in ("minmax", "percentile", "mse"):
        raise ValueError(f"method: got {method!r}; accepted: minmax, percentile, mse")
    if method != "minmax":
        if x is None:
            raise ValueError(f'x: got None with method="{method}"; accepted: the values, a tensor')
        if method == "percentile":
            min_val, max_val = percentile_range(x, min_val, max_val, percentile, symmetric)
        else:
            min_val, max_val = mse_range(x, min_val, max_val, quant_min, quant_max, symmetric, eps)
    dtype = min_val.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return qparams_of_range(min_val, max_val, quant_min, quant_max, symmetric, eps)
    # fp32 holds every range and step of fp16 and bf16; the zero point belongs to the rounded scale.
    scale, zero_point = qparams_of_range(min_val.float(), max_val.float(), quant_min, quant_max, symmetric, eps)
    scale = stored(scale, dtype).clamp(max=torch.finfo(dtype).max)
    if not symmetric:
        low = min_val.detach().float().clamp(max=0)
        zero_point = (quant_min - (low / scale.detach().float()).round()).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(quant_min).to(torch.int32)
