"""Attention in fp32 without masks and gradients: what converted transformers compute between their integer layers.

``qkernels::dot_product_attention(q, k, v, causal, scale)`` is softmax(scale · q kᵀ) v for q of [batch, heads, rows,
size], k of [batch, heads', keys, size] and v of [batch, heads', keys, size'], where heads' divides heads. ``causal``:
row i sees the keys 0 to i; where a hidden row of v holds a NaN or an infinity, row i may be NaN, as it always is by the
formula: 0 times that is. The result's memory is [batch, rows, heads, size'], which a linear layer reads next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..reference import dot_product_attention as reference


def _samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 4 and x.dtype == torch.float32 and x.numel():
        shape = [min(size, 20) for size in x.shape]
        q, k, v = (torch.randn(shape[0], heads, shape[2], shape[3]) for heads in (2 * shape[1], shape[1], shape[1]))
        yield q, k, v, False, 0.5
        yield k, k, v, True, 1.0


dot_product_attention = library.define(
    "dot_product_attention",
    "(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> Tensor",
    reference.dot_product_attention,
    reference.metadata,
    cpu=("avx512", "avx2", "scalar"),
    samples=_samples,
    sums=(0,),
)
