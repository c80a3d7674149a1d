"""Attention between programs: calls of torch's function on this package's kernel, where that computes the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.dot_product_attention import dot_product_attention

MOST_KEYS = 1024  # with more of them torch's kernel, which never holds all scores of a row, is as fast


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, up to the last bits; for calls without gradients."""
    tensors = query, key, value
    if attn_mask is None and dropout_p == 0 and all(map(_is_plain, tensors)) and _fits(*tensors, enable_gqa):
        factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        return dot_product_attention(query, key, value, is_causal, factor)
    settings: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **settings)


def _is_plain(x: Any) -> bool:
    plain = isinstance(x, Tensor) and x.dtype is torch.float32 and x.device.type == "cpu" and x.dim() == 4
    return plain and x.layout is torch.strided and not x.requires_grad


def _fits(query: Tensor, key: Tensor, value: Tensor, groups: bool) -> bool:
    batch, heads, rows, size = query.shape
    fits = key.shape[0] == batch and key.shape[3] == size and value.shape[:3] == key.shape[:3]
    fits = fits and min(batch, heads, rows, size, key.shape[1]) > 0 and 0 < key.shape[2] <= MOST_KEYS
    return fits and (key.shape[1] == heads or (groups and heads % key.shape[1] == 0))
