"""Transformers as users write them: norms in single operations, rotary positions, masks as buffers and as arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, KEYS, VOCABULARY, LONGEST = 32, 4, 2, 40, 48


class MetaNorm(nn.Module):
    """As in Meta's Llama."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.rand(width) + 0.5)

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


class HuggingFaceNorm(nn.Module):
    """As in transformers' Llama."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class BertNorm(nn.Module):
    """As in the first BERT: the epsilon inside of the root."""

    def __init__(self, width: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.variance_epsilon)
        return self.weight * x + self.bias


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class LlamaBlock(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, KEYS * size, bias=False)
        self.v_proj = nn.Linear(WIDTH, KEYS * size, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 56, bias=False), nn.Linear(WIDTH, 56, bias=False)
        self.down_proj = nn.Linear(56, WIDTH, bias=False)
        self.input_norm, self.post_norm = norm(WIDTH), norm(WIDTH)

    def attention(self, x, cos, sin, mask, past):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, HEADS, -1).transpose(1, 2)
        k = self.k_proj(x).view(b, t, KEYS, -1).transpose(1, 2)
        v = self.v_proj(x).view(b, t, KEYS, -1).transpose(1, 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        kept = k, v
        k, v = (s[:, :, None].expand(-1, -1, HEADS // KEYS, -1, -1).flatten(1, 2) for s in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        if mask is not None:
            scores = scores + mask
        y = F.softmax(scores.float(), dim=-1).type_as(q) @ v
        return self.o_proj(y.transpose(1, 2).contiguous().view(b, t, -1)), kept

    def forward(self, x, cos, sin, mask=None, past=None):
        y, kept = self.attention(self.input_norm(x), cos, sin, mask, past)
        x = x + y
        y = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y)), kept


class Llama(nn.Module):
    """A causal mask as a buffer, or one that is an argument; keys and values of earlier tokens as an argument."""

    def __init__(self, norm: type[nn.Module] = MetaNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock(norm) for _ in range(2))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        angles = torch.outer(torch.arange(LONGEST), 10000.0 ** -(torch.arange(0, 8, 2) / 8)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        hidden = torch.full((LONGEST, LONGEST), -torch.inf).triu(1)
        self.register_buffer("causal", hidden, persistent=False)

    def forward(self, ids, mask=None, past=None):
        t, start = ids.shape[1], 0 if past is None else past[0][0].shape[2]
        x, kept = self.embed(ids), []
        cos, sin = self.cos[start : start + t], self.sin[start : start + t]
        seen = self.causal[start : start + t, : start + t]
        if mask is not None:  # 1: a token, 0: padding
            seen = seen + (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for i, layer in enumerate(self.layers):
            x, state = layer(x, cos, sin, seen, None if past is None else past[i])
            kept.append(state)
        return self.head(self.norm(x)), kept


class BertBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.norm1, self.norm2, self.drop = BertNorm(WIDTH), BertNorm(WIDTH), nn.Dropout(0.1)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, WIDTH // HEADS)).permute(0, 2, 1, 3)

    def forward(self, hidden_states, attention_mask=None):
        q, k, v = (self.heads(f(hidden_states)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)
        if attention_mask is not None:
            scores = scores + attention_mask
        y = torch.matmul(self.drop(F.softmax(scores, dim=-1)), v).permute(0, 2, 1, 3).contiguous()
        y = y.view(y.shape[0], y.shape[1], WIDTH)
        x = self.norm1(self.drop(self.out(y)) + hidden_states)
        return self.norm2(self.drop(self.down(F.gelu(self.up(x)))) + x)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, WIDTH) for n in (VOCABULARY, LONGEST, 2))
        self.norm, self.layers = BertNorm(WIDTH), nn.ModuleList(BertBlock() for _ in range(2))
        self.pooler, self.classes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        places = self.places(torch.arange(input_ids.size(1), device=input_ids.device))
        x = self.norm(self.words(input_ids) + places + self.kinds(token_type_ids))
        if attention_mask is not None:
            attention_mask = (1.0 - attention_mask[:, None, None, :].to(dtype=torch.float32)) * -10000.0
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.classes(torch.tanh(self.pooler(x[:, 0])))
