"""Quantization with the range of x itself: ``fake_quantize_dynamic`` and ``quantize_dynamic``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import layouts, library, samples
from ..reference import dynamic as reference
from ..reference import transforms
from ..reference.fake_quantize import compute_dtype
from .autograd import already_masked, straight_through, transformed

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), cuda=True, triton=True)


def _fake_dynamic(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, zero_point = fake_dynamic_qparams(x, group_size)
    return (
        torch.empty_like(x),
        scale,
        zero_point,
        x.new_empty(0, dtype=torch.uint8) if symmetric else layouts.mask_like(x),
    )


def fake_dynamic_qparams(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    shape = [1] * x.dim() if group_size == 0 else [*x.shape[:-1], 1 if group_size == -1 else x.shape[-1] // group_size]
    scale = x.new_empty(shape, dtype=compute_dtype(x))
    return scale, torch.empty_like(scale, dtype=torch.int32)


_dynamic_forward = _define(
    "fake_quantize_dynamic_forward",
    "(Tensor x, SymInt group_size, SymInt quant_min, SymInt quant_max, bool symmetric) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.fake_quantize_dynamic_forward,
    _fake_dynamic,
    samples=samples.dynamic,
)


def range_of_bits(bits: int) -> tuple[int, int]:
    """The signed integer range of ``bits`` bits, e.g. (−128, 127) for 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: got {bits}; accepted: 2 to 8")
    return layouts.code_range(bits)


def fake_quantize_dynamic(
    x: Tensor,
    *,
    bits: int = 8,
    group_size: int | None = -1,
    symmetric: bool = True,
    return_qparams: bool = False,
) -> Any:
    """Fake quantization whose scale comes from x itself, group by group, in one pass.

    Args:
        x: any shape; fp32, fp64, fp16 or bf16.
        bits: 2 to 8; the range is −2**(bits−1) … 2**(bits−1)−1.
        group_size: −1: each row of the last dim (per token); None: the whole tensor; G: groups of G elements of the
            last dim, which G must divide.
        symmetric: True: scale = amax / (2**(bits−1)−1), so the largest value is never clipped. False: scale = (max −
            min) / (2**bits−1) over a range that includes 0, with an integer zero point.
        return_qparams: also return scale (fp32; fp64 for fp64 x; shape ``[..., K/G]``) and zero_point (int32).

    Returns:
        y, or (y, scale, zero_point). The gradient takes the range for a constant: dx is dy where x was not clipped,
        which with symmetric=True is everywhere.

    Raises:
        RuntimeError: x has another dtype, or group_size does not divide the last dim.
        ValueError: bits is not 2 to 8.
    """
    args = (group_size_argument(group_size), *range_of_bits(bits), symmetric)
    if transformed():
        result = transforms.fake_quantize_dynamic(x, *args)
        return result if return_qparams else result[0]
    # Raw ops have no gradient formula, so they never see a tensor that wants one.
    y, scale, zero_point, mask = _dynamic_forward(x.detach(), *args)
    if torch.is_grad_enabled() and x.requires_grad:
        y = straight_through(x, y) if symmetric else already_masked(x, y, mask)
    return (y, scale, zero_point) if return_qparams else y


def group_size_argument(group_size: int | None) -> int:
    """The group size as the raw ops take it: 0 stands for the whole tensor."""
    if group_size == 0:
        raise RuntimeError("group_size: got 0; accepted: -1 (a row), None (the whole tensor), or a positive divisor")
    return 0 if group_size is None else group_size


quantize_dynamic_op = _define(
    "quantize_dynamic",
    "(Tensor x, SymInt group_size, SymInt quant_min, SymInt quant_max, bool symmetric) -> (Tensor, Tensor, Tensor)",
    reference.quantize_dynamic,
    lambda x, group_size, quant_min, quant_max, symmetric: (
        torch.empty_like(x, dtype=torch.int8),
        *fake_dynamic_qparams(x, group_size),
    ),
    samples=samples.dynamic,
)


def quantize_dynamic(
    x: Tensor, *, bits: int = 8, group_size: int | None = -1, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes behind ``fake_quantize_dynamic``, with the range of x itself.

    Args:
        x, bits, group_size, symmetric: as in ``fake_quantize_dynamic``.

    Returns:
        q (int8, x's shape), scale (fp32, fp64 for fp64 x; ``[..., 1]``, ``[..., K/G]`` or ones) and zero_point (int32,
        scale's shape). Not differentiable: gradients take the range, and so the scale, for a constant.

    Raises:
        RuntimeError: x has another dtype, or group_size does not divide the last dim.
        ValueError: bits is not 2 to 8.
    """
    quant_min, quant_max = range_of_bits(bits)
    return quantize_dynamic_op(x.detach(), group_size_argument(group_size), quant_min, quant_max, symmetric)
