"""sensitivity: scores are what a hand computes, layers that belong together are tried together, the model stays."""

from __future__ import annotations

import random

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, snapshot
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import FakeQuantize
from qkernels.qat.sensitivity_table import METRICS, SensitivityRow


class Attention(nn.Module):
    """Three layers with one input, a table whose weight is the head's, and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(16, 16)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))


def mse(output, batch):
    return output.square().mean()


def batch_of_images():
    return [images(4), images(4)]


@pytest.mark.parametrize("metric", ["sqnr", "kl", "loss"])
def test_scores_of_outputs(metric: str) -> None:
    layer, x = nn.Linear(12, 5), torch.randn(40, 12)
    found = qk.sensitivity(layer, [x], metric=metric, bits=(3,), loss=mse if metric == "loss" else None)
    quantizer = FakeQuantize(bits=3, granularity=qk.PerChannel(0), shape=(5, 12))
    y, quantized = layer(x).double(), F.linear(x, quantizer(layer.weight), layer.bias).double()
    expected = {
        "sqnr": lambda: (y - quantized).square().sum() / y.square().sum(),
        "kl": lambda: F.kl_div(quantized.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
        "loss": lambda: quantized.square().mean() - y.square().mean(),
    }[metric]()
    (row,) = [row for row in found.rows if row.tensor == "weight"]
    assert row.scores[3] == pytest.approx(expected.item(), rel=1e-4)


def test_fisher_score() -> None:
    layer, x = nn.Linear(12, 5), torch.randn(40, 12)
    found = qk.sensitivity(layer, [x, x], metric="fisher", bits=(3,), loss=mse)
    quantizer = FakeQuantize(bits=3, granularity=qk.PerChannel(0), shape=(5, 12))
    y = layer(x)
    gradient = 2 * y / y.numel()
    expected = (gradient * (F.linear(x, quantizer(layer.weight), layer.bias) - y)).square().sum()
    assert found.rows[0].scores[3] == pytest.approx(expected.item(), rel=1e-4)
    assert found.rows[1].tensor == "input"
    assert found.rows[1].scores[3] > 0


def test_hessian_score() -> None:
    """With one input feature the Hessian by the weights is diagonal, and random signs give its trace exactly."""
    layer, x = nn.Linear(1, 6, bias=False), torch.randn(40, 1)
    config = qk.QConfig(weight=qk.QSpec(3, qk.PerTensor()))
    found = qk.sensitivity(layer, [x], metric="hessian", bits=(3,), loss=lambda y, _: y.square().sum(), config=config)
    quantizer = FakeQuantize(bits=3, shape=(6, 1))
    moved = (quantizer(layer.weight) - layer.weight).square().sum()
    (row,) = found.rows
    assert row.scores[3] == pytest.approx((2 * x.square().sum() * moved).item(), rel=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prepared", [False, True])
def test_model_and_random_generators_stay(metric: str, prepared: bool) -> None:
    model = nn.Sequential(ConvNet(), nn.Dropout(), nn.Linear(5, 4))
    model[0].norm1.eval()
    if prepared:
        model = qk.prepare(model)
        qk.calibrate(model, batch_of_images())
    model.train()
    model[0].norm1.eval()
    before, states = snapshot(model), (torch.get_rng_state(), random.getstate())
    loss = mse if metric in ("loss", "fisher", "hessian") else None
    first = qk.sensitivity(model, batch_of_images(), metric=metric, bits=(8, 2), loss=loss)
    torch.set_rng_state(states[0])
    assert_unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())
    second = qk.sensitivity(model, batch_of_images(), metric=metric, bits=(8, 2), loss=loss)
    assert first == second
    assert random.getstate() == states[1]


def test_what_a_forward_draws_is_kept_and_repeated() -> None:
    """Dropout that acts in eval mode too: equal draws in float and quantized, and no trace in the generators."""

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 8)

        def forward(self, x):
            return F.dropout(self.fc(x), random.uniform(0.4, 0.6), training=True)

    model, x = Drawing(), torch.randn(64, 64)
    before = torch.get_rng_state(), random.getstate()
    found = qk.sensitivity(model, [x], bits=(8,))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(row.scores[8] < 1e-3 for row in found.rows)


@pytest.mark.filterwarnings("ignore:qk.sensitivity. no batch reached unused:UserWarning")
def test_layers_that_belong_together() -> None:
    found = qk.sensitivity(Attention(), [torch.randint(0, 30, (4, 6))], bits=(8, 4))
    weights = {row.layers: row for row in found.rows if row.tensor == "weight"}
    assert set(weights) == {("table", "head"), ("query", "key", "value")}
    assert weights["table", "head"].elements == 30 * 16
    assert weights["table", "head"].multiplications == 6 * 30 * 16  # the table looks up
    assert weights["query", "key", "value"].multiplications == 3 * 6 * 16 * 16
    assert found.unreached == ("unused",)
    assert "no batch reached unused" in repr(found)
    assert found.specs["unused"]["unused"]["weight"].bits == 8


def test_layer_that_nothing_reached_is_named() -> None:
    with pytest.warns(UserWarning, match="no batch reached unused"):
        qk.sensitivity(Attention(), [torch.randint(0, 30, (4, 6))], bits=(8,))


def test_table_and_json() -> None:
    found = qk.sensitivity(ConvNet(), batch_of_images())
    again = type(found).from_json(found.to_json())
    assert again == found
    lines = repr(found).splitlines()
    assert "metric 'sqnr'" in lines[0]
    assert "2 bits (dB)" in lines[1]
    order = [max(row.scores.values()) for row in found.worst_first()]
    assert order == sorted(order, reverse=True)
    assert lines[3].split()[:2] == [found.worst_first()[0].layers[0], found.worst_first()[0].tensor]
    conv = next(row for row in found.rows if row.layers == ("conv1",))
    assert conv.multiplications == 8 * 3 * 9 * 8 * 8
    assert all(row.scores[8] < row.scores[4] < row.scores[2] for row in found.rows)
    with pytest.raises(ValueError, match="values: got the key 'row'"):
        type(found).from_dict({"row": []})
    with pytest.raises(ValueError, match="text: got no JSON"):
        type(found).from_json("{")


@pytest.mark.parametrize("bits", [6, 4, 3])
def test_bytes_are_those_of_a_file(bits: int) -> None:
    """Up to bias, width, switches and the input's range."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 32))
    x = torch.randn(2, 8, 6, 6)
    found = qk.sensitivity(model, [x], bits=(bits,))
    prepared = qk.prepare(model, qk.QConfig(qk.QSpec(bits)))
    qk.calibrate(prepared, [x])
    rows = {
        row.name: row.quantized_bytes - 4 * len(model.get_submodule(row.name).bias)
        for row in qk.report(prepared).layers
    }
    for row in found.rows:
        if row.tensor == "weight":
            assert 0 <= rows[row.layers[0]] - row.bytes[bits] <= 48


def test_only_widths_that_a_quantizer_takes() -> None:
    config = qk.QConfig(rules=[("0", {"weight": {"quantizer": "nf4", "bits": 4}})])
    found = qk.sensitivity(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), [torch.randn(9, 8)], config=config)
    widths = {(row.layers[0], row.tensor): list(row.scores) for row in found.rows}
    assert widths["0", "weight"] == [4]
    assert widths["1", "weight"] == [8, 4, 3, 2]


@pytest.mark.parametrize("metric", ["sqnr", "kl", "fisher", "hessian"])
def test_a_culprit_is_found(metric: str) -> None:
    """A weight that no input reaches, but that makes the steps of its layer coarse."""
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), torch.randn(32, 16)
    x[:, 0] = 0
    with torch.no_grad():
        model[0].weight[0, 0] = 20
    config = qk.QConfig(qk.QSpec(8, qk.PerTensor(), quantizer="minmax"), None)
    loss = mse if metric in ("fisher", "hessian") else None
    found = qk.sensitivity(model, [x], metric=metric, bits=(4,), config=config, loss=loss)
    assert found.worst_first()[0].layers == ("0",)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"metric": "sqnrs"}, ValueError, "metric: got 'sqnrs'; accepted: sqnr, kl, loss.*did you mean 'sqnr'"),
        ({"bits": ()}, TypeError, r"bits: got \(\); accepted: one or more of 2 to 8"),
        ({"bits": 4}, TypeError, "bits: got 4; accepted"),
        ({"bits": (9,)}, ValueError, "bits: got 9; accepted: 2 to 8"),
        ({"bits": ("4",)}, TypeError, "bits: got '4'"),
        ({"metric": "fisher"}, ValueError, "loss: got None with metric='fisher'"),
        ({"metric": "loss", "loss": 3}, TypeError, "loss: got a int"),
        ({"metric": "loss", "loss": lambda y, b: "x"}, TypeError, "loss: got a str"),
        ({"metric": "loss", "loss": lambda y, b: y}, ValueError, "loss: got a tensor of shape"),
        ({"metric": "loss", "loss": lambda y, b: float("nan")}, ValueError, "loss: got nan"),
        ({"metric": "fisher", "loss": lambda y, b: 3.0}, TypeError, "loss: got a value without a gradient"),
        ({"batches": []}, ValueError, "batches: got none"),
        ({"batches": images()}, TypeError, "batches: got a Tensor"),
        ({"batches": [images()[:0]]}, ValueError, "batches: got 1 without samples"),
        ({"batches": [images() * torch.nan]}, ValueError, r"batches\[0\].*NaN"),
        ({"max_batches": 0}, ValueError, "max_batches: got 0"),
        ({"model": 3}, TypeError, "model: got a int"),
        ({"config": "w8a9"}, ValueError, "config: got 'w8a9'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(options, error, text) -> None:
    model = ConvNet()
    before = snapshot(model)
    arguments = {"model": model, "batches": batch_of_images(), **options}
    with pytest.raises(error, match=text):
        qk.sensitivity(arguments.pop("model"), arguments.pop("batches"), **arguments)
    assert_unchanged(model, before)


def test_refusals_of_prepared_models() -> None:
    prepared = qk.prepare(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="config: got one with a prepared model"):
        qk.sensitivity(prepared, [torch.randn(3, 8)], config=qk.QConfig())
    only = qk.QConfig(qk.QSpec(2, quantizer="ternary"), None)
    with pytest.raises(ValueError, match="which no quantizer of the model takes"):
        qk.sensitivity(nn.Linear(8, 4), [torch.randn(3, 8)], config=only, bits=(8,))


def test_rows_compare_by_value() -> None:
    assert SensitivityRow(("a",), "weight", {8: 1.0}) == SensitivityRow(("a",), "weight", {8: 1.0})


def test_multiplications_of_attention_and_bags() -> None:
    """Key and value have other lengths than the query; a bag looks up."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(20, 16)
            self.same = nn.MultiheadAttention(16, 2, batch_first=True)
            self.other = nn.MultiheadAttention(16, 2, kdim=8, vdim=4, batch_first=True)

        def forward(self, ids, x, k, v):
            x = self.same(x + self.bag(ids)[:, None], x, value=x)[0]
            return self.other(x, k, v)[0]

    batch = torch.randint(0, 20, (2, 3)), torch.randn(2, 5, 16), torch.randn(2, 7, 8), torch.randn(2, 7, 4)
    found = qk.sensitivity(Model(), [batch], bits=(8,))
    each = {row.layers: row.multiplications for row in found.rows if row.tensor == "weight"}
    assert each["bag",] == 0
    assert each["same",] == 3 * 5 * 16 * 16
    assert each["other",] == 5 * 16 * 16 + 7 * 16 * (8 + 4)
    assert each["other.out_proj",] == 5 * 16 * 16


def test_names_are_those_inside_a_wrapper() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(9, 8)
    compiled = torch.compile(model, backend="eager")
    found = qk.sensitivity(compiled, [x], bits=(4,))
    assert list(found.specs) == ["0", "1"]
    assert isinstance(qk.prepare(model, qk.assign(found, 4, cost="bits").config)[0], qk.nn.QATLinear)
    assert list(qk.measure_latency(compiled, x, bits=(4,), calls=1)) == ["0", "1"]


def test_fisher_looks_at_a_layer_before_hooks_of_the_user() -> None:
    class Threefold(nn.Module):
        def forward(self, x):
            return 3 * x

    layers, x = [nn.Linear(8, 8), nn.Linear(8, 4)], torch.randn(9, 8)
    plain = qk.sensitivity(nn.Sequential(layers[0], Threefold(), layers[1]), [x], metric="fisher", loss=mse)
    layers[0].register_forward_hook(lambda layer, args, output: 3 * output)
    hooked = qk.sensitivity(nn.Sequential(layers[0], nn.Identity(), layers[1]), [x], metric="fisher", loss=mse)
    for a, b in zip(plain.rows, hooked.rows, strict=True):
        assert a.scores == pytest.approx(b.scores, rel=1e-5)
