"""AttentionForward: multi-head attention around projections that a subclass computes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .qat_layer import SUFFIX
from .tracing import call_as_leaf


class AttentionForward(nn.Module):
    """The forward of nn.MultiheadAttention, with its arguments and results, for layers with quantizers.

    torch's own reads the weight of ``out_proj``, and on its fused path all weights; this one calls ``out_proj``. A mask
    acts as on torch's unfused path: it is added to the scores in the query's dtype. Nested tensors, which torch takes
    on its fused path alone, are refused.

    Quantizers of the roles "query", "key" and "value", if there are any, get what goes into the attention's products,
    [N, heads, L, head_dim] with the rows of ``add_bias_kv`` and ``add_zero_attn``; that of "output" gets the result.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: Any  # a layer that is called
    __call__ = call_as_leaf

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections, each of embed_dim features."""
        raise NotImplementedError

    def passed(self, role: str, x: Tensor) -> Tensor:
        """x through the quantizer of a role, if there is one."""
        quantizer = getattr(self, role + SUFFIX, None)
        return x if quantizer is None else quantizer(x)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: the output, and the attention weights or None.

        Raises:
            RuntimeError: a tensor has another shape or kind.
        """
        self.check(query, key, value, key_padding_mask, attn_mask, is_causal)
        masks = self.masks(query.dtype, key_padding_mask, attn_mask, is_causal, need_weights)
        projections = self.projected(query, key, value)
        y, weights = self.attended(*projections, *masks, need_weights, average_attn_weights)
        return self.passed("output", self.out_proj(y)), weights

    @staticmethod
    def masks(
        dtype: torch.dtype,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """``attended``'s mask, padding and causal, in the dtype of the scores."""
        causal = is_causal and key_padding_mask is None and not need_weights
        return None if causal else _added(attn_mask, dtype), _added(key_padding_mask, dtype), causal

    def attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        causal: bool = False,
        need_weights: bool = False,
        average: bool = True,
        kernel: Callable[..., Tensor] = F.scaled_dot_product_attention,
    ) -> tuple[Tensor, Tensor | None]:
        """What lies between the projections, which it gets, and ``out_proj``. Masks are added to the scores."""
        batched = query.dim() == 3
        q, k, v = (self._heads(t) for t in (query, key, value))
        n, heads, length, _ = q.shape
        if self.bias_k is not None and self.bias_v is not None:
            rows = [bias.view(1, heads, 1, -1).expand(n, -1, -1, -1) for bias in (self.bias_k, self.bias_v)]
            k, v = torch.cat([k, rows[0]], 2), torch.cat([v, rows[1]], 2)
            mask, padding = _with_column(mask), _with_column(padding)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask, padding = _with_column(mask), _with_column(padding)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(n, heads, length, -1)
        if padding is not None:
            padding = padding.view(n, 1, 1, -1)
            mask = padding if mask is None else mask + padding
        q, k, v = self.passed("query", q), self.passed("key", k), self.passed("value", v)

        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores + mask.to(scores.dtype)  # which autocast may have lowered
            weights = torch.softmax(scores, dim=-1)
            weights = F.dropout(weights, dropout)
            y = weights @ v
            weights = weights.mean(1) if average else weights
        else:
            y = kernel(q, k, v, mask, dropout, causal)
        if batched and not self.batch_first:
            y = y.permute(2, 0, 1, 3).reshape(length, n, self.embed_dim)
        else:
            y = y.transpose(1, 2).reshape(n, length, self.embed_dim)
        if not batched:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y, weights

    def _heads(self, t: Tensor) -> Tensor:
        """[N, heads, L, head_dim], a view of the projection, whose dims are in the layer's order."""
        if t.dim() == 2:
            t = t.unsqueeze(0)
        elif not self.batch_first:
            t = t.transpose(0, 1)
        return t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Refuses arguments of ``forward``."""
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.is_nested:
                raise RuntimeError(f"{name}: got a nested tensor; accepted: a padded one with a mask")
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            shape = ("batch", "length") if self.batch_first else ("length", "batch")
            raise RuntimeError(
                f"query: got shape {list(query.shape)}; accepted: [{', '.join(shape)}, {self.embed_dim}], or "
                f"[length, {self.embed_dim}]"
            )
        batched = query.dim() == 3
        axis = 1 if batched and self.batch_first else 0  # that of the sequence
        batch = query.shape[1 - axis] if batched else 1
        if key.dim() != query.dim() or (batched and key.shape[1 - axis] != batch):
            raise RuntimeError(
                f"key: got shape {list(key.shape)}; accepted: the dims of the query, whose shape is "
                f"{list(query.shape)}, with a length of its own"
            )
        if value.shape[:-1] != key.shape[:-1]:
            raise RuntimeError(
                f"value: got shape {list(value.shape)}; accepted: the dims of the key, {list(key.shape)}, but the last"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "attn_mask: got None with is_causal=True; accepted: the causal mask, of which is_causal is a hint"
            )
        length, source = query.shape[axis], key.shape[axis]
        _check_mask("attn_mask", attn_mask, (length, source), (batch * self.num_heads, length, source))
        _check_mask("key_padding_mask", key_padding_mask, (batch, source) if batched else (source,))


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(f"{name}: got {mask.dtype}; accepted: torch.bool, a floating dtype")
    # Size by size: a compiler with symbolic sizes takes no tuple of them for equal to another.
    if not any(mask.dim() == len(shape) and all(map(operator.eq, mask.shape, shape)) for shape in shapes):
        accepted = " or ".join(str(list(shape)) for shape in shapes)
        raise RuntimeError(f"{name}: got shape {list(mask.shape)}; accepted: {accepted}")


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the scores: minus infinity where a bool mask is True."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _with_column(mask: Tensor | None) -> Tensor | None:
    """A mask that lets a key more be seen."""
    return None if mask is None else F.pad(mask, (0, 1))
