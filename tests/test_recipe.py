"""Recipe: what each phase switches, that a run resumes in each of them bit for bit, and what is refused beforehand."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from loop_models import MAKERS, assert_same, batches_of, loss_of, optimizer_of, state_of
from qat_models import assert_unchanged, config, quantizers, snapshot
from sampling import cases_of
from torch import Tensor, nn

import qkernels as qk
from qkernels import Phase


def made(name: str = "cnn", way: str = "lsq") -> nn.Module:
    torch.manual_seed(0)
    return qk.prepare(MAKERS[name](), config(8, way)).train()


def whole(name: str = "cnn") -> list[Phase]:
    """All that a recipe can do, in ten steps."""
    batches = batches_of(name, 2, seed=3)
    norm = ["batch_norm"] if name == "cnn" else []
    return [
        Phase(steps=2, fake_quant=False, name="warm-up"),
        Phase(steps=1, calibrate=batches),
        Phase(epochs=1, bits={"*": 5, "0.*": qk.schedules.steps({0: 3, 1: 6, 2: 4})}),
        Phase(steps=1, freeze="observers"),
        Phase(steps=1, freeze=["scales", *norm], fake_quant={"inputs": False}),
        Phase(steps=2, fake_quant=False, name="float tail"),
    ]


def recipe_for(model: nn.Module, phases: Sequence[Phase], **options: Any) -> qk.Recipe:
    return qk.Recipe(model, phases, **{"steps_per_epoch": 3, **options})


def run(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: qk.Recipe, batches: Sequence[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        recipe.step()


def seen(model: nn.Module) -> dict[str, Any]:
    """What the phases switch, of the first layer's quantizers and of all."""
    weight, inputs = model[0].weight_fake_quant, model[0].input_fake_quant
    return {
        "quantizes": (weight.quantizes, inputs.quantizes),
        "observes": {q.observes for q in quantizers(model).values()},
        "learns": {p.requires_grad for q in quantizers(model).values() for p in q.parameters()},
        "bits": (weight.bits, inputs.bits),
        "norm": model[1].training,
    }


def test_each_phase_switches_what_it_says() -> None:
    model = made()
    recipe = recipe_for(model, whole())
    assert recipe.phase is None
    assert seen(model)["quantizes"] == (True, True), "nothing happens before the start"
    optimizer = optimizer_of(model)
    recipe.start()
    found = []
    for x in batches_of("cnn", recipe.total_steps):
        found.append(seen(model))
        run(model, optimizer, recipe, [x])
    assert recipe.done
    assert recipe.steps == recipe.total_steps == 10
    found.append(seen(model))
    assert [each["quantizes"] for each in found] == [
        *[(False, False)] * 2, *[(True, True)] * 5, (True, False), *[(False, False)] * 2, (True, True)
    ]  # fmt: skip
    assert [each["bits"] for each in found] == [*[(8, 8)] * 3, (3, 3), (6, 6), *[(4, 4)] * 6]
    assert [each["observes"] for each in found] == [*[{True}] * 6, *[{False}] * 5]
    assert [each["learns"] for each in found] == [*[{True}] * 7, *[{False}] * 4]
    assert [each["norm"] for each in found] == [*[True] * 7, *[False] * 4]
    qk.convert(model.eval())  # the end left nothing switched off
    recipe.step()
    assert seen(model) == found[-1] | {"norm": False}


def test_step_returns_the_phase_that_begins_and_the_text_says_where_it_is() -> None:
    model = made("mlp")
    recipe = recipe_for(model, whole("mlp"))
    with pytest.raises(RuntimeError, match=r"^step: got a recipe that has not been started"):
        recipe.step()
    recipe.start()
    with pytest.raises(RuntimeError, match=r"^start: got a recipe at step 0"):
        recipe.start()
    begun = [recipe.step() for _ in range(3)]
    assert begun == [None, recipe.phases[1], recipe.phases[2]]
    lines = repr(recipe).splitlines()
    assert lines[0] == "  steps 0 to 1: warm-up: fake_quant=False"
    assert lines[1] == "  steps 2 to 2: calibrate"
    assert lines[2].startswith("> steps 3 to 5: bits={'*': 5, '0.*': schedules.steps({0: 3, 1: 6, 2: 4})}")


@pytest.mark.parametrize(
    ("name", "way"),
    [("cnn", "lsq"), ("cnn", "minmax"), ("cnn", "ema"), pytest.param("transformer", "lsq", marks=pytest.mark.nightly)],
)
def test_a_run_that_stops_in_any_phase_goes_on_as_one_that_did_not(name: str, way: str) -> None:
    model, phases = made(name, way), whole(name)
    recipe, optimizer, batches = recipe_for(model, phases), optimizer_of(model), batches_of(name, 11)
    recipe.start()
    saved, during = [], []
    for x in batches:
        saved.append(copy.deepcopy((recipe.state_dict(), model.state_dict(), optimizer.state_dict())))
        during.append({"phase": None if recipe.done else [phase is recipe.phase for phase in recipe.phases]})
        run(model, optimizer, recipe, [x])
    expected = state_of(model)
    for at in sorted(cases_of(during, f"recipe {name} {way}")):  # of each phase a step, and the end
        of_recipe, of_model, of_optimizer = saved[at]
        again = made(name, way)
        optimizer = optimizer_of(again)
        resumed = recipe_for(again, phases)
        resumed.load_state_dict(json.loads(json.dumps(of_recipe)))
        again.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        run(again, optimizer, resumed, batches[at:])
        found = state_of(again)
        assert_same(
            {k: t for k, t in found.items() if ".grad" not in k}, {k: expected[k] for k in found if ".grad" not in k}
        )
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_recipe_that_has_run_goes_back_to_an_earlier_step() -> None:
    model, phases = made(), whole()
    norm, own = model[1], model[0].weight_fake_quant
    qk.freeze_scales(model, where="3.weight*")  # the user's own, which no recipe undoes
    recipe, optimizer, batches = recipe_for(model, phases), optimizer_of(model), batches_of("cnn", 10)
    recipe.start()
    run(model, optimizer, recipe, batches[:4])
    state, saved = recipe.state_dict(), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(2):
        run(model, optimizer, recipe, batches[4:])
        end = state_of(model)
        assert (own.observes, own.log_scale.requires_grad, norm.training) == (False, False, False)
        recipe.load_state_dict(state)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        assert (own.observes, own.log_scale.requires_grad, norm.training, own.bits) == (True, True, True, 6)
        assert not model[3].weight_fake_quant.log_scale.requires_grad
    run(model, optimizer, recipe, batches[4:])
    assert_same(state_of(model), end)
    recipe.load_state_dict({**state, "steps": 6})  # where the observers are frozen, and nothing else is
    assert (own.observes, own.log_scale.requires_grad, norm.training) == (False, True, True)


def test_compiled_code_goes_through_the_phases() -> None:
    torch._dynamo.reset()
    model = made("mlp")
    qk.calibrate(model, batches_of("mlp", 1))  # code is compiled after a first batch
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each, called in ((model, compiled), (eager, eager)):
        recipe, optimizer = recipe_for(called, whole("mlp")), optimizer_of(each)
        recipe.start()
        for x in batches_of("mlp", 10):
            optimizer.zero_grad()
            loss_of(called, x).backward()
            optimizer.step()
            recipe.step()
    for (key, got), expected in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=key)
    torch._dynamo.reset()


def test_a_calibration_that_fails_leaves_all_as_it_was() -> None:
    model = made("mlp")
    x = batches_of("mlp", 1)[0]
    broken = [Phase(steps=1), Phase(steps=1, bits=4, calibrate=[x, x * torch.nan])]
    recipe = qk.Recipe(model, broken)
    recipe.start()
    loss_of(model, x).backward()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^phases\[1\].calibrate: batches\[1\]"):
        recipe.step()
    assert_unchanged(model, before)
    assert (recipe.steps, recipe.phase, model[0].weight_fake_quant.bits) == (0, recipe.phases[0], 8)
    calls = []
    recipe = qk.Recipe(model, [Phase(steps=1, calibrate=calls.append)])
    assert not calls
    recipe.start()
    assert calls == [model]


Bad = tuple[list[Phase], type[Exception], str]
GOOD = Phase(steps=1)
ONCE = iter([torch.ones(2, 11)])


@pytest.mark.parametrize(
    ("phases", "error", "text"),
    [
        ([], ValueError, r"^phases: got none"),
        ([GOOD, {"steps": 1}], TypeError, r"^phases: got \[.*; accepted: a list of qk.Phase"),
        ([GOOD, Phase(steps=0)], ValueError, r"^phases\[1\].steps: got 0; accepted: a whole number of at least 1"),
        ([Phase(steps=1.5)], TypeError, r"^phases\[0\].steps: got 1.5"),
        ([Phase()], ValueError, r"^phases\[0\].steps: got neither of steps and epochs"),
        ([Phase(steps=1, epochs=1)], ValueError, r"^phases\[0\].steps: got both"),
        ([Phase(epochs=1)], ValueError, r"^phases\[0\].epochs: got 1 without steps_per_epoch"),
        ([Phase(epochs=0)], ValueError, r"^phases\[0\].epochs: got 0"),
        (
            [Phase(steps=1, fake_quant=1)],
            TypeError,
            r"^phases\[0\].fake_quant: got 1; accepted: True, False, or a dict",
        ),
        ([Phase(steps=1, fake_quant={"weight": True})], TypeError, r"^phases\[0\].fake_quant: got \{'weight'"),
        ([Phase(steps=1, bits=9)], ValueError, r"^phases\[0\].bits: 0.weight_fake_quant: got 9; accepted: 2 to 8"),
        ([Phase(steps=1, bits="4")], TypeError, r"^phases\[0\].bits: got '4'"),
        ([Phase(steps=1, bits={"fc.*": 4})], ValueError, r"^phases\[0\].bits: widths: got 'fc.\*'; accepted"),
        (
            [Phase(steps=1, bits={"2.*": qk.schedules.steps({0: 4, 1: 3})})],
            ValueError,
            r"^phases\[0\].bits: 2.weight_fake_quant: bits: got 3 with quantizer=\"nf4\"",
        ),
        ([Phase(steps=1, freeze="bn")], ValueError, r"^phases\[0\].freeze: got 'bn'; accepted: observers, scales"),
        ([Phase(steps=1, freeze=3)], ValueError, r"^phases\[0\].freeze: got 3"),
        (
            [GOOD, Phase(steps=1, freeze="batch_norm")],
            ValueError,
            r"^phases\[1\].freeze: got 'batch_norm' for a model without BatchNorm",
        ),
        ([Phase(steps=1, freeze="scales")], ValueError, r"^phases\[0\].freeze: got 'scales', but .* no scale yet"),
        (
            [GOOD, Phase(steps=1, freeze="scales"), Phase(steps=1, bits={"0.*": 4})],
            ValueError,
            r"^phases\[2\].bits: got \{'0.\*': 4\}, but phases\[1\] freezes the scales",
        ),
        (
            [GOOD, Phase(steps=1, freeze="observers"), Phase(steps=1, calibrate=[torch.ones(2, 11)])],
            ValueError,
            r"^phases\[2\].calibrate: got batches, but phases\[1\] freezes the observers",
        ),
        (
            [GOOD, Phase(steps=2, bits={"0.*": qk.schedules.progressive(8, 4, steps=2)}, freeze="scales")],
            ValueError,
            r"^phases\[1\].bits: got widths that follow the step with freeze='scales'",
        ),
        (
            [Phase(steps=1, calibrate=ONCE), Phase(steps=1, calibrate=ONCE)],
            ValueError,
            r"^phases\[1\].calibrate: got an iterator that an earlier phase uses up",
        ),
        ([Phase(steps=1, calibrate=torch.ones(2, 11))], TypeError, r"^phases\[0\].calibrate: batches: got a Tensor"),
    ],
)
def test_phases_that_cannot_be_are_refused_beforehand(phases: Any, error: type[Exception], text: str) -> None:
    nf4 = qk.QSpec(4, quantizer="nf4")
    model = qk.prepare(MAKERS["mlp"](), qk.QConfig(rules=[("2", {"weight": nf4, "input": None})]))
    before = snapshot(model)
    with pytest.raises(error, match=text):
        qk.Recipe(model, phases)
    assert_unchanged(model, before)


def test_models_and_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: got one without quantizers"):
        qk.Recipe(nn.Linear(3, 3), [GOOD])
    with pytest.raises(TypeError, match=r"^model: got a int"):
        qk.Recipe(3, [GOOD])  # type: ignore[arg-type]
    model = made("mlp")
    with pytest.raises(ValueError, match=r"^steps_per_epoch: got 0"):
        qk.Recipe(model, [GOOD], steps_per_epoch=0)
    phases = whole("mlp")
    recipe = recipe_for(model, phases)
    recipe.start()
    before, state = snapshot(model), recipe.state_dict()
    longer = recipe_for(model, [*phases[:2], Phase(epochs=2, bits=phases[2].bits), *phases[3:]]).state_dict()
    wider = recipe_for(model, [*phases[:2], Phase(epochs=1, bits=4), *phases[3:]]).state_dict()
    for other, text in (
        ({}, r"^state: got \{\}; accepted: what state_dict\(\) returned"),
        ({"steps": 3}, r"^state: got no phases; accepted: the 6"),
        ({**state, "phases": state["phases"][1:]}, r"^state: got 5 phases; accepted: the 6"),
        ({**state, "phases": [None] * 6}, r"^state: got one of another recipe, phases\[0\].steps: None; accepted: 2"),
        (longer, r"^state: got one of another recipe, phases\[2\].steps: 6; accepted: 3"),
        (wider, r"^state: .*phases\[2\].bits: \{'\*': 4\}; accepted: \{'\*': 5, '0.\*': 'schedules.steps"),
    ):
        with pytest.raises(ValueError, match=text):
            recipe.load_state_dict(other)
    assert_unchanged(model, before)
    assert recipe.steps == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("done", [0, 3])
def test_a_recipe_goes_with_a_copy_of_its_model(copied, done) -> None:
    torch.manual_seed(0)
    model = qk.prepare(nn.Sequential(nn.Linear(11, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), qk.QConfig())
    falling = {"*.weight_fake_quant": qk.schedules.progressive(8, 4, steps=2)}
    x = torch.randn(8, 11)
    phases = [Phase(steps=2, calibrate=[x]), Phase(steps=3, bits=falling), Phase(steps=1, freeze="scales")]
    recipe = qk.Recipe(model, phases)
    recipe.start()
    for _ in range(done):
        recipe.step()
    twin, other = copied((model, recipe))
    assert other.model is twin
    assert repr(other) == repr(recipe)
    before = [q.bits for q in model.modules() if isinstance(q, qk.nn.FakeQuantize)]
    while not other.done:
        other.step()
    assert {q.bits for q in twin.modules() if isinstance(q, qk.nn.FakeQuantize) and q.is_weight} == {4}
    assert all(q.frozen for q in twin.modules() if isinstance(q, qk.nn.FakeQuantize))
    assert (recipe.steps, [q.bits for q in model.modules() if isinstance(q, qk.nn.FakeQuantize)]) == (done, before)
