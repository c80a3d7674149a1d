"""Forwards that no trace does with a quantized residual: they stay as they are, and are named."""

from __future__ import annotations

import linecache
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # else checkpoint would import it while torch.fx has replaced the functions of math
from test_residual import ON, SHAPE, Block, roles
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.qat import traced_forward


def branches(block, a, b):
    return a + b if float(a.sum()) > 1e9 else a + b * 2


def asks(block, a, b):
    return a + b if isinstance(a, torch.Tensor) else a


def asks_and_catches(block, a, b):
    try:
        return a + b if isinstance(a, torch.Tensor) else a
    except Exception:
        return a


def asks_for_an_attribute(block, a, b):
    return a if hasattr(a, "nothing") else a + b


def sets_an_attribute(block, a, b):
    a.seen = True
    return a + b


def without_gradient(block, a, b):
    with torch.no_grad():
        y = a * 2
    return y + b


def by_mode(block, a, b):
    return a + b if torch.is_grad_enabled() else a + b * 2


def counts(block, a, b):
    block.count = getattr(block, "count", 0) + 1
    return a + b


def draws(block, a, b):
    return a + b * float(torch.rand(()))


def makes(block, a, b):
    return a + b + torch.tensor(1.0)


def checkpointed(block, a, b):
    return checkpoint(block.a, a, use_reentrant=False) + b


LEFT_ALONE = {
    branches: r"TypeError: float\(\)",
    asks: "asks for the type",
    asks_and_catches: "asks for the type",
    asks_for_an_attribute: "asks whether what it is given has the attribute nothing",
    sets_an_attribute: "sets the attribute seen of what it is given",
    without_gradient: "switches gradients",
    by_mode: "asks whether gradients are wanted",
    counts: "sets attributes",
    draws: "random numbers",
    makes: "makes a tensor of nothing",
    checkpointed: "activation checkpointing",
}


@pytest.mark.parametrize("join", LEFT_ALONE, ids=lambda join: join.__name__)
def test_forwards_that_no_trace_does_are_left_alone_and_named(join: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(join), nn.Conv2d(4, 4, 1)), torch.randn(SHAPE)
    before = dict(vars(model[0]))
    with pytest.warns(
        UserWarning, match=rf"sums and pools in the forward of 1 module stay in float: 0 \(.*{LEFT_ALONE[join]}"
    ):
        prepared = qk.prepare(model, ON)
    assert roles(prepared) == {}
    assert type(prepared[0]) is Block
    assert {k: v for k, v in vars(model[0]).items() if k != "count"} == {
        k: v for k, v in before.items() if k != "count"
    }
    qk.calibrate(prepared, [x])
    assert re.search(LEFT_ALONE[join], qk.report(prepared).notes["0"])
    qk.enable_fake_quant(prepared, False)
    torch.manual_seed(3)
    y = prepared(x)
    torch.manual_seed(3)
    assert torch.equal(y, model(x))
    assert "why_sums_are_float" not in vars(qk.unprepare(prepared)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.prepare(model, qk.QConfig(residual=qk.QSpec(8), rules=[("0", {"residual": None})]))


def test_what_holds_no_sum_is_not_named() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.prepare(Plain(), ON)


class Keeps(Block):
    """Two sums, of which it hands the first one to what it gets besides."""

    def __init__(self, keep: Callable[[Any, Any], Any]) -> None:
        super().__init__(torch.add)
        self.keep = keep

    def forward(self, x, cache=None):
        y = self.a(x) + self.b(x)
        if cache is not None:
            self.keep(cache, y)
        return y + x


class Holds(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([inner])

    def forward(self, x, cache):
        return self.inner[0](x, cache)


def test_what_a_forward_does_to_other_arguments() -> None:
    """It calls their methods as ever; a call that would set an attribute is refused, as it would be lost."""

    def attribute(cache, y):
        cache.last = y

    x = torch.randn(SHAPE)
    for keep, empty in ((lambda cache, y: cache.append(y), list), (lambda cache, y: cache(y), Seen)):
        model = Keeps(keep)
        prepared, cache = qk.prepare(model, ON), empty()
        qk.calibrate(prepared, [x])
        qk.enable_fake_quant(prepared, False)
        y = prepared(x, cache)
        (kept,) = cache if isinstance(cache, list) else cache.values
        assert torch.equal(kept, model.a(x) + model.b(x))
        assert torch.equal(y, kept + x)
    prepared, cache = qk.prepare(Keeps(attribute), ON), Seen()
    qk.calibrate(prepared, [x])
    text = (
        r"Keeps.?: its sums cannot be quantized in a call with cache given: it sets the attribute last .*; "
        r"accepted: .* the rule \(Keeps, \{\"residual\": None\}\)"
    )
    for whole, name in ((prepared, ""), (Holds(prepared), r"inner\.0 \(")):
        with pytest.raises(RuntimeError, match=f"^{name}{text}"):
            whole(x, cache)
    assert vars(cache) == {"values": []}
    assert prepared(x).shape == x.shape


class Seen:
    def __init__(self) -> None:
        self.values: list[Any] = []

    def __call__(self, y: Any) -> None:
        self.values.append(y)


class Named(Block):
    def forward(self, x, name="", times=1.0):
        y = self.a(x) + self.b(x)
        return y * times * self.factor if name[-1:] in "02468" else y


def test_traces_of_many_kinds_of_calls_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that the model itself makes stay known."""
    monkeypatch.setattr(traced_forward, "KEPT", kept := 6)
    x = torch.randn(SHAPE)
    model = Named(torch.add)
    model.factor = 1.0
    prepared = qk.prepare(model, ON)
    qk.calibrate(prepared, [x])
    made, files = prepared.traced_forward._made, len(linecache.cache)
    first, y = list(made), prepared(x)
    for i in range(kept + 3):
        assert torch.equal(prepared(x, f"a user's {i}"), y)
    assert list(made)[: len(first)] == first
    assert len(made) == len(first) + kept
    for i in range(3):  # an attribute by which the forward may decide is a part of the kind
        prepared.factor = 1.0 + i
        prepared(x)
    assert len(made) == len(first) + kept
    assert len(linecache.cache) < files + 2 * kept


def test_an_array_as_attribute_of_a_prepared_model() -> None:
    """Such attributes are known by their type alone: they cannot be compared or hashed."""
    model = Named(torch.add)
    model.factor, model.note = 1.0, None
    prepared, x = qk.prepare(model, ON), torch.randn(SHAPE)
    qk.calibrate(prepared, [x])
    before = prepared(x)
    for value in ([1, 2], {"a": 1}, torch.arange(3)):
        prepared.note = value
        assert torch.equal(prepared(x), before)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.cache = nn.Linear(8, 8), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = x * 2
        return self.project(self.cache)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


def test_what_a_forward_keeps_while_it_is_traced_is_not_there_in_the_next_trace() -> None:
    prepared = qk.prepare(nn.Sequential(Cached(), Sum()), ON)
    assert prepared[0].project.input_fake_quant.quantizer == "minmax"  # of a tensor that no weight made
    assert prepared[1].a.input_fake_quant is prepared[1].b.input_fake_quant
