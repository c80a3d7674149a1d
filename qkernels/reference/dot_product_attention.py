"""Attention in plain torch (arXiv 1706.03762, equation 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks


def metadata(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """An empty result, whose heads are neighbours in memory: [batch, rows, heads, size]."""
    checks.attention(q, k, v)
    batch, heads, rows, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v; heads of k and v serve as many neighbouring heads of q each."""
    y = metadata(q, k, v, causal, scale)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return y.copy_(scores.softmax(3) @ v)
