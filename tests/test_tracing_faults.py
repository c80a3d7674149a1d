"""Faults of this package while it traces a model are not reported as the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fuse import made
from test_residual import ON, Block
from torch import nn

import qkernels as qk
from qkernels.qat import faithful_tracing, fuse


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


X = torch.randn(3, 8)


def broken(*_: Any) -> None:
    raise KeyError("no such node")


def test_a_fault_of_what_writes_programs_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is converted all the same; here, as in all tests, the warning is an error unless it is wanted."""
    monkeypatch.setattr(fuse, "parts_of", broken)
    fault = r"a fault of qkernels \(KeyError: 'no such node'\)"
    with pytest.warns(UserWarning, match=rf"Sequential: its layers run one by one because of {fault}"):
        prepared, converted = made(model(), (X,))
    assert not fuse.fused_parts(converted)
    torch.testing.assert_close(converted(X), prepared(X))
    with pytest.raises(UserWarning, match=fault):
        qk.convert(prepared)


def test_a_fault_of_the_tracer_is_not_the_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, _ = made(model(), (X,))
    monkeypatch.setattr(faithful_tracing, "StandIn", None)
    with pytest.raises(UserWarning, match=r"a fault of qkernels \(TypeError: 'NoneType' object is not callable"):
        qk.convert(prepared)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        qk.prepare(Block(torch.add), ON)


class Asserts(nn.Module):
    """Raises when it is traced, with an empty text."""

    def __init__(self, raised: Exception | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.raised = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), raised

    def forward(self, x):
        if type(x) is not torch.Tensor and self.raised is not None:
            raise self.raised
        assert isinstance(x, torch.Tensor)
        return self.norm(self.conv(x)) + 1


@pytest.mark.parametrize("raised", [None, KeyError(), NotImplementedError(), TypeError("a\nb")], ids=repr)
def test_whatever_a_forward_raises_when_it_is_traced_is_its_own(raised: Exception | None) -> None:
    x = torch.randn(2, 3, 4, 4)
    prepared, converted = made(Asserts(raised), (x,))
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared(x))
    name = "AssertionError" if raised is None else type(raised).__name__
    assert f"torch.fx cannot trace the model ({name}" in qk.report(converted).notes["norm"]
