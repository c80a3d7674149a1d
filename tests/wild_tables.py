"""Models of tables, recommendations, pairs, points and graphs; and perceptrons in place of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from wild_case import Models

TABLES = Models()


def rows(features: int, n: int = 8) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(n, features),)


@TABLES.add(rows(10), narrow=True)
def TabularMLP() -> nn.Module:
    def block(c, out):
        return [nn.Linear(c, out), nn.BatchNorm1d(out), nn.ReLU()]

    return nn.Sequential(nn.BatchNorm1d(10), *block(10, 16), *block(16, 8), nn.Linear(8, 1))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(c, 16), nn.GELU(), nn.Linear(16, c))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


@TABLES.add(lambda: (torch.randn(3, 3, 8, 8),))
class MLPMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(3, 8, 4, stride=4), MixerBlock(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@TABLES.add(lambda: (torch.randn(3, 6, 8),))
class GMLP(nn.Module):
    """A convolution of kernel 1 over the places gates half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(8, 8)
        self.spatial = nn.Conv1d(6, 6, 1)

    def forward(self, x):
        kept, gate = F.gelu(self.wide(self.norm(x))).chunk(2, -1)
        return x + self.narrow(kept * (self.spatial(self.gate_norm(gate)) + 1))


@TABLES.add(lambda: (torch.randn(4, 5), torch.randint(12, (9,)), torch.tensor([0, 2, 2, 6])), narrow=True)
class DLRM(nn.Module):
    """Bags of categories, one of them empty, and the products of all pairs of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
        self.bags = nn.ModuleList(nn.EmbeddingBag(12, 6, mode=mode) for mode in ("sum", "mean"))
        self.top = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense, categories, offsets):
        x = self.bottom(dense)
        vectors = torch.stack([x, *(bag(categories, offsets) for bag in self.bags)], 1)
        i, j = torch.tril_indices(3, 3, -1)
        return self.top(torch.cat([x, (vectors @ vectors.transpose(1, 2))[:, i, j]], 1))


@TABLES.add(lambda: (torch.randint(15, (6, 3)), torch.randn(6, 4)))
class WideDeep(nn.Module):
    """A linear model on crossed categories, a table of one column, beside a deep one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.embed = nn.EmbeddingBag(15, 1, mode="sum"), nn.Embedding(15, 4)
        self.deep = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, categories, dense):
        deep = self.deep(torch.cat([self.embed(categories).flatten(1), dense], 1))
        return torch.sigmoid(self.wide(categories) + deep)


@TABLES.add(lambda: (torch.randint(9, (8,)), torch.randint(7, (8,))))
class NeuralCF(nn.Module):
    """Users and items: a product of two embeddings beside a perceptron of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 8), nn.Embedding(7, 8)
        self.deep, self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(10, 1)

    def forward(self, user, item):
        (u1, u2), (i1, i2) = self.users(user).chunk(2, 1), self.items(item).chunk(2, 1)
        return self.head(torch.cat([u1 * i1, self.deep(torch.cat([u2, i2], 1))], 1))


@TABLES.add(rows(12), rules=[("weight", {"weight": {}})], narrow=True)
class TiedAutoencoder(nn.Module):
    """The decoder reads the encoder's weight, transposed; a rule quantizes the parameter wherever it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 12) / 3)
        self.hidden, self.visible = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(12))

    def forward(self, x):
        return F.linear(F.linear(x, self.weight, self.hidden).sigmoid(), self.weight.t(), self.visible)


@TABLES.add(lambda: (torch.randn(5, 10),))
class VAE(nn.Module):
    """The noise is a fixed pattern here, so that two calls can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_var = nn.Linear(10, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 10))
        self.register_buffer("noise", torch.linspace(-1, 1, 15).view(5, 3))

    def forward(self, x):
        h = F.relu(self.encoder(x))
        mean, log_var = self.mean(h), self.log_var(h)
        return self.decoder(mean + (log_var / 2).exp() * self.noise), mean, log_var


@TABLES.add(lambda: (torch.randn(6, 10), torch.randn(6, 10)), narrow=True)
class Siamese(nn.Module):
    """One encoder for both inputs, and a bilinear form of the two codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
        self.compare = nn.Bilinear(6, 6, 2)

    def forward(self, a, b):
        return self.compare(self.encoder(a), self.encoder(b))


@TABLES.add(lambda: (torch.randn(3, 3, 10),))
class PointNet(nn.Module):
    """Each point alone, then the largest of each feature; a small net turns the points first."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU())
        self.angles = nn.Linear(6, 9)
        self.points = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        turn = self.angles(self.turn(x).amax(2)).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.points(turn @ x).amax(2))


def graph(n: int = 7) -> torch.Tensor:
    """A normalized adjacency matrix: a ring with self-loops."""
    ring = torch.eye(n) + torch.eye(n).roll(1, 0) + torch.eye(n).roll(-1, 0)
    return ring / 3


@TABLES.add(lambda: (torch.randn(7, 5), graph()))
class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, adjacency):
        return adjacency @ self.second(F.relu(adjacency @ self.first(x)))


@TABLES.add(lambda: (torch.randn(7, 5), graph()))
class GAT(nn.Module):
    """Scores of neighbours from two products of each node, as a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(5, 8, bias=False)
        self.left, self.right, self.head = nn.Linear(8, 1), nn.Linear(8, 1, bias=False), nn.Linear(8, 3)

    def forward(self, x, adjacency):
        h = self.project(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).t(), 0.2)
        return self.head(F.elu(scores.masked_fill(adjacency == 0, -1e9).softmax(1) @ h))


@TABLES.add(lambda: (torch.rand(8, 3),))
class NeRF(nn.Module):
    """Places as sines and cosines; the input comes in a second time halfway."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(28, 16)
        self.density, self.colour = nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x):
        code = torch.cat([f(x * 2**i) for i in range(2) for f in (torch.sin, torch.cos)], 1)
        h = F.relu(self.first(code))
        h = F.relu(self.second(torch.cat([h, code], 1)))
        return F.softplus(self.density(h)), self.colour(h).sigmoid()


@TABLES.add(rows(6))
class DuelingDQN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.value, self.advantage = nn.Linear(12, 1), nn.Linear(12, 4)

    def forward(self, x):
        h = self.body(x)
        advantage = self.advantage(h)
        return self.value(h) + advantage - advantage.mean(1, keepdim=True)
