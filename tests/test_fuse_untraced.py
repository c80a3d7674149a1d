"""Forwards that a graph would not do as they are written: they run as they are, and ``report`` says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import made, own
from torch import Tensor, nn

import qkernels as qk
from qkernels.qat.fuse import fused_parts


def asks(x: Any) -> Any:
    return x + 1 if isinstance(x, Tensor) else x


def asks_torch(x: Any) -> Any:
    return x + 1 if torch.is_tensor(x) else x


def asks_by_a_tuple(x: Any) -> Any:
    (x,) = x if isinstance(x, tuple | list) else (x,)
    return x + 1


def without_gradient(x: Any) -> Any:
    with torch.no_grad():
        return x * 2


def with_gradient(x: Any) -> Any:
    with torch.enable_grad():
        return x * 2


def in_low_precision(x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ x.mT
    return y.float()


def by_mode(x: Any) -> Any:
    return x * 3 if torch.is_grad_enabled() else x * 2


def asks_in_a_match(x: Any) -> Any:
    match x:
        case Tensor():
            return x + 1
    return x


def asks_and_catches(x: Any) -> Any:
    try:
        tensor = isinstance(x, Tensor)
    except Exception:
        tensor = False
    return x + 1 if tensor else x


def asks_for_the_type_of_an_attribute(x: Any) -> Any:
    return x + 1 if isinstance(x.mT, Tensor) else x


def asks_for_an_attribute(x: Any) -> Any:
    return x if hasattr(x, "nothing") else x + 1


def gets_an_attribute(x: Any) -> Any:
    return x + getattr(x, "nothing", 1)


def sets_an_attribute(x: Any) -> Any:
    x.seen = True
    return x + 1


def overwrites_a_constant(x: Any) -> Any:
    total = torch.zeros(8)
    total.add_(x[0])
    return x + total


def overwrites_a_part_of_a_constant(x: Any) -> Any:
    total = torch.zeros(8, 8)
    total[:, 0] = x[:, 0]
    return x + total


REASONS = {
    asks_in_a_match: "asks for the type",
    asks_and_catches: "asks for the type",
    asks_for_the_type_of_an_attribute: "asks for the type",
    asks_for_an_attribute: "asks whether what it is given has the attribute nothing",
    gets_an_attribute: "asks whether what it is given has the attribute nothing",
    sets_an_attribute: "sets the attribute seen of what it is given",
    overwrites_a_constant: "overwrites a tensor that it makes of constants",
    overwrites_a_part_of_a_constant: "overwrites a tensor that it makes of constants",
    asks: "asks for the type",
    asks_torch: "asks for the type",
    asks_by_a_tuple: "asks for the type",
    without_gradient: "switches gradients or autocast",
    with_gradient: "switches gradients or autocast",
    in_low_precision: "switches gradients or autocast",
    by_mode: "asks whether gradients are wanted",
}


class Net(nn.Module):
    def __init__(self, step: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.last, self.step = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 3)), step

    def forward(self, x):
        return self.last(self.step(self.first(x)))


@pytest.mark.parametrize("step", REASONS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("grad", [False, True])
def test_the_forward_runs_as_it_is_written(step: Callable[[Any], Any], grad: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8)
    with torch.set_grad_enabled(grad):  # whatever the mode in which the model is converted
        prepared, converted = made(Net(step), (x,))
    assert REASONS[step] in qk.report(converted).notes[""]
    assert list(fused_parts(converted)) == ["first", "last"]
    for mode in (False, True):
        with torch.set_grad_enabled(mode):
            given = x.clone().requires_grad_(mode)
            y, want = converted(given), prepared(given)
            assert torch.equal(y, *own(converted, given))
            assert y.requires_grad == want.requires_grad == mode
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))


def test_autocast_that_is_off_anyway_is_no_switch() -> None:
    class Off(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.b(self.a(x).relu())

    x = torch.randn(4, 8)
    _, converted = made(Off(), (x,))
    assert [len(part.plans) for part in fused_parts(converted).values()] == [1]
    with torch.no_grad():
        assert torch.equal(converted(x), *own(converted, x))
