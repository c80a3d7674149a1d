"""Ten small trained models with a question for ``qk.advise`` each: whether this width needs training.

Data: scikit-learn's digits, breast cancer and Friedman's first problem; Fashion-MNIST at 14×14 pixels; the language
reference that Python ships. Each is divided into parts for training, for ``advise``, and for the truth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk
from qkernels import demo
from qkernels.qat.fold import eval_mode

Pair = tuple[Tensor, Tensor]
WORDS = 32  # characters in a sequence


@dataclass
class Data:
    """Inputs and targets for training, for ``advise`` to score by, and for the truth."""

    train: Pair
    seen: Pair
    unseen: Pair


@dataclass(frozen=True)
class Task:
    """How a model is trained and scored."""

    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]


def accuracy(output: Tensor, target: Tensor) -> float:
    return float((output.argmax(-1) == target).double().mean())


def r_squared(output: Tensor, target: Tensor) -> float:
    return 1 - float((output - target).square().mean() / target.var())


def negative_perplexity(output: Tensor, target: Tensor) -> float:
    return -math.exp(float(F.cross_entropy(output.flatten(0, 1), target.flatten())))


CLASSES = Task(F.cross_entropy, accuracy)
NUMBERS = Task(F.mse_loss, r_squared)
TEXT = Task(lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten()), negative_perplexity)


@dataclass(frozen=True)
class Case:
    """A question: is post-training quantization to these bits of weights, with inputs as in ``config``, enough?

    float_steps, qat_steps: of Adam, on batches of 64.
    """

    name: str
    data: Callable[[], Data]
    build: Callable[[], nn.Module]
    task: Task
    bits: int
    config: qk.QConfig
    float_steps: int = 600
    qat_steps: int = 300
    after: Callable[[nn.Module], nn.Module] = lambda model: model


def divided(x: Tensor, y: Tensor, train: int, seen: int) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [(x[at], y[at]) for at in order.tensor_split([train, train + seen])]
    return Data(*parts)


def digits(rows: bool = False) -> Data:
    """rows: a sequence of 8 rows of 8 pixels; else 64 pixels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    return divided(x.reshape(-1, 8, 8) if rows else x, torch.tensor(found.target), 900, 400)


def fashion() -> Data:
    loaded = demo.load_idx(demo.FASHION_MNIST)
    x, y = (torch.cat(both) for both in zip(loaded.train, loaded.test, strict=True))
    x = F.avg_pool2d(x, 2)
    return Data((x[:12000], y[:12000]), (x[50000:53000], y[50000:53000]), (x[60000:66000], y[60000:66000]))


def friedman() -> Data:
    from sklearn.datasets import make_friedman1

    x, y = (torch.tensor(values, dtype=torch.float32) for values in make_friedman1(8000, noise=0.5, random_state=0))
    return divided(x, (y[:, None] - y.mean()) / y.std(), 4000, 1500)


def cancer() -> Data:
    """Thirty measures of cells in their own units, from thousandths to thousands."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    x = torch.tensor(found.data, dtype=torch.float32)
    return divided(x, torch.tensor(found.target), 250, 150)


def text() -> Data:
    """Characters, with the next one of each as the target."""
    whole = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    kept = sorted({character for character in whole if ord(character) < 127})
    codes = torch.tensor([kept.index(character) for character in whole if ord(character) < 127])
    count = (len(codes) - 1) // WORDS
    x, y = (codes[at : at + count * WORDS].view(count, WORDS) for at in (0, 1))
    found = divided(x, y, 8000, 500)
    return Data(found.train, found.seen, (found.unseen[0][:1500], found.unseen[1][:1500]))


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def normalized(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(widths[0]), *perceptron(*widths))


def normalization_folded(model: nn.Module) -> nn.Module:
    """A perceptron that takes the measures in their own units."""
    norm, first, *rest = model.children()
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(first, nn.Linear)
    with eval_mode(norm), torch.no_grad():
        shift = norm(torch.zeros(1, norm.num_features))[0]
        factor = norm(torch.ones(1, norm.num_features))[0] - shift
        first.bias += first.weight @ shift
        first.weight *= factor
    return nn.Sequential(first, *rest)


def block(*convolution: Any, **options: Any) -> list[nn.Module]:
    layer = nn.Conv2d(*convolution, padding=convolution[2] // 2, bias=False, **options)
    return [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()]


def cnn() -> nn.Sequential:
    blocks = [*block(1, 16, 3), *block(16, 32, 3, stride=2), *block(32, 32, 3, stride=2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 16, 10))


def depthwise_cnn() -> nn.Sequential:
    blocks = block(1, 24, 3)
    for channels, stride in ((24, 2), (48, 1), (48, 2)):
        blocks += [*block(channels, channels, 3, groups=channels, stride=stride), *block(channels, 48, 1)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def with_outliers(model: nn.Module) -> nn.Module:
    """The same function with channels of unlike ranges, by factors of up to 16 that cancel behind each ReLU."""
    layers = list(model.children())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm, after in zip(layers[1:], layers[3:], strict=False):
            if isinstance(norm, nn.BatchNorm2d) and isinstance(after, nn.Conv2d):
                factor = 2 ** torch.randint(-4, 5, (norm.num_features,), generator=generator).float()
                norm.weight *= factor
                norm.bias *= factor
                after.weight /= factor.view(-1, 1, 1, 1) if after.groups > 1 else factor.view(1, -1, 1, 1)
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])  # type: ignore[no-any-return]


class Language(nn.Module):
    def __init__(self, symbols: int = 96, width: int = 48) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(WORDS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.symbols(x) + self.places.weight
        for each in self.blocks:
            y = each(y, src_mask=self.mask)
        return self.head(self.norm(y))  # type: ignore[no-any-return]


def inputs_of(bits: int) -> qk.QConfig:
    return qk.QConfig(input=qk.QSpec(bits, symmetric=False))


W8A8 = inputs_of(8)
PER_TENSOR = qk.QConfig(weight=qk.QSpec(granularity=qk.PerTensor()))

CASES = [
    Case("perceptron W8A8", digits, partial(perceptron, 64, 64, 64, 10), CLASSES, 8, W8A8),
    Case("perceptron W2A8", digits, partial(perceptron, 64, 64, 64, 10), CLASSES, 2, W8A8),
    Case("cnn W4A8", fashion, cnn, CLASSES, 4, W8A8),
    Case("cnn W3A3", fashion, cnn, CLASSES, 3, inputs_of(3)),
    Case("depthwise W8A8", fashion, depthwise_cnn, CLASSES, 8, W8A8),
    Case("depthwise with outlier channels W8A8, per tensor", fashion, depthwise_cnn, CLASSES, 8, PER_TENSOR,
         after=with_outliers),
    Case("transformer W4A8", text, Language, TEXT, 4, W8A8, float_steps=400, qat_steps=200),
    Case("gru W2A8", partial(digits, rows=True), Recurrent, CLASSES, 2, W8A8),
    Case("regression W3A8", friedman, partial(perceptron, 10, 64, 64, 1), NUMBERS, 3, W8A8),
    Case("raw features W8A8", cancer, partial(normalized, 30, 32, 32, 2), CLASSES, 8, W8A8,
         after=normalization_folded),
]  # fmt: skip
