"""``quantize_dynamic_transposed``: a matrix and its transpose as int8, for all three matmuls of a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import layouts, library
from ..reference import quantize_transposed as reference
from ..reference.fake_quantize import compute_dtype
from .dynamic import range_of_bits
from .stochastic import seed_and_offset


def _transposed_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        yield x, 127, None, 0, None
        yield x, 7, -5, 3, torch.tensor([2**40])


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    dtype = compute_dtype(x)
    return (
        layouts.empty_aligned_rows(x, rows, columns),
        x.new_empty((rows, 1), dtype=dtype),
        layouts.empty_aligned_rows(x, columns, rows),
        x.new_empty((columns, 1), dtype=dtype),
    )


quantize_transposed_op = library.define(
    "quantize_dynamic_transposed",
    "(Tensor x, SymInt quant_max, SymInt? seed, SymInt offset, Tensor? offset_tensor) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.quantize_dynamic_transposed,
    _fake,
    cpu=("avx512", "avx2", "scalar"),
    triton=True,
    samples=_transposed_samples,
)


def quantize_dynamic_transposed(
    x: Tensor, *, bits: int = 8, seed: int | None = None, offset: int | Tensor = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The codes of the rows of x and of the rows of x.t(), in one read for the ranges and one for the codes.

    A matrix product of codes sums along the rows of both operands. A linear layer's three products sum along different
    dims of the same matrices: the output sums along the rows of x and weight, the gradients along columns of weight, x
    and the output's gradient. This op returns both forms with contiguous rows, each with its own scales.

    Args:
        x: [R, C]; fp32, fp64, fp16 or bf16; any strides.
        bits: 2 to 8; codes are −(2**(bits−1)−1) … 2**(bits−1)−1, without a zero point.
        seed, offset: seed=None rounds to nearest. Else rounding is stochastic, as in ``quantize_stochastic``: element i
            of x, counted row by row, draws one number for both outputs.

    Returns:
        (q [R, C] int8, scale [R, 1], q_t [C, R] int8, scale_t [C, 1]). scale is fp32 (fp64 for fp64 x), the row's
        largest magnitude / (2**(bits−1)−1); x ≈ q·scale ≈ (q_t·scale_t).t(). Rows of q and q_t begin at multiples of
        16 bytes: they are contiguous if C (for q_t: R) is a multiple of 16. A row with a NaN has a NaN scale; a row
        with an infinity has an infinite scale and codes of 0; products with either are NaN. Not differentiable.

    Raises:
        RuntimeError: x is not a floating matrix.
        ValueError: bits is not 2 to 8.
    """
    quant_max = range_of_bits(bits)[1]
    if seed is None:
        return quantize_transposed_op(x.detach(), quant_max, None, 0, None)
    return quantize_transposed_op(x.detach(), quant_max, *seed_and_offset(seed, offset))
