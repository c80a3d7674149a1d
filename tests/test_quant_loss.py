"""QuantLoss: what it adds up and when, what it refuses, and the loops that it has to fit into."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from loop_models import assert_close, assert_same, batches_of, loss_of, optimizer_of, prepared, state_of
from qat_models import assert_unchanged, config, snapshot
from torch import nn

import qkernels as qk
from qkernels.qat.losses import Term

ALL = {
    "weight_error": 0.1,
    "dampening": 0.3,
    "bin_regularization": 0.2,
    "kurtosis": 0.5,
    "activation_range": 1e-3,
    "consistency": 2,
    "layer_outputs": 0.7,
}


def test_it_is_the_weighted_sum_of_its_terms() -> None:
    model, (x,) = prepared("mlp", bits=4), batches_of("mlp", 1)
    teacher = nn.Linear(11, 5)
    penalty = qk.QuantLoss(model, **ALL, distillation=Term(3.0, teacher=teacher, temperature=4))
    y = model(x)
    given = {"consistency": (x, y), "layer_outputs": (x,)}
    expected = {name: getattr(qk.losses, name)(model, *given.get(name, ())) for name in ALL}
    expected["distillation"] = qk.losses.distillation(x, y, teacher=teacher, temperature=4)
    got = penalty(x, y)
    weights = {**ALL, "distillation": 3.0}
    torch.testing.assert_close(got, sum(weights[name] * value for name, value in expected.items()))
    assert {name: value.requires_grad for name, value in penalty.values.items()} == dict.fromkeys(weights, False)
    for name, value in penalty.values.items():
        torch.testing.assert_close(value, expected[name].detach())
    got.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_follow_the_step_and_terms_may_pause() -> None:
    model, (x,) = prepared("mlp", bits=4), batches_of("mlp", 1)
    seen = []
    penalty = qk.QuantLoss(
        model, dampening=lambda step: 0.5 * step, consistency=Term(2.0, every=3, measure="mse"), kurtosis=0
    )
    for step in range(5):
        y = model(x)
        got = penalty(x, y)
        assert torch.equal(penalty(x, y), got)  # calls do not count, steps of the optimizer do
        seen.append(set(penalty.values))
        expected = 0.5 * step * qk.losses.dampening(model)
        if step % 3 == 0:
            expected = expected + 2 * qk.losses.consistency(model, x, y, measure="mse")
        torch.testing.assert_close(got, expected)
        penalty.step()
    assert seen == [{"consistency"}, {"dampening"}, {"dampening"}, {"dampening", "consistency"}, {"dampening"}]
    resumed = qk.QuantLoss(model, dampening=lambda step: 0.5 * step)
    resumed.load_state_dict(penalty.state_dict())
    torch.testing.assert_close(resumed(), 2.5 * qk.losses.dampening(model))
    nothing = qk.QuantLoss(model, dampening=0)()
    assert nothing.shape == ()
    assert nothing == 0


@pytest.mark.parametrize(
    ("terms", "error", "text"),
    [
        ({}, ValueError, r"^terms: got none; accepted: activation_range, bin_regularization"),
        ({"dampning": 1.0}, ValueError, r"^terms: got 'dampning'; accepted: .*; did you mean 'dampening'\?"),
        ({"divergence": 1.0}, ValueError, r"^terms: got 'divergence'"),
        ({"dampening": -1.0}, ValueError, r"^dampening: got a weight of -1.0; accepted: a finite number of at least 0"),
        ({"dampening": math.nan}, ValueError, r"^dampening: got a weight of nan"),
        ({"dampening": "0.1"}, TypeError, r"^dampening: got '0.1'; accepted: a finite number"),
        ({"dampening": True}, TypeError, r"^dampening: got True"),
        ({"dampening": lambda: Term(-2)}, ValueError, r"^weight: got a weight of -2"),
        ({"dampening": lambda: Term(1, every=0)}, ValueError, r"^every: got 0; accepted: a whole number of at least 1"),
        ({"dampening": lambda: Term(1, every=1.5)}, TypeError, r"^every: got 1.5, a float"),
        (
            {"kurtosis": lambda: Term(1, taget=3)},
            ValueError,
            r"^kurtosis: got the option 'taget'; accepted: target",
        ),
        ({"dampening": lambda: Term(1, x=3)}, ValueError, r"^dampening: got the option 'x'; accepted: none"),
        ({"distillation": 1.0}, ValueError, r"^distillation: got no teacher; accepted: .*Term\(weight, teacher=…\)"),
        ({"consistency": lambda: Term(1, measure="l1")}, ValueError, r"^measure: got 'l1'"),
        ({"layer_outputs": lambda: Term(1, where="x.*")}, ValueError, r"^where: got 'x\.\*'; accepted: .* modules"),
    ],
)
def test_bad_terms_are_refused_by_name(terms, error, text) -> None:
    model = prepared("mlp")
    before = snapshot(model)
    with pytest.raises(error, match=text):
        qk.QuantLoss(model, **{name: value() if callable(value) else value for name, value in terms.items()})
    assert_unchanged(model, before)


def test_bad_models_and_calls_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^model: got one without quantizers"):
        qk.QuantLoss(nn.Linear(4, 4), dampening=1.0)
    with pytest.raises(TypeError, match=r"^model: got a Tensor"):
        qk.QuantLoss(torch.zeros(3), dampening=1.0)  # type: ignore[arg-type]
    dorefa = qk.prepare(nn.Sequential(nn.Linear(4, 4)), qk.QConfig(qk.QSpec(4, quantizer="dorefa"), None))
    with pytest.raises(ValueError, match=r"^dampening: got '0.weight' with quantizer=\"dorefa\""):
        qk.QuantLoss(dorefa, dampening=0.1)
    with pytest.raises(ValueError, match=r"^activation_range: got a model whose inputs have no learned range"):
        qk.QuantLoss(dorefa, activation_range=0.1)
    model, (x,) = prepared("mlp"), batches_of("mlp", 1)
    before, y = snapshot(model), model.eval()(x)
    model.train()
    penalty = qk.QuantLoss(model, consistency=1.0)
    with pytest.raises(ValueError, match=r"^inputs: got None; accepted: the model's inputs, which consistency needs"):
        penalty()
    with pytest.raises(ValueError, match=r"^output: got None"):
        penalty(x)
    with pytest.raises(ValueError, match=r"^output: got a dict without a floating tensor"):
        penalty(x, {"loss": 3})
    with pytest.raises(ValueError, match=r"^teacher: got one whose output has shape \[12, 6\]; accepted: \[12, 5\]"):
        qk.QuantLoss(model, distillation=Term(teacher=nn.Linear(11, 6)))(x, y)
    falling = qk.QuantLoss(model, dampening=lambda step: 1.0 - step)
    for _ in range(2):
        falling()
        falling.step()
    with pytest.raises(ValueError, match=r"^dampening, at step 2: got a weight of -1.0"):
        falling()
    with pytest.raises(ValueError, match=r"^state: got one with the keys 'step'; accepted: what state_dict"):
        falling.load_state_dict({"step": 3})
    assert_unchanged(model, before)


def trained(model: nn.Module, batches, called=None, parts: int = 1, cast: bool = False) -> dict[str, torch.Tensor]:
    """What a loop with a penalty leaves; ``called`` is what is called in the model's place."""
    called = model if called is None else called
    penalty = qk.QuantLoss(called, **ALL)
    optimizer = optimizer_of(model)
    for x in batches:
        optimizer.zero_grad()
        for part in x.chunk(parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                y = called(part)
                loss = (loss_of(lambda _, y=y: y, part) + penalty(part, y)) / parts
            loss.backward()
        optimizer.step()
        penalty.step()
    return state_of(model)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_under_ddp_a_loop_is_the_plain_one(one_process: None) -> None:
    model, batches = prepared("cnn", bits=4), batches_of("cnn")
    expected = trained(copy.deepcopy(model), batches)
    inner = copy.deepcopy(model)
    assert_same(trained(inner, batches, nn.parallel.DistributedDataParallel(inner)), expected)


def test_a_compiled_loop_is_the_plain_one_and_compiles_nothing_more() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model, batches = prepared("mlp", bits=4), batches_of("mlp")
    expected = trained(copy.deepcopy(model), batches)
    inner = copy.deepcopy(model)
    graph = torch.compile(inner, fullgraph=True, backend=counter)
    assert_close(trained(inner, batches, graph), expected, 1e-4)
    count = counter.frame_count
    trained(inner, batches, graph)
    assert counter.frame_count == count
    torch._dynamo.reset()


def test_gradients_accumulate_as_those_of_one_batch() -> None:
    model, batches = prepared("mlp", bits=4), batches_of("mlp", 1)
    qk.freeze_observers(model)
    for term in ("dampening", "weight_error", "consistency"):
        found = []
        for parts in (1, 3):
            twin = copy.deepcopy(model)
            penalty = qk.QuantLoss(twin, **{term: 1.0})
            for part in batches[0].chunk(parts):
                (penalty(part, twin(part)) / parts).backward()
            found.append(state_of(twin))
        assert_close(found[1], found[0], 1e-4)


def test_autocast_and_tied_and_low_precision_models_train() -> None:
    model, batches = prepared("transformer", bits=4), batches_of("transformer")
    before = copy.deepcopy(model.state_dict())
    after = trained(model, batches, parts=2, cast=True)
    assert all(t.isfinite().all() for t in after.values() if t.is_floating_point())
    assert not torch.equal(model.head.weight, before["head.weight"])
    low = prepared("mlp", bits=4).bfloat16()
    assert trained(low, [x.bfloat16() for x in batches_of("mlp")])["0.weight"].isfinite().all()


def test_dampening_quiets_weights_that_oscillate() -> None:
    """A weight whose best value lies between two codes crosses their middle at every few steps, unless it is damped."""
    crossings = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        x = torch.randn(256, 16)
        target = x @ torch.randn(16, 8)
        model = qk.prepare(nn.Linear(16, 8, bias=False), qk.QConfig(qk.QSpec(3), None))
        penalty = qk.QuantLoss(model, dampening=weight)
        optimizer = torch.optim.SGD(qk.parameter_groups(model, lr=0.05), momentum=0.9)
        count, last = 0, None
        for step in range(150):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), target) + penalty()).backward()
            optimizer.step()
            codes = model.weight_fake_quant.quantize(model.weight)[0]
            count += 0 if last is None or step < 75 else int((codes != last).sum())
            last = codes
        crossings.append(count)
    assert crossings[1] < crossings[0] / 4, crossings


def test_config_alone_does_not_matter() -> None:
    """Terms of weights need no inputs' quantizers, nor those of outputs weights' quantizers."""
    x = torch.randn(3, 4)
    weights = qk.prepare(nn.Linear(4, 4), qk.QConfig(qk.QSpec(4), None))
    inputs = qk.prepare(nn.Linear(4, 4), qk.QConfig(None, qk.QSpec(4)))
    qk.calibrate(inputs, [x])
    assert qk.QuantLoss(weights, dampening=1.0)() > 0
    assert qk.QuantLoss(inputs, consistency=1.0, activation_range=1.0)(x, inputs(x)) > 0
    assert qk.QuantLoss(qk.prepare(nn.Linear(4, 4), config(4)), kurtosis=1.0)() > 0
