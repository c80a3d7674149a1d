"""Converted models whose forward overwrites tensors: the same results, and the same tensors overwritten."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_fuse import made, own, tensors
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.qat.fuse import fused_parts, unfused


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)


class AddsToItsArgument(Writes):
    """And returns it."""

    def forward(self, x):
        x += self.b(F.relu(self.a(x)))
        return F.relu_(x)


class ReadsWhatItOverwrote(Writes):
    def forward(self, x):
        F.relu_(x)
        return self.b(F.relu(self.a(x))) + x


class DividesItsArgument(Writes):
    """By an operation that no program knows."""

    def forward(self, x):
        x /= 2
        return self.b(F.relu(self.a(x)))


class ReadsBeforeAndAfter(Writes):
    def forward(self, x):
        y = self.a(x)
        x.div_(2).sub_(0.1)
        return self.b(F.relu(y) + x), x


class OverwritesBoth(Writes):
    def forward(self, x, y):
        x += y
        y *= 2
        return self.b(F.relu(self.a(x))) + y


class OverwritesSizes(Writes):
    """Numbers, which nothing else sees."""

    def forward(self, x):
        n, c, h, w = x.shape
        size = c * h
        before = size
        size *= w
        F.relu_(x)
        return self.b(F.relu(self.a(x))).view(n, -1) / size + before


class OverwritesWithTwoNames(Writes):
    def forward(self, x):
        y = self.a(x)
        z = y
        z += x
        return self.b(F.relu(y)) + y


class Masks(Writes):
    """``operator.and_`` overwrites nothing, whatever its name."""

    def forward(self, x):
        above, below = x > -1, x < 1
        both = above & below
        return self.b(F.relu(self.a(x))).where(above, 0) + x.where(both, 0)


def block() -> nn.Module:
    """Of a ResNet with its activations first."""
    return nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 3, 1), nn.ReLU(True), nn.Conv2d(3, 3, 1))


def inputs(kind: Any) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, 3, 4, 4) for _ in range(1 + (kind is OverwritesBoth)))


FUSED = [AddsToItsArgument, ReadsWhatItOverwrote, DividesItsArgument, ReadsBeforeAndAfter, OverwritesBoth]
FUSED += [OverwritesSizes, OverwritesWithTwoNames, Masks, block]


@pytest.mark.parametrize("kind", FUSED)
def test_values_and_arguments(kind: Any) -> None:
    _, model = made(kind(), inputs(kind))
    (part,) = fused_parts(model).values()
    assert len(part.plans) == 1
    given, expected = inputs(kind), inputs(kind)
    with torch.no_grad():
        results, others = tensors(model(*given)), own(model, *expected)
    assert part.refused is None
    for y, other in zip(results, others, strict=True):
        torch.testing.assert_close(y, other)
    for x, other, before in zip(given, expected, inputs(kind), strict=True):
        torch.testing.assert_close(x, other)
        assert torch.equal(x, before) == (kind in (OverwritesWithTwoNames, Masks))
    assert [[y is x for y in results] for x in given] == [[y is x for y in others] for x in expected]


@pytest.mark.parametrize("kind", FUSED)
def test_gradients(kind: Any) -> None:
    _, model = made(kind(), inputs(kind))
    biases = [p for p in model.parameters() if p.requires_grad]
    found = []
    for call in (lambda *given: tensors(model(*given)), lambda *given: own(model, *given)):
        y, *_ = call(*inputs(kind))
        found.append(torch.autograd.grad(y.square().sum(), biases))
    for gradient, expected in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_arguments_that_are_one_tensor() -> None:
    _, model = made(OverwritesBoth(), inputs(OverwritesBoth))
    (x, _), (same, _) = inputs(OverwritesBoth), inputs(OverwritesBoth)
    with torch.no_grad():
        assert torch.equal(model(x, x), own(model, same, same)[0])
        assert torch.equal(model(x, x[:]), own(model, same, same[:])[0])
    assert torch.equal(x, same)


class AddsAMean(Writes):
    """A sum with one number, which no program takes; it shows only when it runs."""

    def forward(self, x):
        x *= 2
        return F.relu(self.b(F.relu(self.a(x)))) + x.mean()


def test_a_program_that_refuses_leaves_the_argument_to_the_models_own_forward() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, model = made(AddsAMean(), inputs(AddsAMean))
    (part,) = fused_parts(model).values()
    for refused in (True, False):  # the next programs do not count on shapes
        (x,), (expected,) = inputs(AddsAMean), inputs(AddsAMean)
        with torch.no_grad():
            torch.testing.assert_close(model(x), own(model, expected)[0])
        assert torch.equal(x, expected)
        assert (part.refused is not None) == refused
        part.refused = None


class OverwritesAPart(Writes):
    def forward(self, x):
        x[:, :1].mul_(2)
        return self.b(F.relu(self.a(x)))


class ReadsAView(Writes):
    def forward(self, x):
        y = self.a(x)
        rows = y.flatten(1)
        y.relu_()
        return self.b(y), rows


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OverwritesAPart, "mul_ overwrites a part of the argument x"),
        (ReadsAView, "relu_ overwrites what flatten shows, which is read later"),
    ],
)
def test_what_runs_layer_by_layer(kind: type[Writes], reason: str) -> None:
    _, model = made(kind(), inputs(kind))
    assert unfused(model) == {"": reason}
    assert reason in str(qk.report(model))
    given, expected = inputs(kind), inputs(kind)
    with torch.no_grad():
        for y, other in zip(tensors(model(*given)), own(model, *expected), strict=True):
            assert torch.equal(y, other)
    assert torch.equal(*given, *expected)


def test_a_call_that_is_compiled_overwrites_too() -> None:
    _, model = made(block(), inputs(block))
    (x,), (expected,) = inputs(block), inputs(block)
    with torch.no_grad():
        y = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(y, own(model, expected)[0])
    assert torch.equal(x, expected)
