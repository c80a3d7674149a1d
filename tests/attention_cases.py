"""Attention layers and their inputs."""

import torch
from torch import nn

E, HEADS, N, L, S = 12, 3, 2, 5, 4
SETTINGS = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "rows": {"add_bias_kv": True, "add_zero_attn": True},
    "rows, sequence first": {"add_bias_kv": True, "batch_first": False},
    "dims": {"kdim": 7, "vdim": 9},
    "vdim": {"vdim": 5, "bias": False, "batch_first": False},
}


def attention(dtype=torch.float64, **settings) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **settings}).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def inputs(layer: nn.MultiheadAttention, kind: str, batched: bool = True) -> list[torch.Tensor]:
    """Query, key and value: one tensor, query and key alike, key and value alike, or three."""
    dtype = layer.out_proj.weight.dtype

    def one(length: int, features: int) -> torch.Tensor:
        x = torch.randn(N, length, features, dtype=dtype) if batched else torch.randn(length, features, dtype=dtype)
        return x.transpose(0, 1).contiguous() if batched and not layer.batch_first else x

    query = one(L, E)
    if kind == "self":
        return [query, query, query]
    if kind == "query and key":
        return [query, query, one(L, layer.vdim)]
    key = one(S, layer.kdim)
    return [query, key, key] if kind == "memory" else [query, key, one(S, layer.vdim)]
