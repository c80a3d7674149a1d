"""What users do with a fused model after convert: its programs notice, or its own forward runs."""

from __future__ import annotations

import functools
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_fuse import made
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

import qkernels as qk
from qkernels.qat.fuse import fused_parts


class Net(nn.Module):
    skips = True
    note: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.ReLU()
        self.second, self.drop, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(), nn.Linear(8, 5)
        self.factor = 2.0
        self.register_buffer("offset", torch.ones(5))

    def forward(self, x: Any) -> Any:
        x = self.act(self.first(x))
        y = self.second(x) * self.factor
        y = F.relu(y + x if self.skips else y)
        return self.head(self.drop(y.mean((2, 3)))) + self.offset * 2


X = torch.randn(4, 3, 12, 12)


def fused(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    _, converted = made(kind(), (X,))
    assert list(fused_parts(converted)) == [""]
    converted(X)  # a sum with what no operation makes is left to torch from the second call on
    return converted


def own(model: nn.Module, x: torch.Tensor) -> Any:
    """The result of the root's own forward, layer by layer."""
    return type(model).forward(model, x)


def assert_noticed(model: nn.Module) -> None:
    before = fused()
    with torch.no_grad():
        expected = own(model, X)
        torch.testing.assert_close(model(X), expected)
        assert not torch.allclose(before(X), expected)


def clamps(z: torch.Tensor) -> torch.Tensor:
    return z.clamp(-0.1, 0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "skips", False),
        lambda m: setattr(m, "factor", 3.0),
        lambda m: setattr(m, "offset", torch.zeros(5)),
        lambda m: m.offset.zero_(),
        lambda m: setattr(m.second, "forward", lambda z: z * 0),
        lambda m: setattr(m.act, "forward", clamps),
    ],
    ids=["class attribute", "attribute", "new buffer", "buffer in place", "layer's forward", "activation's forward"],
)
def test_changes_are_noticed(change: Callable[[nn.Module], object]) -> None:
    model = fused()
    change(model)
    assert_noticed(model)


def test_a_module_that_trains_again() -> None:
    model = fused()
    with torch.no_grad():
        assert torch.equal(model(X), model(X))
        model.drop.train()
        assert not torch.equal(model(X), model(X))


class Stores(Net):
    def forward(self, x: Any) -> Any:
        self.seen = x
        return super().forward(x)


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Any) -> Any:
        self.calls.append(1)
        return super().forward(x)


class Draws(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + torch.rand(5)


class DrawsInPython(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * random.random()


class CountsInABuffer(Net):
    def forward(self, x: Any) -> Any:
        self.offset += 1
        return super().forward(x)


@pytest.mark.parametrize("kind", [Stores, Counts, Draws, DrawsInPython, CountsInABuffer])
def test_a_forward_that_does_more_than_its_graph_stays(kind: type[Any]) -> None:
    torch.manual_seed(0)
    _, model = made(kind(), (X,))
    assert not fused_parts(model)
    with torch.no_grad():
        first, second = model(X), model(X)
    if kind is Stores:
        assert model.seen is X
    elif kind is Counts:
        calls = len(model.calls)
        model(X)
        assert len(model.calls) == calls + 1
    else:
        assert not torch.equal(first, second)


class Checks(Net):
    def forward(self, x: Any) -> Any:
        torch._assert(x.shape[-1] >= 4, "at least 4 columns")
        return super().forward(x)


def test_checks_in_the_forward_run() -> None:
    model = fused(Checks)
    with pytest.raises(AssertionError, match="at least 4 columns"):
        model(X[..., :3])


class Constant(Net):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def test_constants_are_not_left_on_the_model() -> None:
    model = fused(Constant)
    assert not any("constant" in name for name in vars(model))
    with torch.no_grad():
        torch.testing.assert_close(model(X), own(model, X))


def squared_gradients(model: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def test_second_gradients() -> None:
    model = fused()
    expected = squared_gradients(lambda x: own(model, x))
    assert expected.abs().max() > 0
    torch.testing.assert_close(squared_gradients(model), expected)


def test_an_input_that_changes_before_its_gradient_is_refused() -> None:
    x = X.clone().requires_grad_() * 1
    y = fused()(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class ShuffleOutside(nn.Module):
    """The shuffle is in no program, but reads sizes of what it shuffles."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(4, 4, 1, padding_mode="reflect"), nn.ELU(), nn.Conv2d(4, 4, 1)
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x: Any) -> Any:
        x = self.act(self.first(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return {"y": self.third(torch.relu(self.second(self.act(x)))), "n": None}


def test_a_shuffle_outside_of_programs() -> None:
    x = torch.randn(2, 4, 5, 5)
    _, model = made(ShuffleOutside(), (x,))
    assert fused_parts(model)
    with torch.no_grad():
        assert torch.equal(model(x)["y"], own(model, x)["y"])


class SplitsUnknown(nn.Module):
    """Channels that only one part of a split tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Conv2d(3, 7, 1), nn.Conv2d(4, 4, 1), nn.ELU()

    def forward(self, x: Any) -> Any:
        a, b = torch.split(self.act(self.first(x)), [3, 4], 1)
        return torch.cat([a, torch.relu(self.second(b))], 1)


def test_parts_of_unknown_channels() -> None:
    x = torch.randn(2, 3, 5, 5)
    _, model = made(SplitsUnknown(), (x,))
    parts = fused_parts(model)
    assert [part.reason for part in parts.values()] == [None]
    with torch.no_grad():
        assert torch.equal(model(x), own(model, x))


class AddsAMean(nn.Module):
    """A sum with one number, which no program takes; it shows only when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.second(torch.relu(self.first(x)))) + x.mean()


def test_a_refused_sum_leaves_the_program_for_good() -> None:
    x = torch.randn(2, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, model = made(AddsAMean(), (x,))
    (part,) = fused_parts(model).values()
    with torch.no_grad():
        expected = own(model, x)
        torch.testing.assert_close(model(x), expected)
        assert part.refused
        part.refused = None
        torch.testing.assert_close(model(x), expected)
        assert part.refused is None
        assert part.plans


@pytest.mark.parametrize(
    ("layer", "x", "wrong"),
    [
        (nn.Conv2d(3, 4, 3), X, [(3,), (5, 8), (4, 8, 8), (2, 4, 8, 8), (1, 2, 3, 8, 8), (2, 0, 8, 8)]),
        (nn.Conv1d(3, 4, 3), X[0], [(), (3,), (4, 8), (2, 4, 8), (1, 2, 3, 8), (3, 0, 8)]),
        (nn.Linear(12, 4), X, [(), (3,), (2, 3), (2, 3, 0, 0)]),
    ],
    ids=["conv2d", "conv1d", "linear"],
)
def test_inputs_of_another_shape(layer: nn.Module, x: torch.Tensor, wrong: list[tuple[int, ...]]) -> None:
    x = x.transpose(0, 1) if isinstance(layer, nn.Conv1d) else x
    _, model = made(nn.Sequential(layer, nn.ReLU()), (x,))
    assert fused_parts(model)
    for shape in wrong:
        match = rf"^0 \(Int8{type(layer).__name__}\): input: got shape {re.escape(str(list(shape)))}; accepted: "
        with pytest.raises(RuntimeError, match=match):
            model(torch.randn(shape))
    with pytest.raises(TypeError, match=rf"^0 \(Int8{type(layer).__name__}\): input: got list; accepted: a tensor"):
        model([x])


def test_a_quantizer_that_is_switched_off() -> None:
    _, model = made(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (X,), qk.QConfig(output=qk.QSpec(bits=3)))
    assert fused_parts(model)
    with torch.no_grad():
        before = model(X)
        model[0].output_fake_quant.disable_fake_quant()
        assert torch.equal(model(X), own(model, X))
        assert not torch.equal(model(X), before)


class TakesADict(Net):
    def forward(self, inputs: Any) -> Any:
        return super().forward(inputs["x"])


def test_gradients_of_tensors_in_a_dict() -> None:
    _, model = made(TakesADict(), ({"x": X},))
    assert fused_parts(model)
    gradients = []
    for call in (model, model, functools.partial(own, model)):
        x = X.clone().requires_grad_()
        call({"x": x}).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[2])


@pytest.mark.parametrize("fake", ["input", "model"])
def test_fake_tensors(fake: str) -> None:
    """A quantizer beside the layers, whose numbers nobody can read then; programs with real ones are as before."""
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b((self.a(x) + x).relu())

    x = torch.randn(4, 8)
    _, converted = made(Sum(), (x,), qk.QConfig(residual=qk.QSpec(8)))
    (part,) = fused_parts(converted).values()
    with torch.no_grad():
        before, mode = converted(x), FakeTensorMode(allow_non_fake_inputs=True)
        if fake == "input":
            with mode:
                y = converted(mode.from_tensor(x))
        else:
            own = converted.add_fake_quant.named_parameters()
            tensors = {f"add_fake_quant.{name}": mode.from_tensor(t) for name, t in own}
            assert tensors
            y = torch.func.functional_call(converted, tensors, (mode.from_tensor(x),))
        assert (type(y), y.shape) == (FakeTensor, before.shape)
        assert (part.refused, part._cautious) == (None, False)
        assert torch.equal(converted(x), before)


@pytest.mark.parametrize(
    ("layer", "setting", "value"),
    [
        ("0", "stride", (2, 2)),
        ("0", "padding", (0, 0)),
        ("0", "dilation", (2, 2)),
        ("0", "padding_mode", "circular"),
        ("1", "negative_slope", 0.5),
        ("2", "stride", 1),
        ("2", "padding", 1),
        ("3", "scale_factor", 3),
        ("4", "kernel_size", 3),
        ("5", "max_val", 0.2),
        ("6", "start_dim", 2),
    ],
)
def test_a_setting_of_a_layer_that_changes_is_noticed(layer: str, setting: str, value: Any) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
    _, converted = made(nn.Sequential(*layers, nn.AvgPool2d(2), nn.Hardtanh(-0.5, 0.5), nn.Flatten()), (X,))
    assert list(fused_parts(converted)) == [""]
    with torch.no_grad():
        before = converted(X)
        setattr(converted.get_submodule(layer), setting, value)
        after = converted(X)
        assert before.shape != after.shape or not torch.equal(before, after)
        torch.testing.assert_close(after, own(converted, X))


def test_an_attribute_that_becomes_an_array_is_noticed() -> None:
    """Its comparison with what was there has no truth value."""
    model = fused()
    before = model(X)
    for value in (np.arange(4.0), torch.arange(4.0), [1, 2], {"a": 1}):
        model.note = value
        torch.testing.assert_close(model(X), before)
        model.note = None
        torch.testing.assert_close(model(X), before)
