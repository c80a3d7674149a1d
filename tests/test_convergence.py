"""A hundred steps of training on the fast kernels, on the reference and, where it has such layers, with torch.ao.

Where scales are the ranges of the tensors ("minmax"), all sums are torch's own, and all three have to agree in every
bit of every loss and parameter. The gradient of a learned scale is a sum over its tensor, which kernels and reference
add up in another order: from the first step on scales differ in their last bits. After some tens of steps one of them
moves a value to the other side of a tie, and from that step on the two runs are those of slightly different noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.ao.nn.qat
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize as AoFakeQuantize
from torch.ao.quantization import (
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    default_embedding_qat_qconfig,
)
from torch.nn import functional as F

import qkernels as qk

STEPS = 100
# How far learned scales may take two runs apart, by the dtype of the model: the losses of any step, as a share of the
# first one, and all parameters, as a share of the way that they have gone. A scale is fp32, so that sums in fp64 are
# equal after rounding, but for ties; measured are 0 and 0. In fp32 a flipped code lets them part: measured are 0.024
# and 0.092, both by the CNN at 4 bits.
APART = {torch.float64: (1e-5, 1e-5), torch.float32: (0.05, 0.2)}

pytestmark = pytest.mark.filterwarnings("error:prepare.*stay in float:UserWarning")


def cnn() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(64, 5))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))


class GRUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(6, 12, num_layers=2, batch_first=True), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


class Transformer(nn.Module):
    """One block with projections of its own, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.wide, self.narrow, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        return self.head(x.mean(1))


class Mixture(nn.Module):
    """Three experts, each of which gets every token, weighed by the router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(20, 3), nn.Linear(16, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(20, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(3))

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        return self.head(sum(shares[:, i, None] * expert(x) for i, expert in enumerate(self.experts)))


class Words(nn.Module):
    """The mean of some embeddings, two tables of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pairs = nn.Embedding(12, 16), nn.Embedding(7, 16)
        self.hidden, self.head = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, tokens):
        x = self.words(tokens).mean(1) + self.pairs(tokens % 7).mean(1)
        return self.head(F.relu(self.hidden(x)))


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(32, *shape)


def tokens() -> Tensor:
    return torch.randint(12, (32, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "CNN": (cnn, floats(3, 8, 8)),
    "MLP": (mlp, floats(20)),
    "GRU": (GRUNet, floats(7, 6)),
    "transformer": (Transformer, tokens),
    "mixture of experts": (Mixture, floats(20)),
    "embedding": (Words, tokens),
}


Batches = list[tuple[Tensor, Tensor]]


def data(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batches]:
    """A model, and batches whose classes another model of the kind has chosen."""
    make, inputs = MODELS[name]
    teacher, batches = make(), [inputs() for _ in range(4)]
    with torch.no_grad():
        outputs = [teacher(x) for x in batches]
    classes = [(y - y.mean(0)).argmax(1) for y in outputs]
    batches = [x.to(dtype) if x.is_floating_point() else x for x in batches]
    return make().to(dtype), list(zip(batches, classes, strict=True))


def prepared(model: nn.Module, batches: Batches, quantizer: str, bits: int = 8) -> nn.Module:
    config = qk.QConfig(qk.QSpec(bits, quantizer=quantizer), qk.QSpec(symmetric=False, quantizer=quantizer))
    result = qk.prepare(model, config)
    qk.calibrate(result, [x for x, _ in batches])
    return result


def train(model: nn.Module, batches: Batches) -> Tensor:
    """The losses of all steps."""
    model.train()
    optimizer = torch.optim.Adam(qk.parameter_groups(model, lr=3e-3))
    losses = []
    for step in range(STEPS):
        x, classes = batches[step % len(batches)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), classes)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def trained_on_the_reference(model: nn.Module, batches: Batches) -> tuple[nn.Module, Tensor]:
    plain = copy.deepcopy(model)
    with qk.use_kernel("reference"):
        return plain, train(plain, batches)


def assert_equal(ours: nn.Module, other: nn.Module) -> None:
    others = dict(other.named_parameters())
    assert others.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, others[name]), name


def distance(a: nn.Module, b: nn.Module) -> float:
    return math.sqrt(
        sum(float((p - q).detach().square().sum()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    )


@pytest.mark.parametrize("name", MODELS)
def test_ranges_train_as_on_the_reference(name: str) -> None:
    model, batches = data(name)
    ours = prepared(model, batches, "minmax")
    plain, expected = trained_on_the_reference(ours, batches)
    losses = train(ours, batches)
    assert losses[-4:].mean() < 0.6 * losses[:4].mean()
    assert torch.equal(losses, expected)
    assert_equal(ours, plain)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float64, 4), (torch.float32, 8), (torch.float32, 4)])
def test_learned_scales_train_as_on_the_reference(name: str, dtype: torch.dtype, bits: int) -> None:
    model, batches = data(name, dtype)
    ours = prepared(model, batches, "lsq", bits)
    start = copy.deepcopy(ours)
    plain, expected = trained_on_the_reference(ours, batches)
    losses = train(ours, batches)
    assert losses[-4:].mean() < 0.6 * losses[:4].mean()
    assert losses[0] == expected[0]  # no scale has moved yet
    apart, share = APART[dtype]
    assert (losses - expected).abs().max() <= apart * losses[0]
    assert distance(ours, plain) <= share * distance(plain, start)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "GRU"])  # torch.ao trains no quantized GRU
def test_training_is_that_of_torch_ao(name: str) -> None:
    model, batches = data(name)
    ours = prepared(model, batches, "minmax")
    theirs = of_torch_ao(model, ours)
    assert torch.equal(train(ours, batches), train(theirs, batches))
    assert_equal(ours, theirs)


def of_torch_ao(model: nn.Module, ours: nn.Module) -> nn.Module:
    """The model of torch.ao's own QAT layers, whose weights have the scales of their present ranges, as "minmax" has,
    and whose inputs have the qparams of ours. torch.ao quantizes outputs where we quantize inputs: hooks do it here."""
    kinds = torch.ao.nn.qat
    per_row = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127, "averaging_constant": 1.0}
    weight = AoFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, **per_row
    )
    made = copy.deepcopy(model)
    for name, layer in list(made.named_modules()):
        kind = {nn.Linear: kinds.Linear, nn.Conv2d: kinds.Conv2d, nn.Embedding: kinds.Embedding}.get(type(layer))
        if kind is None:
            continue
        table = kind is kinds.Embedding
        layer.qconfig = default_embedding_qat_qconfig if table else QConfig(activation=nn.Identity, weight=weight)
        quantized = kind.from_float(layer)
        quantized.weight_fake_quant = weight()
        made.set_submodule(name, quantized)
        input = ours.get_submodule(name).quantizer_of("input")
        if input is not None:
            scale, zero_point = input.qparams()
            fake = AoFakeQuantize(MovingAverageMinMaxObserver, input.quant_min, input.quant_max, dtype=torch.qint8)
            fake.disable_observer()
            fake.scale.copy_(scale.flatten())
            fake.zero_point.copy_(zero_point.flatten())
            quantized.register_forward_pre_hook(lambda module, args, fake=fake: fake(*args))
    return made
