"""equalize and smoothquant: the float model computes the same, the quantized one has a smaller error."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, randomize, snapshot
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.qat.chains import Chains

PER_TENSOR = qk.QConfig(qk.QSpec(8, qk.PerTensor(), quantizer="minmax"), None)
BOTH_8 = qk.QConfig(qk.QSpec(8), qk.QSpec(8))


class Mobile(nn.Module):
    """A depthwise convolution between two others, and a layer behind a flatten; BatchNorms of a trained model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.point, self.pool = nn.Conv2d(16, 8, 1), nn.MaxPool2d(2)
        self.fc, self.head = nn.Linear(8 * 16, 12), nn.Linear(12, 5, bias=False)
        randomize(self)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        x = self.norm2(self.depthwise(x)).relu()
        x = self.pool(torch.relu(self.point(x)))
        return self.head(F.relu(self.fc(torch.flatten(x, 1))))


class Block(nn.Module):
    def __init__(self, kind=nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.query, self.key, self.out = kind(32), nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(48, 8)
        with torch.no_grad():
            self.norm.weight[3] = 50

    def forward(self, x):
        y = self.norm(x)
        return self.out(torch.cat([self.query(y), self.key(y)], -1))


def scaled_apart(model: nn.Module) -> nn.Module:
    """The same function, with channels that one layer makes small and the next one large."""
    with torch.no_grad():
        for norm, after in ((model.norm1, model.depthwise), (model.norm2, model.point)):
            factor = 10 ** torch.linspace(-1, 1, 16)[torch.randperm(16)]
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            after.weight.div_(factor.view(-1, 1, 1, 1) if after.groups > 1 else factor.view(1, -1, 1, 1))
        factor = 10 ** torch.linspace(-1, 1, 12)
        model.fc.weight.mul_(factor[:, None])
        model.fc.bias.mul_(factor)
        model.head.weight.div_(factor)
    return model.eval()


def error(model, quantized, x):
    with torch.no_grad():
        return float((quantized.eval()(x) - model.eval()(x)).double().square().mean())


def test_equalized_model_computes_the_same() -> None:
    model, x = scaled_apart(Mobile()).train(), images(8)
    model.norm2.eval()
    before = snapshot(model)
    pairs = list(Chains(model).pairs())
    assert pairs == [("point", "fc"), ("fc", "head")], "BatchNorms stand between the others"
    made = qk.equalize(model)
    assert_unchanged(model, before)
    assert {name: module.training for name, module in made.named_modules()} == {
        name: module.training for name, module in model.named_modules()
    }
    assert error(model, made, x) < 1e-10 * float(model(x).detach().square().mean())
    assert type(made.norm1) is nn.Identity
    first, depthwise = made.first.weight.abs().amax((1, 2, 3)), made.depthwise.weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(first, depthwise, rtol=0.02, atol=0)
    columns = made.fc.weight.unflatten(1, (8, 16)).abs().amax((0, 2))
    torch.testing.assert_close(made.point.weight.abs().amax((1, 2, 3)), columns, rtol=0.02, atol=0)


def test_equalized_model_quantizes_better() -> None:
    """The error of 8-bit weights, one scale for each tensor, beside the folded model's."""
    model, x = scaled_apart(Mobile()), images(32)
    folded = copy.deepcopy(qk.equalize(model))
    with torch.no_grad():  # the folded model that was not equalized, from the factors that its biases keep
        plain = nn.utils.fusion.fuse_conv_bn_eval
        folded.first, folded.depthwise = plain(model.first, model.norm1), plain(model.depthwise, model.norm2)
        for name in ("point", "fc", "head"):
            setattr(folded, name, copy.deepcopy(model.get_submodule(name)))
    assert error(model, folded, x) < 1e-8
    before = error(model, qk.prepare(folded, PER_TENSOR), x)
    after = error(model, qk.prepare(qk.equalize(model), PER_TENSOR), x)
    assert after < 0.05 * before


@pytest.mark.parametrize("kind", ["twice", "used elsewhere", "sigmoid", "tied", "hook", "linear to conv", "read"])
def test_what_is_no_pair(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.conv = nn.Conv1d(4, 4, 1)
            if kind == "tied":
                self.b.weight = self.a.weight
            if kind == "hook":
                self.a.register_forward_hook(lambda module, args, output: output + 1)

        def forward(self, x):
            y = self.a(x)
            if kind == "twice":
                return self.b(self.a(y))
            if kind == "used elsewhere":
                return self.b(y) + y
            if kind == "sigmoid":
                return self.b(y.sigmoid())
            if kind == "linear to conv":
                return self.conv(y)
            if kind == "read":
                return self.b(y) + F.linear(x, self.a.weight)
            return self.b(y)

    with pytest.raises(ValueError, match="model: holds no two layers with nothing but a ReLU"):
        qk.equalize(Model())


def test_refusals_of_equalize() -> None:
    with pytest.raises(TypeError, match="model: got a int"):
        qk.equalize(3)
    with pytest.raises(ValueError, match="model: got one that is prepared; accepted: a float model"):
        qk.equalize(qk.prepare(ConvNet()))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_smoothed_model_quantizes_better(kind: type[nn.Module], is_prepared: bool) -> None:
    model, x = Block(kind), torch.randn(64, 32)
    made = qk.prepare(model, BOTH_8)
    qk.calibrate(made, [x])
    before = error(model, made, x)
    if is_prepared:
        assert qk.smoothquant(made, [x[:32], x[32:]]) == {"norm": ("query", "key")}
    else:
        smooth = copy.deepcopy(model)
        qk.smoothquant(smooth, [x])
        assert error(model, smooth, x) < 1e-10
        made = qk.prepare(smooth, BOTH_8)
        qk.calibrate(made, [x])
    assert error(model, made, x) < 0.25 * before
    qk.enable_fake_quant(made, False)
    assert error(model, made, x) < 1e-10


def test_factors_of_smoothquant() -> None:
    model, x = Block(), torch.randn(64, 32)
    largest = model.norm(x).detach().abs().amax(0)
    widest = torch.maximum(model.query.weight.abs().amax(0), model.key.weight.abs().amax(0)).detach()
    factor = largest**0.8 / widest**0.2
    expected = model.norm.weight.detach() / factor, model.key.weight.detach() * factor
    qk.smoothquant(model, [x], alpha=0.8)
    torch.testing.assert_close(model.norm.weight.detach(), expected[0])
    torch.testing.assert_close(model.key.weight.detach(), expected[1])


def test_modes_and_random_generators_stay() -> None:
    made = qk.prepare(nn.Sequential(Block(), nn.Dropout()), BOTH_8).train()
    made[1].eval()
    qk.calibrate(made, [torch.randn(9, 32)])
    modes, states = [module.training for module in made.modules()], (torch.get_rng_state(), random.getstate())
    qk.smoothquant(made, [torch.ones(9, 32)])
    assert [module.training for module in made.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not made[0].norm._forward_hooks


@pytest.mark.parametrize(
    ("batches", "options", "error", "text"),
    [
        ([torch.randn(3, 32)], {"alpha": 2}, ValueError, "alpha: got 2; accepted: 0 to 1"),
        ([torch.randn(3, 32)], {"alpha": "a"}, ValueError, "alpha: got 'a'"),
        ([torch.randn(3, 32)], {"max_batches": 0}, ValueError, "max_batches: got 0"),
        ([], {}, ValueError, "batches: got none"),
        ([torch.randn(3, 32), torch.randn(3, 32) * torch.nan], {}, ValueError, r"batches\[1\]"),
        ([torch.randn(3, 5)], {}, RuntimeError, r"batches\[0\]: layer 'norm'"),
    ],
    ids=["alpha", "type", "max_batches", "none", "nan", "shape"],
)
def test_refusals_of_smoothquant(batches, options, error, text) -> None:
    made = qk.prepare(Block(), BOTH_8)
    qk.calibrate(made, [torch.randn(9, 32)])
    before = snapshot(made)
    with pytest.raises(error, match=text):
        qk.smoothquant(made, batches, **options)
    assert_unchanged(made, before)


def test_models_without_norms() -> None:
    with pytest.raises(ValueError, match="model: holds no LayerNorm or RMSNorm whose output"):
        qk.smoothquant(ConvNet(), [images()])
    with pytest.raises(TypeError, match="model: got a int"):
        qk.smoothquant(3, [images()])


def test_norm_that_no_sample_reached_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Block(), Block(), Block()

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x[:0])])

    model = Model()
    before = [snapshot(block) for block in (model.b, model.c)]
    found = qk.smoothquant(torch.compile(model, backend="eager"), [torch.randn(9, 32)])
    assert found == {"a.norm": ("a.query", "a.key")}
    for block, state in zip((model.b, model.c), before, strict=True):
        assert_unchanged(block, state)
