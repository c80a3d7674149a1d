"""Sums, concatenations and pools in a user's forward: which tensors ``residual`` quantizes, and with what numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import FakeQuantize

ON = qk.QConfig(residual=qk.QSpec(8))
SHAPE = (2, 4, 6, 6)


class Block(nn.Module):
    """Two convolutions beside each other, and what is done with their results."""

    def __init__(self, join: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.join = join
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.join(self, self.a(x), self.b(x))


def prepared_of(model: nn.Module, config: qk.QConfig = ON, x: torch.Tensor | None = None) -> nn.Module:
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, [torch.randn(SHAPE) if x is None else x])
    return prepared


def roles(model: nn.Module) -> dict[str, FakeQuantize]:
    """The quantizers of sums, concatenations and pools, by their names without the suffix."""
    kinds = ("add", "cat", "pool")
    named = model.named_modules(remove_duplicate=False)
    found = {name: module for name, module in named if isinstance(module, FakeQuantize)}
    return {
        name.removesuffix("_fake_quant"): module
        for name, module in found.items()
        if name.rpartition(".")[2].startswith(kinds)
    }


def in_place(block, a, b):
    a += b
    return a


def method(block, a, b):
    a.add_(b)
    return torch.relu(a)


def relu_in_place(block, a, b):
    y = a + b
    F.relu(y, inplace=True)
    return y


def loop(block, a, b):
    y = a
    for _ in range(3):
        y = y + b * 2
    return y


# What joins the two results, and the names of the quantizers that it gets.
FORMS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a + b": (lambda m, a, b: a + b, ["add_input", "add"]),
    "a += b": (in_place, ["add_input", "add"]),
    "a.add_(b)": (method, ["add_input", "add"]),
    "torch.add": (lambda m, a, b: torch.add(a, b), ["add_input", "add"]),
    "torch.add(alpha=2)": (lambda m, a, b: torch.add(a, b, alpha=2), ["add_input", "add"]),
    "a.add(b)": (lambda m, a, b: a.add(b), ["add_input", "add"]),
    "sum": (lambda m, a, b: sum([a, b]), ["add_input", "add"]),
    "three terms": (lambda m, a, b: a + b + a.sigmoid(), ["add_input", "add_input_1", "add"]),
    "a loop": (loop, ["add_input", "add_input_1", "add_input_2", "add"]),
    "relu": (lambda m, a, b: F.relu(a + b), ["add_input", "add"]),
    "relu in place": (relu_in_place, ["add_input", "add"]),
    "clamp": (lambda m, a, b: (a + b).clamp(-1, 1), ["add_input", "add"]),
    "cat": (lambda m, a, b: torch.cat([a, b], 1), ["cat"]),
    "cat of a sum": (lambda m, a, b: torch.cat([a, F.relu(a + b)], dim=1), ["add_input", "add", "cat"]),
    "broadcast": (lambda m, a, b: a + b[:, :, :1, :1], ["add_input", "add"]),
    "with a parameter": (lambda m, a, b: a * 2 + m.a.bias[:, None, None], []),
    "with a buffer": (lambda m, a, b: a + m.offset, []),
    "with a number": (lambda m, a, b: (a + 1, 2 + b), []),
    "of sizes": (lambda m, a, b: a.reshape(a.shape[0] + b.shape[0] - b.shape[0], -1), []),
    "of masks": (lambda m, a, b: a.masked_fill((a > 9e9).long() + (b > 9e9).long() > 1, 0), []),
    "scores": (lambda m, a, b: torch.softmax(a + b, -1), []),
    "a product": (lambda m, a, b: a * b - b, []),
    "mean": (lambda m, a, b: a.mean((2, 3)) * b.mean(dim=[2, 3]), ["pool_input", "pool_input_1"]),
    "a norm's mean": (lambda m, a, b: a - b.mean(-1, keepdim=True), []),
    "pools": (lambda m, a, b: F.avg_pool2d(a, 2) * m.pool(b), ["pool_input", "pool_input_1"]),
    "a gate": (lambda m, a, b: a * torch.sigmoid(F.adaptive_avg_pool2d(a, 1)), ["pool_input"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    join, expected = FORMS[form]
    torch.manual_seed(0)
    block, x = Block(join, **({"pool": nn.AvgPool2d(2)} if form == "pools" else {})), torch.randn(SHAPE)
    block.register_buffer("offset", torch.randn(4, 1, 1))
    prepared = prepared_of(block, x=x)
    assert sorted(roles(prepared)) == sorted(expected)
    assert isinstance(prepared, Block)
    check_numbers(block, prepared, x)
    check_training(prepared, x)


def check_numbers(block: nn.Module, prepared: nn.Module, *inputs: torch.Tensor) -> None:
    """Without quantizing the float model's bits; with it, near them, and converted the same."""
    prepared.eval()
    block.eval()
    with torch.no_grad():
        expected, y = block(*(x.clone() for x in inputs)), prepared(*(x.clone() for x in inputs))
        for got, wanted in zip(listed(y), listed(expected), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
        qk.enable_fake_quant(prepared, False)
        for got, wanted in zip(listed(prepared(*(x.clone() for x in inputs))), listed(expected), strict=True):
            assert torch.equal(got, wanted)
        qk.enable_fake_quant(prepared)
        converted = qk.convert(prepared)
        for got, wanted in zip(listed(converted(*(x.clone() for x in inputs))), listed(y), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-2 * float(wanted.abs().max()))
        assert torch.equal(listed(qk.exact(prepared)(*inputs))[0], listed(converted(*inputs))[0])


def check_training(prepared: nn.Module, *inputs: torch.Tensor) -> None:
    sum(y.square().mean() for y in listed(prepared.train()(*inputs))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in prepared.parameters())
    assert all(q.log_scale.grad is not None for q in roles(prepared).values() if q.learns)


def listed(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple | list) else [value]


class Basic(nn.Module):
    """A ResNet's block."""

    def __init__(self, down: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.p = nn.ReLU(inplace=True), 0.3
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)) if down else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.dropout(out, self.p, training=self.training)
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.layer1 = nn.Sequential(Basic(), Basic(True), Basic())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.pool(self.layer1(self.stem(x))).flatten(1))


def test_a_stream_has_one_quantizer_for_each_tensor() -> None:
    torch.manual_seed(0)
    prepared = prepared_of(Net())
    found = roles(prepared)
    blocks = prepared.layer1
    assert list(found) == [
        "layer1.0.add_input", "layer1.0.add", "layer1.1.add_input", "layer1.1.add", "layer1.2.add"
    ]  # fmt: skip
    assert blocks[0].conv1.input_fake_quant is found["layer1.0.add_input"]
    assert blocks[1].conv1.input_fake_quant is blocks[1].downsample[0].input_fake_quant is found["layer1.0.add"]
    assert blocks[2].conv1.input_fake_quant is found["layer1.1.add"]
    assert found["layer1.0.add"].name == "layer1.0.add_fake_quant"
    assert not found["layer1.0.add"].symmetric  # as the inputs of layers
    assert found["layer1.2.add"].symmetric  # as residual, since no layer reads it
    calls: list[str] = []
    for quantizer in set(found.values()):
        quantizer.register_forward_hook(lambda q, args, y: calls.append(q.name))
    prepared.train()(torch.randn(SHAPE))
    assert sorted(calls) == sorted(quantizer.name for quantizer in found.values())  # each once


def by_hand(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A block of the prepared net, with its quantizers where they ought to stand."""

    def quantized(role: str, t: torch.Tensor) -> torch.Tensor:
        quantizer = getattr(block, f"{role}_fake_quant", None)
        return t if quantizer is None else quantizer(t)

    down = block.downsample is not None
    x = x if down else quantized("add_input", x)
    y = torch.relu(block.bn1(block.conv1(x)))
    y = block.bn2(block.conv2(F.dropout(y, block.p, block.training)))
    y = quantized("add_input", y) + block.downsample(x) if down else y + x
    return quantized("add", torch.relu(y))


@pytest.mark.parametrize("training", [True, False])
def test_numbers_and_gradients_are_those_of_quantizers_in_the_forward(training: bool) -> None:
    torch.manual_seed(0)
    prepared = prepared_of(Net()).train(training)
    other, x = copy.deepcopy(prepared), torch.randn(SHAPE)
    torch.manual_seed(1)
    y = prepared(x)
    torch.manual_seed(1)
    t = other.stem(x)
    for block in other.layer1:
        t = by_hand(block, t)
    expected = other.fc(other.pool(t).flatten(1))
    assert torch.equal(y, expected)
    for result in (y, expected):
        result.square().sum().backward()
    for (name, p), q in zip(prepared.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for a, b in zip(prepared.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_converted_streams_are_codes() -> None:
    """No floats between the input and the last layer, and the bits of its layers one by one."""
    torch.manual_seed(0)
    prepared, x = prepared_of(Net()).eval(), torch.randn(SHAPE)
    converted = qk.convert(prepared)
    ((plan,),) = [part.plans for part in qk.qat.fuse.fused_parts(converted).values()]
    floats = [line.split()[0] for line in plan.splitlines() if " out=f" in line]
    assert floats == ["input", "linear"]
    with torch.no_grad():
        expected, y = prepared(x), converted(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-2 * float(expected.abs().max()))
        forward = converted.__dict__.pop("forward")
        torch.testing.assert_close(y, converted(x), rtol=1e-6, atol=1e-6)
        assert forward.refused is None


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.log_scale.data.fill_(0.5),
        lambda q: q.zero_point.data.fill_(120),
        lambda q: q._scale.mul_(1.5),
        lambda q: setattr(q, "log_scale", nn.Parameter(torch.full_like(q.log_scale, 0.25))),
    ],
)
def test_programs_follow_what_quantizers_of_sums_hold(change: Callable[[Any], object]) -> None:
    """They remember scale and zero point for as long only as these are made of the same numbers."""
    torch.manual_seed(0)
    converted, x = qk.convert(prepared_of(Net()).eval()), torch.randn(SHAPE)
    with torch.no_grad():
        before, again = converted(x), converted(x)
        quantizer = next(m for name, m in converted.named_modules() if name.endswith("add_fake_quant"))
        change(quantizer)
        after = converted(x)
        converted.__dict__.pop("forward")
        assert torch.equal(before, again)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, converted(x), rtol=1e-6, atol=1e-6)


SPECS = {
    "the layer's": (qk.QSpec(8), qk.QSpec(symmetric=False), True),
    "another way": (qk.QSpec(8), qk.QSpec(symmetric=False, quantizer="ema"), True),
    "fewer bits": (qk.QSpec(8), qk.QSpec(4, symmetric=False), False),
    "dynamic": (qk.QSpec(8), qk.QSpec(quantizer="dynamic"), False),
    "no input": (qk.QSpec(8), None, False),
}


@pytest.mark.parametrize("case", SPECS)
def test_layers_that_read_a_sum_share_its_quantizer_if_they_can(case: str) -> None:
    residual, layer, shared = SPECS[case]
    prepared = prepared_of(Net(), qk.QConfig(input=layer, residual=residual))
    own, quantizer = prepared.layer1[2].conv1.input_fake_quant, roles(prepared)["layer1.1.add"]
    assert (own is quantizer) == shared
    assert quantizer.bits == 8
    assert quantizer.quantizer == (layer if shared else residual).quantizer
    if layer is not None:
        assert own.bits == layer.bits
    check_training(prepared, torch.randn(SHAPE))
    qk.convert(prepared.eval())(torch.randn(SHAPE))


def test_rules() -> None:
    rules: list[Any] = [("layer1.1", {"residual": None}), ("layer1.2.conv1", {"input": {"bits": 6}})]
    found = roles(prepared_of(Net(), qk.QConfig(residual=qk.QSpec(8), rules=rules)))
    assert list(found) == ["layer1.0.add_input", "layer1.0.add", "layer1.2.add_input", "layer1.2.add"]
    only = roles(prepared_of(Net(), qk.QConfig(rules=[("layer1.0", {"residual": qk.QSpec(6)})])))
    assert {name: q.bits for name, q in only.items()} == {"layer1.0.add_input": 6, "layer1.0.add": 6}
    by_type = qk.QConfig(residual=qk.QSpec(8), rules=[(Basic, {"residual": None}), (Net, {"residual": {"bits": 7}})])
    assert {name: q.bits for name, q in roles(prepared_of(Net(), by_type)).items()} == {"pool_input": 7}
    with pytest.raises(
        ValueError, match=r"layer 'layer1\.0': a rule gives 'hidden'; accepted .* input, output, residual"
    ):
        qk.prepare(Net(), qk.QConfig(rules=[("layer1.0", {"hidden": qk.QSpec(8)})]))


class Stochastic(nn.Module):
    """Other sums in training, an argument that may be missing, one by name, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.twice = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), False

    def forward(self, x, skip=None, *, scale: bool = False):
        y = self.a(x)
        if self.training:
            y = y + self.b(x).detach() * 0.1
        if skip is not None:
            y = torch.cat([y, skip], 1)
        y = y + y.flip(1)
        if scale:
            y = y * 2
        return y + y.flip(0) if self.twice else y


def test_a_forward_that_does_other_things_in_other_calls() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Stochastic(), Stochastic()

        def forward(self, x):
            y = self.one(x)
            return self.two(y, skip=x, scale=True)

    torch.manual_seed(0)
    model, x = Outer(), torch.randn(SHAPE)
    prepared = prepared_of(model)
    assert {name.partition(".")[2] for name in roles(prepared) if name.startswith("two")} >= {"cat", "add"}
    qk.enable_fake_quant(prepared, False)
    prepared.one.twice = True
    with pytest.warns(UserWarning, match=r"forward\+\d+(#\d+)?: a sum or concatenation that was not there"):
        prepared(x)
    warnings.simplefilter("ignore")  # further ones of that kind
    for training in (True, False):
        model.train(training)
        prepared.train(training)
        for twice in (False, True, False):
            model.one.twice = prepared.one.twice = twice
            assert torch.equal(prepared(x), model(x))
            assert torch.equal(prepared.one(x, x), model.one(x, x))
            assert torch.equal(prepared.one(skip=x, x=x, scale=True), model.one(x, x, scale=True))
    with pytest.raises(TypeError, match="unexpected keyword"):
        prepared.one(x, nothing=1)
    with pytest.raises(TypeError, match="missing"):
        prepared.one()


def test_what_the_caller_gave_is_overwritten_as_before() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x += self.conv(x)
            return F.relu(x)

    torch.manual_seed(0)
    model, x = Writes().eval(), torch.randn(SHAPE)
    prepared = prepared_of(model)
    assert list(roles(prepared)) == ["add"]
    qk.enable_fake_quant(prepared, False)
    with torch.no_grad():
        a, b = x.clone(), x.clone()
        assert torch.equal(prepared(a), model(b))
        assert torch.equal(a, b)
        assert not torch.equal(a, x)


def test_a_module_called_twice_and_one_under_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fc = Basic(), nn.Linear(4, 3)
            self.again = self.block

        def forward(self, x, y):
            return self.fc((self.again(self.block(x)) + self.block(y)).mean((2, 3)))

    torch.manual_seed(0)
    model, pair = Twice(), (torch.randn(SHAPE), torch.randn(SHAPE))
    prepared = qk.prepare(model, ON)
    qk.calibrate(prepared, [pair])
    check_numbers(model, prepared, *pair)
    check_training(prepared, *pair)
    assert prepared.again is prepared.block


def test_a_tensor_that_enters_two_modules() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.fc = nn.Conv2d(4, 4, 1), Basic(), Basic(), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            return self.fc(torch.cat([self.one(x), self.two(x)], 1).mean((2, 3)))

    torch.manual_seed(0)
    prepared = prepared_of(Two())
    quantizer = prepared.one.add_input_fake_quant
    assert quantizer is prepared.two.add_input_fake_quant is prepared.two.conv1.input_fake_quant
    calls: list[torch.Tensor] = []
    compute = quantizer._forward
    quantizer._forward = lambda x: calls.append(x) or compute(x)
    check_training(prepared, torch.randn(SHAPE))
    assert len(calls) == 1
    del quantizer._forward
    check_numbers(qk.unprepare(prepared), prepared, torch.randn(SHAPE))


def test_a_pool_in_a_sequential() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    prepared, x = prepared_of(model).eval(), torch.randn(SHAPE)
    assert {"2.input_fake_quant.scale", "4.input_fake_quant.scale"} <= set(prepared.state_dict())
    converted = qk.convert(prepared)
    ((plan,),) = [part.plans for part in qk.qat.fuse.fused_parts(converted).values()]
    assert [line.split()[0] for line in plan.splitlines() if " out=f" in line] == ["input", "linear"]
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared(x), rtol=1e-5, atol=1e-2)
    assert type(qk.unprepare(prepared)[2]) is nn.AvgPool2d
    own = [("2", {"residual": None}), ("4", {"input": qk.QSpec(7)})]
    found = qk.prepare(model, qk.QConfig(residual=qk.QSpec(8), rules=own))
    assert "2.input_fake_quant.scale" not in found.state_dict()
    assert found[4].input_fake_quant.bits == 7


def test_a_parameter_that_a_rule_names_beside_a_sum() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.conv = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return F.conv2d(x, self.w) + self.conv(x)

    torch.manual_seed(0)
    prepared = prepared_of(Own(), qk.QConfig(residual=qk.QSpec(8), rules=[("w", {"weight": qk.QSpec(4)})])).eval()
    x = torch.randn(SHAPE)
    quantized = prepared.w_fake_quant(prepared._parameters["w"])
    y = prepared.add_input_fake_quant(F.conv2d(x, quantized)) + prepared.conv(x)
    assert torch.equal(prepared(x), prepared.add_fake_quant(y))
    torch.testing.assert_close(qk.convert(prepared)(x), prepared(x), rtol=1e-4, atol=0.05)
    assert type(qk.unprepare(prepared)) is Own
