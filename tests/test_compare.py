"""compare: what layers return, folded BatchNorms and repeated calls find each other, departures are marked."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, snapshot
from torch import nn
from torch.nn import functional as F

import qkernels as qk

pytestmark = pytest.mark.filterwarnings("ignore:prepare. ")


class Mixed(nn.Module):
    """Layers with tuples for results, one that is called twice, a ReLU in place, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.product, self.unused = nn.Linear(8, 8), qk.nn.MatMul(), nn.Linear(2, 2)
        self.lstm, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, scale=1.0):
        x = self.twice(F.relu_(self.twice(x * scale)))
        x, _ = self.lstm(x)
        y, _ = self.attention(x, x, x)
        return {"scores": self.product(x, y.transpose(1, 2)), "length": torch.tensor(x.shape[1])}


def quantized(model: nn.Module, batch, *config) -> nn.Module:
    prepared = qk.prepare(model.eval(), *config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that no batch reaches
        qk.calibrate(prepared, [batch], fallback=1.0)
    return prepared


def hooks_of(*models: nn.Module) -> list[int]:
    return [len(module._forward_hooks) for model in models for module in model.modules()]


def rows_of(found: qk.qat.Comparison) -> dict[tuple[str, int, int], qk.qat.ComparedLayer]:
    return {(row.name, row.call, row.tensor): row for row in found.layers}


def test_figures_are_those_of_a_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 7), nn.ReLU(inplace=True), nn.Linear(7, 5)), torch.randn(9, 12)
    prepared = quantized(model, x, qk.QConfig(qk.QSpec(3)))
    with torch.no_grad():
        y, z = model[0](x).double(), prepared[0](x).double()
        whole, other = model(x).double(), prepared(x).double()
    first, last, output = qk.compare(model, prepared, x).layers
    assert [(row.name, row.kind, row.shape) for row in (first, last, output)] == [
        ("0", "QATLinear", (9, 7)),
        ("2", "QATLinear", (9, 5)),
        ("", type(prepared).__name__, (9, 5)),
    ]
    for row, a, b in ((first, y, z), (last, whole, other), (output, whole, other)):
        assert row.sqnr == pytest.approx(10 * math.log10((a**2).sum() / ((b - a) ** 2).sum()))
        assert row.max_error == pytest.approx((b - a).abs().max().item())
        assert row.mean_error == pytest.approx((b - a).mean().item())
        assert row.cosine == pytest.approx(F.cosine_similarity(a.flatten(), b.flatten(), 0).item())


@pytest.mark.parametrize("converts", [False, True])
def test_tuples_calls_and_models_that_stay(converts: bool) -> None:
    torch.manual_seed(0)
    model, batch = Mixed(), {"x": torch.randn(2, 5, 8), "scale": 2.0}
    prepared = quantized(model, batch)
    made = qk.convert(prepared) if converts else prepared.train()
    model.lstm.train()
    before, float_before, state = snapshot(made), snapshot(model), torch.get_rng_state()
    hooks = hooks_of(model, made)
    found = qk.compare(model, made, batch)
    assert_unchanged(made, before)
    assert_unchanged(model, float_before)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks_of(model, made) == hooks
    assert list(rows_of(found)) == [
        ("twice", 0, 0),
        ("twice", 1, 0),
        *(("lstm", 0, tensor) for tensor in range(3)),
        *(("attention", 0, tensor) for tensor in range(2)),
        ("product", 0, 0),
        ("", 0, 0),
    ]
    assert all(row.sqnr > 30 and row.cosine > 0.999 for row in found.layers)
    assert found.first is None
    assert found.notes["unused"] == "nothing called it on the batch"
    assert "twice call 2 " in str(found)
    assert "lstm [2] " in str(found)


def test_a_folded_batch_norm_and_programs() -> None:
    """The last row is the converted model's own output, though it ran layer by layer; the convolution has no norm."""
    torch.manual_seed(0)
    model, x = ConvNet().eval(), images()
    prepared = quantized(model, x)
    converted = qk.convert(prepared)
    assert converted.forward.plans or converted.forward.reason is None
    found = rows_of(qk.compare(model, converted, x))
    assert list(found) == [(name, 0, 0) for name in ("conv1", "conv2", "fc", "")]
    assert all(row.sqnr > 25 for row in found.values())
    with torch.no_grad():
        y, z = model(x).double(), converted(x).double()
        assert found["", 0, 0].sqnr == pytest.approx(10 * math.log10((y**2).sum() / ((z - y) ** 2).sum()), abs=0.1)
    assert [row.name for row in qk.compare(model, prepared, x).layers] == ["conv1", "norm1", "conv2", "norm2", "fc", ""]
    beside = rows_of(qk.compare(prepared, converted, x))
    assert beside["conv1", 0, 0].sqnr > 100


def test_the_first_layer_that_departs_is_marked() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5))), torch.randn(64, 32)
    prepared = quantized(model, x)
    assert qk.compare(model, prepared, x).first is None
    with torch.no_grad():
        prepared[2].bias += 0.2
    found = qk.compare(model, prepared, x)
    assert found.first is not None
    assert found.first.name == "2"
    assert found.first.mean_error == pytest.approx(0.2, abs=0.01)
    (marked,) = [line for line in str(found).splitlines() if "first to depart" in line]
    assert marked.startswith("2 ")
    narrow = quantized(model, x, qk.QConfig(qk.QSpec(2)))  # errors that the width explains, and that add up
    assert qk.compare(model, narrow, x).first is None
    with torch.no_grad():
        narrow[3].weight.neg_()
        prepared[4].bias[0] = torch.nan
    assert qk.compare(model, narrow, x).first.name == "3"
    found = qk.compare(model, prepared, x)
    assert [row.name for row in found.layers if row.departs] == ["2", "4", ""]
    parsed = json.loads(found.to_json())
    assert parsed["first"] == "2"
    assert parsed["layers"][4]["sqnr"] == "nan"
    with torch.no_grad():
        prepared[4].bias[0] = torch.inf
    assert qk.compare(model, prepared, x).layers[4].sqnr == -math.inf
    assert [row.sqnr for row in qk.compare(model, model, x).layers] == [math.inf] * 6


class Routed(nn.Module):
    """The rows that a router picks go through a layer, in as many calls as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x):
        left = self.router(x)[:, 0] > 0
        return torch.stack([self.expert(row) if mine else row for row, mine in zip(x, left, strict=True)]), x[left]


def test_calls_and_shapes_that_differ() -> None:
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(20, 4)
    prepared = quantized(model, x)
    with torch.no_grad():
        prepared.router.bias += 0.5
    found = qk.compare(model, prepared, x)
    assert "calls in the float model" in found.notes["expert"]
    row = rows_of(found)["", 0, 1]
    assert (row.sqnr, row.max_error, row.cosine, row.departs) == (None, None, None, False)
    assert "–" in str(found)
    assert found.to_json()


def test_bad_arguments() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    prepared = qk.prepare(model, qk.QConfig(qk.QSpec(4), None))
    before = snapshot(prepared)
    qk.compare(model, prepared, x)  # the weight's quantizer has no scale yet, and starts none
    assert_unchanged(prepared, before)
    with pytest.raises(TypeError, match="float_model: got a int"):
        qk.compare(3, prepared, x)
    with pytest.raises(TypeError, match="batch, for float_model: got a str"):
        qk.compare(model, prepared, "x")
    with pytest.raises(ValueError, match="q_model: got one with none of the layers 0;"):
        qk.compare(model, nn.Sequential(), x)
    other = qk.prepare(nn.Sequential(nn.Linear(4, 3)), qk.QConfig(qk.QSpec(4), None))
    for first, second, batch, error, text in (
        (prepared, model, x, ValueError, r"^q_model: got a float model, .*qk.compare\(float_model, q_model, batch\)"),
        (qk.convert(prepared), model, x, ValueError, "^q_model: got a float model, "),
        (model, other, x, ValueError, r"^q_model: its '0.weight' has shape \[3, 4\]; accepted: \[4, 4\], as in"),
        (model, prepared, x[:0], ValueError, "^batch: got one without samples"),
        (model, prepared, {"x": x}, TypeError, "^batch, for float_model: the model failed with .*; accepted: "),
        (
            model,
            prepared,
            torch.randn(3, 5),
            RuntimeError,
            "^batch, for float_model: layer '0' .* failed with",
        ),
        (model, qk.prepare(model), x, RuntimeError, r"^batch, for q_model: layer '0' .*call qk.calibrate"),
    ):
        with pytest.raises(error, match=text):
            qk.compare(first, second, batch)
    assert hooks_of(model) == [0, 0]
