"""advise: its figures are those of the steps by hand, its rules follow them, and the float model stays as it was."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from qat_models import assert_unchanged, snapshot
from torch import nn

import qkernels as qk
from qkernels import QConfig, QSpec


def network(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fidelity(model: nn.Module, x: torch.Tensor):
    """1 for the float model; less by the share of squared error in the outputs."""
    with torch.no_grad():
        target = model(x)
        return lambda other: 1 - (other(x) - target).square().sum() / target.var(0).sum() / len(x)


def advised(model: nn.Module, x: torch.Tensor, **options) -> qk.qat.Advice:
    return qk.advise(model, [x[: len(x) // 2]], **{"evaluate": fidelity(model, x), **options})


def by_hand(model: nn.Module, x: torch.Tensor, config: QConfig, rounded: bool) -> float:
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, [x[: len(x) // 2]])
    if rounded:
        qk.gptq(prepared, [x[: len(x) // 2]])
        qk.correct_bias(prepared, [x[: len(x) // 2]], float_model=model)
    with torch.no_grad():
        return float(fidelity(model, x)(prepared.eval()))


def of_code(advice: qk.qat.Advice, model: nn.Module, x: torch.Tensor) -> float:
    """The score of what the code to paste makes."""
    names = {"model": model, "batches": [x[: len(x) // 2]]}
    exec(advice.code, names)
    assert any("Int" in type(module).__name__ for module in names["converted"].modules())
    with torch.no_grad():
        return float(fidelity(model, x)(names["prepared"]))


def test_figures_and_verdicts_of_each_width() -> None:
    model, x = network(24, 48, 48, 6), torch.randn(256, 24)
    found = advised(model, x, tolerance=0.02)
    assert [each.bits for each in found.widths] == [8, 4, 3, 2]
    assert found.float_score == 1
    assert found.shuffled_score < 0.5
    for each in found.widths:
        config = QConfig(weight=QSpec(each.bits))
        plain, rounded = (by_hand(model, x, config, rounded) for rounded in (False, True))
        best = plain if plain >= 0.98 else max(plain, rounded)
        assert each.plain_score == best
        assert (each.verdict == "ptq") == (best >= 0.98)
        if each.verdict == "ptq":
            assert each.config == config
            assert each.steps == (("calibrate",) if best == plain else ("calibrate", "gptq", "correct_bias"))
        assert each.seconds > 0
    assert found.at(8).verdict == "ptq"
    assert found.at(2).verdict == "qat"
    assert found.at(2).every_layer
    assert {*found.at(2).layers} == {"0", "2", "4"}
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    assert found.float_bytes == 4 * weights
    assert found.at(4).bytes == weights // 2 + 4 * (48 + 48 + 6)  # codes, and a scale for each channel
    assert found.chosen == min((e for e in found.widths if e.verdict != "qat"), key=lambda each: each.bytes)
    assert of_code(found, model, x) == found.chosen.score
    text = repr(found)
    assert "8 bits" in text
    assert "PTQ is enough (calibrate)" in text
    assert found.code in text
    assert found.step_seconds is found.qat_seconds is None
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["widths"][1]["plain_score"] == found.at(4).plain_score
    assert QConfig.from_json(json.dumps(values["widths"][1]["config"])) == found.at(4).config
    with pytest.raises(ValueError, match="bits: got 5; accepted: 8, 4, 3, 2"):
        found.at(5)


def test_one_layer_wants_more_bits() -> None:
    """A weight with an element in each row that is far larger than the others, which then become zero."""
    model, x = network(32, 64, 64, 64, 64, 6), torch.randn(256, 32)
    with torch.no_grad():
        model[0].weight[:, 0] = 4.0
        x[:, 0] *= 0.01
    (each,) = (found := advised(model, x, bits=[4], tolerance=0.05)).widths
    assert each.verdict == found.verdict == "more bits"
    assert each.layers == ("0 weight",)
    assert each.plain_score < 0.95 <= each.score
    assert found.config.rules == (("0", {"weight": {"bits": 8}}),)
    assert of_code(found, model, x) == each.score
    assert "more bits for 0 weight" in repr(found)
    assert each.bytes == found.sensitivity.rows[0].bytes[8] - found.sensitivity.rows[0].bytes[4] + sum(
        row.bytes[4] for row in found.sensitivity.rows if row.tensor == "weight"
    )


def test_an_input_wants_more_bits() -> None:
    """A feature that is large and not used takes the levels of all others."""
    model, x = network(32, 64, 64, 6), torch.randn(256, 32)
    with torch.no_grad():
        x[:, 0] *= 2000
        model[0].weight[:, 0] = 0
    found = advised(model, x, bits=[8])
    assert found.chosen.layers == ("0 input",)
    assert found.config.rules == (("0", {"input": None}),)
    assert found.chosen.plain_score < 0.99 <= found.chosen.score
    assert of_code(found, model, x) == found.chosen.score


class Branches(nn.Module):
    """Layers that matter ever less; no width between 4 and 8 bits is small enough for the first."""

    def __init__(self, depthwise: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.mix = nn.Conv1d(24, 24, 1, groups=24) if depthwise else nn.Identity()

    def forward(self, x):
        x = sum(0.2**at * layer(x.roll(at, -1)) for at, layer in enumerate(self.layers))
        return self.mix(x.unsqueeze(-1)).squeeze(-1)


def test_which_layers_to_train() -> None:
    """Those that hold 80 % of the sensitivity where little is lost at 4 bits or more, otherwise all."""
    model, x = Branches(), torch.randn(256, 24)
    options = {"bits": [4], "budget": 1650}
    loss = 1 - advised(model, x, tolerance=1e-9, **options).chosen.plain_score
    found = advised(model, x, tolerance=loss / 5, **options)
    assert found.verdict == "qat"
    assert not found.chosen.every_layer
    assert found.chosen.layers == ("layers.0",)
    names = {"model": model, "batches": [x]}
    exec(found.code, names)
    trained = {name for name, p in names["prepared"].named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("layers.0.") for name in trained)
    assert advised(model, x, tolerance=loss / 20, **options).chosen.every_layer
    depthwise = Branches(depthwise=True)
    loss = 1 - advised(depthwise, x, tolerance=1e-9, **options).chosen.plain_score
    found = advised(depthwise, x, tolerance=loss / 5, **options)
    assert found.chosen.every_layer
    assert {*found.chosen.layers} == {"mix", *(f"layers.{at}" for at in range(4))}


def test_a_budget_decides() -> None:
    model, x = network(24, 48, 48, 6), torch.randn(256, 24)
    found = advised(model, x, budget=2000, tolerance=0.1)
    assert found.chosen is found.widths[-1] is found.at(None)
    assert found.chosen.bytes <= 2000
    plan = qk.assign(found.sensitivity, 2000)
    rounded = len(found.chosen.steps) > 1
    assert found.chosen.plain_score == pytest.approx(by_hand(model, x, plan.config, rounded), abs=1e-6)
    assert "budget" in repr(found)
    with pytest.raises(ValueError, match=r"budget: got 100 bytes; accepted: at least \d+, the least that can be met"):
        advised(model, x, budget=100)


def test_the_config_of_the_user_stays() -> None:
    model, x = network(24, 48, 48, 6), torch.randn(256, 24)
    rules = [("0", None), ("[24]", {"weight": {"granularity": qk.PerTensor()}, "input": {"bits": 7}})]
    rules.insert(0, (nn.Linear, {"input": None}))
    found = advised(model, x, config=QConfig(QSpec(3), rules=rules), bits=[8, 6], tolerance=0.2)
    assert of_code(found, model, x) == found.chosen.score
    assert [each.verdict for each in found.widths] == ["ptq", "ptq"]
    prepared = qk.prepare(model, found.at(6).config)
    assert isinstance(prepared[0], nn.Linear)
    assert not isinstance(prepared[0], qk.nn.QATLinear)
    for layer in (prepared[2], prepared[4]):
        assert layer.weight_fake_quant.bits == 6
        assert layer.weight_fake_quant.scale.numel() == 1
        assert layer.input_fake_quant.bits == 7


def test_layers_that_no_batch_reaches_stay_in_float() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(24, 6), nn.Linear(24, 6)

        def forward(self, x):
            return self.spare(x) if x.shape[0] == 1 else self.used(x)

    model, x = Spare(), torch.randn(64, 24)
    found = advised(model, x, bits=[8])
    assert found.config.rules == (("spare", None),)
    assert any("no batch reached spare" in note for note in found.notes)
    assert found.chosen.seconds > 0


def test_time_of_training() -> None:
    model, x = network(24, 48, 6), torch.randn(64, 24)
    before = snapshot(model)
    seen = []

    def loss(output, batch):
        assert output.requires_grad
        seen.append(batch)
        return output.square().mean()

    found = qk.advise(model, [x, x[:32]], evaluate=fidelity(model, x), loss=loss, bits=[2], training_steps=300)
    assert_unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert {len(batch) for batch in seen} == {64, 32}
    assert found.qat_seconds == 300 * found.step_seconds > 0
    assert "300 steps of" in repr(found)


def test_nothing_of_the_callers_changes() -> None:
    """Also where ``evaluate`` draws random numbers and changes the model that it gets."""
    model, x = network(24, 48, 6).train(), torch.randn(64, 24)
    before, state, python = snapshot(model), torch.get_rng_state(), random.getstate()
    score, draws = fidelity(model, x), []

    def evaluate(other):
        assert not any(module.training for module in other.modules())
        draws.append(float(torch.rand(())) + random.random())
        value = float(score(other))
        with torch.no_grad():
            next(other.parameters()).zero_()
        return value

    first, again = (qk.advise(model, (b for b in [x]), evaluate=evaluate, tolerance=0.05) for _ in range(2))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert len(set(draws)) == 1
    assert [each.plain_score for each in first.widths] == [each.plain_score for each in again.widths]


@pytest.mark.parametrize(
    ("score", "tolerance", "text"),
    [
        ([0.0, -3.0], None, r"^tolerance: got None with a float score of 0"),
        ([0.9, 0.3], 1, r"^tolerance: got 1, as far as the float model \(0.9\) is above"),
        ([0.9, 0.89], 0.05, r"^evaluate: returned 0.9 for the float model"),
    ],
)
def test_scores_by_which_nothing_can_be_said(score, tolerance, text) -> None:
    model, x = network(8, 16, 4), torch.randn(64, 8)
    scores = iter(score)
    with pytest.raises(ValueError, match=text):
        qk.advise(model, [x], evaluate=lambda _: next(scores), tolerance=tolerance)


def later(value):
    """Right for the float and the shuffled model, then this value."""
    calls = iter([1.0, 0.0])
    return lambda model: next(calls, value)


def failing(model):
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"evaluate": lambda model: float("nan")}, ValueError, "evaluate: returned nan for the float model; accepted"),
        ({"evaluate": later(float("nan"))}, ValueError, "evaluate: returned nan for the quantized model"),
        ({"evaluate": later(float("-inf"))}, ValueError, "evaluate: returned -inf for the quantized model"),
        (
            {"evaluate": lambda model: None},
            TypeError,
            "evaluate: returned None for the float model; accepted",
        ),
        ({"evaluate": lambda model: "0.9"}, TypeError, "evaluate: returned '0.9'"),
        ({"evaluate": lambda model: True}, TypeError, "evaluate: returned True"),
        ({"evaluate": lambda model: torch.ones(2)}, TypeError, "evaluate: returned tensor"),
        ({"evaluate": later([1.0])}, TypeError, r"evaluate: returned \[1.0\] for the quantized model"),
        ({"evaluate": lambda model: 0.5}, ValueError, "evaluate: returned 0.5 for the float model and 0.5 for a copy"),
        ({"evaluate": failing}, KeyError, "labels"),
        ({"evaluate": 3}, TypeError, "evaluate: got a int; accepted: a function"),
        ({"batches": iter(())}, ValueError, "batches: got none; accepted: at least one batch"),
        ({"batches": torch.randn(4, 24)}, TypeError, "batches: got a Tensor"),
        ({"batches": [torch.randn(4, 23)]}, RuntimeError, r"batches\[0\]: layer '0' \(QATLinear\) failed"),
        ({"budget": 1}, ValueError, "budget: got 1 bytes; accepted: at least"),
        ({"budget": "1"}, TypeError, "budget: got '1'; accepted: a number"),
        ({"tolerance": -0.1}, ValueError, "tolerance: got -0.1; accepted: a finite number of at least 0"),
        ({"tolerance": True}, TypeError, "tolerance: got True"),
        ({"bits": [9]}, ValueError, "bits: got 9; accepted: 2 to 8"),
        ({"loss": 1}, TypeError, "loss: got a int"),
        ({"loss": lambda output, batch: output}, ValueError, "loss: got a tensor of shape"),
        ({"loss": lambda output, batch: 1.0}, TypeError, "loss: got a value without a gradient"),
        ({"training_steps": 0}, ValueError, "training_steps: got 0; accepted: a whole number of at least 1"),
        ({"config": "activation-only"}, ValueError, "config: got 'activation-only', which leaves all weights in float"),
        ({"config": "w8a9"}, ValueError, "config: got 'w8a9'"),
        ({"model": 3}, TypeError, "model: got a int"),
        ({"model": qk.prepare(network(24, 6))}, ValueError, "model: got one that is prepared; accepted: a float model"),
    ],
)
def test_refusals(change, error, text) -> None:
    model, x = network(24, 16, 6), torch.randn(32, 24)
    before, state = snapshot(model), torch.get_rng_state()
    arguments = {"model": model, "batches": [x], "evaluate": fidelity(model, x), "bits": [8, 2], **change}
    with pytest.raises(error, match=text):
        qk.advise(**arguments)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
