"""Transformers and their kin: torch's own modules, and the blocks that people write themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from wild_case import Models

ATTENTION = Models()
WORDS, D, HEADS = 20, 16, 2
POSITIONS = "a table of positions that is added, not multiplied"


def text(length: int = 6, n: int = 3) -> torch.Tensor:
    return torch.randint(WORDS, (n, length))


def tokens(length: int = 6) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (text(length),)


def features(*shape: int) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(*shape),)


def heads(x: torch.Tensor, n: int = HEADS) -> torch.Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention with projections of its own, as most repositories write it."""

    def __init__(self, causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=bias) for _ in range(4))
        self.causal = causal

    def forward(self, x, mask=None):
        q, k, v = (heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.o(joined(F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)))


def mlp(act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 2 * D), act, nn.Linear(2 * D, D))


class Block(nn.Module):
    """Attention and a mixing of the features, each behind a norm and beside a residual connection."""

    def __init__(self, attention: nn.Module, mixing: nn.Module) -> None:
        super().__init__()
        self.attention, self.mixing = attention, mixing
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mixing(self.norm2(x))


@ATTENTION.add(lambda: (text(), torch.arange(6) >= torch.tensor([[6], [3], [5]])), narrow=True)
class EncoderClassifier(nn.Module):
    """torch's own encoder, with padded sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, D)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, HEADS, 24, 0.0, batch_first=True), 2)
        self.head = nn.Linear(D, 3)

    def forward(self, tokens, padding):
        y = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.head(y.masked_fill(padding[..., None], 0).sum(1))


@ATTENTION.add(lambda: (text(), text(5)))
class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, D), nn.Embedding(WORDS, D)
        self.transformer = nn.Transformer(D, HEADS, 1, 1, 24, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(D, WORDS)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


@ATTENTION.add(tokens(), narrow=True)
class GPT(nn.Module):
    """One weight for the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(WORDS, D), nn.Embedding(6, D)
        self.blocks = nn.Sequential(*(Block(Attention(causal=True), mlp(nn.GELU())) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, WORDS, bias=False)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


@ATTENTION.add(lambda: (text(), torch.zeros(3, 6, dtype=torch.long), torch.rand(3, 6) > 0.2), narrow=True)
class BERT(nn.Module):
    """Norms behind the residuals, three embeddings, and a mask that is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(WORDS, D), nn.Embedding(6, D), nn.Embedding(2, D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.attention, self.mixing = Attention(), mlp(nn.GELU())
        self.pooler, self.head = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, tokens, kinds, seen):
        x = self.norms[0](self.words(tokens) + self.places(torch.arange(6)) + self.kinds(kinds))
        mask = torch.zeros(seen.shape).masked_fill(~seen, -1e4)[:, None, None]
        x = self.norms[1](x + self.attention(x, mask))
        x = self.norms[2](x + self.mixing(x))
        return {"pooled": self.head(self.pooler(x[:, 0]).tanh()), "hidden": x}


@ATTENTION.add(features(3, 3, 8, 8), floats={"": f"a class token and {POSITIONS}"})
class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, D) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 5, D) * 0.1)
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mixing, self.head = mlp(nn.GELU()), nn.Linear(D, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mixing(self.norm2(x)))[:, 0])


class RotaryAttention(nn.Module):
    """Keys and values have half as many heads as queries, and places turn pairs of features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.k, self.v = nn.Linear(D, D // 2, bias=False), nn.Linear(D, D // 2, bias=False)

    @staticmethod
    def turned(x):
        angles = torch.arange(x.shape[2])[:, None] * 100.0 ** (-torch.arange(x.shape[3] // 2) / 2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def forward(self, x):
        q, k, v = heads(self.q(x), 4), heads(self.k(x), 2), heads(self.v(x), 2)
        q, k = self.turned(q), self.turned(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.o(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((D, 24), (D, 24), (24, D)))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@ATTENTION.add(tokens(), narrow=True)
class LLaMA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(WORDS, D), nn.RMSNorm(D), nn.Linear(D, WORDS, bias=False)
        self.block = Block(RotaryAttention(), SwiGLU())
        self.block.norm1, self.block.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)

    def forward(self, tokens):
        return self.head(self.norm(self.block(self.embed(tokens))))


@ATTENTION.add(tokens())
class T5(nn.Module):
    """A bias of the scores that an embedding gives for each distance; no factor on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bias = nn.Embedding(WORDS, D), nn.Embedding(7, HEADS)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(D)
        self.mixing = mlp(nn.ReLU())

    def forward(self, tokens):
        x = self.embed(tokens)
        y, places = self.norm(x), torch.arange(tokens.shape[1])
        distances = (places - places[:, None]).clamp(-3, 3) + 3
        q, k, v = heads(self.q(y)), heads(self.k(y)), heads(self.v(y))
        scores = q @ k.transpose(-2, -1) / 4 + self.bias(distances).permute(2, 0, 1)
        x = x + self.o(joined(scores.softmax(-1) @ v))
        return x + self.mixing(x)


@ATTENTION.add(features(2, 4, 4, D), floats={"": "a table of biases that is added to the scores"})
class Swin(nn.Module):
    """Attention within shifted windows of 2×2."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D)
        self.table = nn.Parameter(torch.randn(HEADS, 9) * 0.1)
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + 1
        self.register_buffer("index", 3 * apart[0] + apart[1])
        self.merge = nn.Linear(4 * D, 2 * D)

    def forward(self, x):
        n, h, w, _ = x.shape
        y = self.norm(x).roll((-1, -1), (1, 2))
        y = y.view(n, h // 2, 2, w // 2, 2, D).transpose(2, 3).reshape(-1, 4, D)
        q, k, v = (heads(t) for t in self.qkv(y).chunk(3, -1))
        y = self.o(joined(F.scaled_dot_product_attention(q, k, v, self.table[:, self.index])))
        y = y.view(n, h // 2, w // 2, 2, 2, D).transpose(2, 3).reshape(n, h, w, D).roll((1, 1), (1, 2))
        x = x + y
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.merge(torch.cat(corners, -1))


class FusedExperts(nn.Module):
    """Weights of all experts in one Parameter, [E, N, K], as large models store them."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * 12, D) / 4)
        self.down_proj = nn.Parameter(torch.randn(experts, D, 12) / 4)

    def forward(self, x, routing):
        gate, up = torch.einsum("td,end->ten", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ten,edn,te->td", F.silu(gate) * up, self.down_proj, routing)


@ATTENTION.add(features(8, D), rules=[("*experts.*_proj", {"weight": {}})], narrow=True)
class FusedMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.head = nn.Linear(D, 3, bias=False), FusedExperts(), nn.Linear(D, 4)

    def forward(self, x):
        shares, chosen = self.router(x).softmax(-1).topk(2)
        routing = torch.zeros(len(x), 3).scatter(1, chosen, shares)
        return self.head(x + self.experts(x, routing))


@ATTENTION.add(features(8, D), idle={"experts.2": "no token is routed to it"})
class SwitchMoE(nn.Module):
    """Each token goes to one expert; the router's bias keeps all away from the last."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.ModuleList(mlp(nn.ReLU()) for _ in range(3))
        with torch.no_grad():
            self.router.weight.mul_(4)
            self.router.bias.copy_(torch.tensor([0.0, 0.0, -30.0]))

    def forward(self, x):
        share, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, share[rows, None] * expert(x[rows]))
        return x + y


@ATTENTION.add(features(2, 10, 5), floats={"": "learned latents: an input, not a weight"})
class Perceiver(nn.Module):
    """A few latents look at a long input of another width, then at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, D) * 0.3)
        self.cross = nn.MultiheadAttention(D, HEADS, kdim=5, vdim=5, batch_first=True)
        self.own, self.norm, self.head = Block(Attention(), mlp(nn.GELU())), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        latents = latents + self.cross(self.norm(latents), x, x)[0]
        return self.head(self.own(latents).mean(1))


class LoRALinear(nn.Module):
    """A frozen layer beside a product of two small ones, the second of which starts from zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + 2 * self.b(self.a(x))


@ATTENTION.add(features(3, 6, D), narrow=True)
def LoRA() -> nn.Module:
    block = Block(Attention(), mlp(nn.GELU()))
    block.attention.q, block.attention.v = LoRALinear(block.attention.q), LoRALinear(block.attention.v)
    return nn.Sequential(block, LoRALinear(nn.Linear(D, 4)))


class ConvModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv1d(D, 2 * D, 1), nn.Conv1d(D, D, 1)
        self.depthwise, self.norm = nn.Conv1d(D, D, 3, padding=1, groups=D), nn.BatchNorm1d(D)

    def forward(self, x):
        x = F.glu(self.wide(x.transpose(1, 2)), 1)
        return self.narrow(F.silu(self.norm(self.depthwise(x)))).transpose(1, 2)


@ATTENTION.add(features(2, 7, D), rules=[("attention", {"attention": {}, "output": {}})])
class Conformer(nn.Module):
    """Half a mixing, attention, a convolution over time, half a mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.conv = mlp(nn.SiLU()), mlp(nn.SiLU()), ConvModule()
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(5))

    def forward(self, x):
        x = x + 0.5 * self.first(self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.attention(y, y, y)[0]
        x = x + self.conv(self.norms[2](x))
        return self.norms[4](x + 0.5 * self.last(self.norms[3](x)))


@ATTENTION.add(features(2, 3, 8, 8))
class DETR(nn.Module):
    """Objects are queries from an embedding that torch's own decoder fills from an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.queries = nn.Conv2d(3, D, 2, stride=2), nn.Embedding(4, D)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, HEADS, 24, 0.0), 1)
        self.classes, self.boxes = nn.Linear(D, 3), nn.Linear(D, 4)

    def forward(self, x):
        memory = self.patches(x).flatten(2).permute(2, 0, 1)
        queries = self.queries(torch.arange(4))[:, None].expand(-1, len(x), -1)
        y = self.decoder(queries, memory)
        return self.classes(y), self.boxes(y).sigmoid()


@ATTENTION.add(features(3, 6, D))
class LinearAttention(nn.Module):
    """Attention without a softmax: products of activations alone, and a state of keys times values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2)[..., None])
        return self.o(joined(y)) / math.sqrt(2)
