"""What report says of models that torch.fx cannot trace, of layers that are called twice and of weights held twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels import QConfig, QSpec
from qkernels.qat.fuse import fused_parts

HAND_FLOATS = "its layers hand floats to each other: "
REMEDY = "; a module inside that torch.fx can trace, such as an nn.Sequential of them, hands on codes"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)


class DecidesByValues(Layers):
    def forward(self, x):
        if x.sum() > 0:
            x = x.abs()
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class TakesAny(Layers):
    def forward(self, *xs):
        return self.c(F.relu(self.b(F.relu(self.a(sum(xs))))))


class TakesAnyNames(Layers):
    def forward(self, x, **options):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Mended(DecidesByValues):
    """What the note asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(self.a, nn.ReLU(), self.b, nn.ReLU(), self.c)
        del self.a, self.b, self.c

    def forward(self, x):
        return self.body(x.abs() if x.sum() > 0 else x)


def prepared_and_converted(model: nn.Module, x: Any, config: QConfig | None = None) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, [x])
    return prepared, qk.convert(prepared.eval())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DecidesByValues, "torch.fx cannot trace its forward (TraceError: symbolically traced variables cannot be"),
        (TakesAny, "its forward takes any number of arguments"),
        (TakesAnyNames, "its forward takes any number of arguments"),
    ],
)
def test_a_model_that_cannot_be_traced(kind: type[nn.Module], reason: str) -> None:
    x = torch.randn(5, 8)
    for model in prepared_and_converted(kind(), (x,)):
        note = qk.report(model, (x,)).notes[""]
        assert note.startswith(HAND_FLOATS + reason)
        assert note.endswith(REMEDY)


def test_a_model_mended_as_the_note_says() -> None:
    x = torch.randn(5, 8)
    prepared, converted = prepared_and_converted(Mended(), (x,))
    assert list(fused_parts(converted)) == ["body"]
    for model in (prepared, converted):
        assert qk.report(model, (x,)).notes == {}


class CallsTwice(Layers):
    factor = 5.0

    def forward(self, x):
        return self.c(F.relu(self.a(F.relu(self.b(x)))) + self.a(self.factor * x))


def test_a_layer_that_is_called_on_inputs_of_other_ranges() -> None:
    x = torch.randn(50, 8)
    for model in prepared_and_converted(CallsTwice(), (x,)):
        found = qk.report(model, (x,)).notes
        assert list(found) == ["a"]
        assert found["a"].startswith("one scale serves its 2 calls, whose inputs differ by a factor of ")
        assert found["a"].endswith("(second.weight = first.weight, before prepare) has a scale for each")
    model = CallsTwice()
    model.factor = 0.3  # about that of the other call
    for each in prepared_and_converted(model, (x,)):
        assert qk.report(each, (x,)).notes == {}
    dynamic = QConfig(input=QSpec(8, quantizer="dynamic"))
    for each in prepared_and_converted(CallsTwice(), (x,), dynamic):
        assert "a" not in qk.report(each, (x,)).notes


class Shares(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_a_weight_under_two_quantizers() -> None:
    x = torch.randn(5, 8)
    prepared, _ = prepared_and_converted(Shares(), (x,), QConfig(rules=[("b", {"weight": {"bits": 4}})]))
    assert qk.report(prepared).notes == {
        "b": "its weight is also that of 'a', under another quantizer, so the file holds codes of both; the same spec "
        "for both makes them one"
    }
    assert qk.report(prepared_and_converted(Shares(), (x,))[0]).notes == {}


class Sum(Layers):
    def forward(self, x):
        y = self.a(x)
        return self.c(y + self.b(y))


def test_a_converted_model_with_quantizers_of_sums_is_not_its_own_reference() -> None:
    """Without those quantizers its layers would still round, so the SQNR would be that of the sums alone."""
    model, x = Sum(), torch.randn(16, 8)
    prepared = qk.prepare(model, QConfig(residual=QSpec(8)))
    qk.calibrate(prepared, [x])
    converted = qk.convert(prepared)
    assert all(row.output_sqnr is None for row in qk.report(converted, x).layers)
    measured = {row.name: row.output_sqnr for row in qk.report(converted, x, float_model=model).layers}
    for row in qk.report(prepared, x).layers:
        if row.kind == "QATLinear":
            assert row.output_sqnr is not None
            assert measured[row.name] == pytest.approx(row.output_sqnr, abs=1)


def test_a_report_reads_no_computed_weight() -> None:
    """Spectral norm takes a step of its iteration whenever its weight is read in training mode."""
    model = qk.prepare(nn.Sequential(*(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)) for _ in range(2))))
    qk.calibrate(model, [torch.randn(3, 4)])
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    assert not any("under another quantizer" in note for note in qk.report(model).notes.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
