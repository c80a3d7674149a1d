"""IntegerMultiheadAttention, whose projections run on the integer kernels; ``convert`` makes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Proxy

from .attend import attend
from .attention import AttentionForward
from .int4 import Int4Linear
from .int8 import Int8Linear
from .qat_attention import SEPARATE, QATMultiheadAttention
from .qat_layer import SUFFIX
from .replacing import take_over

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SETTINGS = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn")
QUANTIZERS = ("query", "key", "value", "output")


def between(
    layer: IntegerMultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the layer computes of the projections, in a graph that runs without gradients."""
    # The projections have the lengths of what they are made of.
    layer.check(query, key, value, key_padding_mask, attn_mask, is_causal)
    masks = layer.masks(query.dtype, key_padding_mask, attn_mask, is_causal, need_weights)
    return layer.attended(query, key, value, *masks, need_weights, average, attend)


class IntegerMultiheadAttention(AttentionForward):
    """nn.MultiheadAttention on integer weights: its arguments and results, softmax and products in float.

    ``q_proj``, ``k_proj`` and ``v_proj`` are Int8Linear or Int4Linear layers, each of which quantizes its input, and so
    is ``out_proj``, unless it stayed in float. Quantizers of what goes into the products, and of the result, stay.

    Args:
        layer: gives the settings, ``out_proj``, these quantizers, hooks and whatever else was set on it.
        projections: the three layers by their names.
    """

    in_proj_bias = None  # torch's Transformer layers look at both, and then call the layer
    _qkv_same_embed_dim = False

    def __init__(self, layer: QATMultiheadAttention, projections: dict[str, Int8Linear | Int4Linear]) -> None:
        super().__init__()
        for name in SETTINGS:
            setattr(self, name, getattr(layer, name))
        for name in PROJECTIONS:
            self.add_module(name, projections[name])
        self.add_module("out_proj", layer.out_proj)
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, getattr(layer, name))
        for role in QUANTIZERS:
            quantizer = layer.quantizer_of(role)
            setattr(self, role + SUFFIX, quantizer)
            if quantizer is not None:
                quantizer.disable_observer()
        tensors = {"in_proj_weight", *SEPARATE, "in_proj_bias", "_qkv_same_embed_dim", "bias_k", "bias_v", "out_proj"}
        take_over(self, layer, tensors | {role + SUFFIX for role in type(layer).roles(layer)})

    @property
    def projections(self) -> tuple[Int8Linear | Int4Linear, ...]:
        """The layers of query, key and value."""
        return tuple(self.parts.values())

    @property
    def parts(self) -> dict[str, Int8Linear | Int4Linear]:
        """These layers by their names."""
        return {name: self._modules[name] for name in PROJECTIONS}  # type: ignore[misc]

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (project(x) for project, x in zip(self.projections, (query, key, value), strict=True))
        return q, k, v

    def in_parts(
        self,
        query: Proxy,
        key: Proxy,
        value: Proxy,
        key_padding_mask: Proxy | None = None,
        need_weights: bool = True,
        attn_mask: Proxy | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """``forward`` in a graph: its layers, and what lies between them as one node, ``between``."""
        tracer: Any = query.tracer
        layer = tracer.create_proxy("get_attr", tracer.path_of_module(self), (), {})
        projections = self.projected(query, key, value)  # type: ignore[arg-type]
        settings = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        both = tracer.create_proxy("call_function", between, (layer, *projections, *settings), {})
        y, weights = both[0], both[1]
        return self.passed("output", self.out_proj(y)), weights

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
