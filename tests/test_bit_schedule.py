"""BitSchedule: which width each name has at each step, what it costs and keeps, and what is refused before training."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from loop_models import assert_close, assert_same, batches_of, loss_of, optimizer_of, prepared, state_of
from qat_models import assert_unchanged, config, quantizers, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qkernels as qk


def drawn(width, count: int, name: str = "") -> list[int]:
    return [width(step, name) for step in range(count)]


def test_widths_by_the_step() -> None:
    cycle = drawn(qk.schedules.cyclic(3, 8, period=20), 40)
    assert cycle[:20] == cycle[20:]
    assert cycle[:20] == [round(3 + 2.5 * (1 - math.cos(t / 20 * math.pi))) for t in range(20)]
    assert (cycle[0], cycle[19]) == (3, 8)
    assert drawn(qk.schedules.cyclic(3, 8, period=20, steps=50), 60) == [*cycle, *cycle[:10], *[8] * 10]
    assert drawn(qk.schedules.progressive(8, 4, steps=10), 12) == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 4, 4]
    assert drawn(qk.schedules.progressive(2, 4, steps=3), 5) == [2, 3, 4, 4, 4]
    falling = drawn(qk.schedules.cosine(8, 2, steps=30), 40)
    assert falling == sorted(falling, reverse=True)
    assert (falling[0], falling[15], falling[30], falling[39]) == (8, 5, 2, 2)
    assert drawn(qk.schedules.steps({0: 8, 3: 6, 4: 4}), 6) == [8, 8, 8, 6, 4, 4]
    for width in (
        qk.schedules.cyclic(2, 8, period=7),
        qk.schedules.cosine(3, 7, steps=9),
        qk.schedules.steps({0: 8, 2: 3}),
    ):
        assert set(drawn(width, 50)) <= set(width.every)


def test_random_widths_differ_by_name_and_seed_and_repeat() -> None:
    width = qk.schedules.random(2, 8)
    a, b = drawn(width, 700, "a"), drawn(width, 700, "b")
    assert a == drawn(qk.schedules.random(2, 8), 700, "a")
    assert a != b
    assert a != drawn(qk.schedules.random(2, 8, seed=1), 700, "a")
    for bits in range(2, 9):
        assert 60 < a.count(bits) < 150
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 200


def both() -> nn.Module:
    torch.manual_seed(0)
    inner = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), config(8))
    qk.calibrate(inner, [torch.randn(32, 8)])
    return nn.Sequential(inner, qk.nn.Int8TrainingLinear(8, 4))


def test_names_have_the_widths_of_the_last_glob_that_matches() -> None:
    model = both()
    schedule = qk.BitSchedule(
        model,
        {
            "*.weight_fake_quant": qk.schedules.steps({0: 8, 2: 3}),
            "*.input_fake_quant": lambda step: 7 - step,
            "0.2.*": 6,
            "1.grad": qk.schedules.progressive(8, 6, steps=3),
        },
    )
    seen = [schedule.bits]
    changes = []
    for _ in range(2):
        changes.append(schedule.step())
        seen.append(schedule.bits)
    names = "0.0.weight_fake_quant", "0.0.input_fake_quant", "0.2.weight_fake_quant", "0.2.input_fake_quant", "1.grad"
    assert [tuple(bits[name] for name in names) for bits in seen] == [(8, 7, 6, 6, 8), (8, 6, 6, 6, 7), (3, 5, 6, 6, 6)]
    assert changes == [
        {"0.0.input_fake_quant": 6, "1.grad": 7},
        {"0.0.weight_fake_quant": 3, "0.0.input_fake_quant": 5, "1.grad": 6},
    ]
    assert {**{name: q.bits for name, q in quantizers(model).items()}, "1.grad": model[1].grad_bits} == seen[-1]


def test_gradients_of_the_int8_layer_have_the_width() -> None:
    torch.manual_seed(0)
    layer, x, grad = qk.nn.Int8TrainingLinear(16, 8), torch.randn(4, 16), torch.randn(4, 8)
    qk.BitSchedule(layer, {"grad": 3})
    layer(x).backward(grad)
    q, scale, q_t, scale_t = qk.quantize_dynamic_transposed(grad, bits=3)
    _, _, x_t, x_scale = qk.quantize_dynamic_transposed(x)
    assert set(q_t.unique().tolist()) <= set(range(-3, 4))
    expected = (q_t.double() @ x_t.double().t()) * scale_t.double() * x_scale.double().t()
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-5, atol=1e-6)
    x = x.requires_grad_()
    y = qk.int8_training_linear(x, layer.weight, grad_bits=3)
    _, _, w_t, w_scale = qk.quantize_dynamic_transposed(layer.weight)
    y.backward(grad)
    expected = (q.double() @ w_t.double().t()) * scale.double() * w_scale.double().t()
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-6)
    for bits in (1, 9, 4.5, "4"):
        with pytest.raises(ValueError, match=rf"^grad_bits: got {bits!r}; accepted: 2 to 8"):
            qk.int8_training_linear(x, layer.weight, grad_bits=bits)
        with pytest.raises(ValueError, match=rf"^grad_bits: got {bits!r}; accepted: 2 to 8"):
            qk.nn.Int8TrainingLinear(4, 4, grad_bits=bits)


class Allocations(TorchDispatchMode):
    """The largest new tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        new = [t for t in tensors(result) if t.untyped_storage().data_ptr() not in given]
        self.most = max([self.most, *(t.numel() for t in new)])
        return result


def tensors(value) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("way", ["lsq", "minmax", "ema", "dynamic"])
def test_a_step_allocates_nothing_of_a_weights_size_and_moves_no_tensor(way: str) -> None:
    model = prepared("mlp", way)
    schedule = qk.BitSchedule(model, {"*": qk.schedules.steps(dict(enumerate((8, 2, 4, 8, 3, 5, 7, 2))))})
    addresses = {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())}
    x = batches_of("mlp", 1)[0]
    for _ in range(7):
        loss_of(model, x).backward()
        ranges = {n: q.qparams()[0] * q.steps for n, q in quantizers(model).items() if q.quantizer != "dynamic"}
        with Allocations() as made:
            changed = schedule.step()
        assert changed
        # As many as there are channels, of learned scales 64 candidates for each; all weights together have 1600.
        assert made.most <= 24 * (64 if way == "lsq" else 1)
        for name, before in ranges.items():
            if way != "lsq":
                quantizer = quantizers(model)[name]
                torch.testing.assert_close(quantizer.qparams()[0] * quantizer.steps, before)
    assert {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())} == addresses


def test_a_width_that_stays_changes_nothing() -> None:
    model, batches = prepared("mlp", bits=3), batches_of("mlp")
    for scheduled in (False, True):
        twin = copy.deepcopy(model)
        schedule = qk.BitSchedule(twin, {"*": 3})
        optimizer = optimizer_of(twin)
        for x in batches:
            optimizer.zero_grad()
            loss_of(twin, x).backward()
            optimizer.step()
            if scheduled:
                assert schedule.step() == {}
        if not scheduled:
            expected = state_of(twin)
    assert_same(state_of(twin), expected)


def test_a_run_that_was_stopped_goes_on_as_one_that_was_not() -> None:
    widths = {"*weight_fake_quant": qk.schedules.random(2, 8), "*input_fake_quant": qk.schedules.cyclic(3, 8, period=4)}
    batches = batches_of("mlp", 6)

    def run(model, schedule, optimizer, batches) -> None:
        for x in batches:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
            schedule.step()

    model = prepared("mlp")
    schedule, optimizer = qk.BitSchedule(model, widths), torch.optim.SGD(model.parameters(), 0.05)
    run(model, schedule, optimizer, batches[:3])
    saved = copy.deepcopy((model.state_dict(), schedule.state_dict()))
    resumed = prepared("mlp", seed=1)
    again = qk.BitSchedule(resumed, widths)
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    run(model, schedule, optimizer, batches[3:])
    run(resumed, again, torch.optim.SGD(resumed.parameters(), 0.05), batches[3:])
    assert schedule.bits == again.bits
    assert_same(state_of(resumed), state_of(model))


def test_compiled_code_compiles_once_for_each_width() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model, (x,) = prepared("mlp"), batches_of("mlp", 1)
    eager = copy.deepcopy(model)
    graph = torch.compile(model, fullgraph=True, backend=counter)
    schedules = [qk.BitSchedule(each, {"*": qk.schedules.steps({0: 8, 1: 4, 2: 8, 3: 4})}) for each in (graph, eager)]
    for _ in range(5):
        loss, expected = loss_of(graph, x), loss_of(eager, x)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for schedule in schedules:
            schedule.step()
    assert_close(state_of(model), state_of(eager), 1e-4)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("widths", "error", "text"),
    [
        ({}, TypeError, r"^widths: got \{\}; accepted: a dict"),
        (8, TypeError, r"^widths: got 8; accepted: a dict"),
        ({"fc.*": 4}, ValueError, r"^widths: got 'fc.\*'; accepted: .*: '0.weight_fake_quant'"),
        ({"*": 9}, ValueError, r"^0.weight_fake_quant: got 9; accepted: 2 to 8"),
        ({"*": 4.0}, TypeError, r"^0.weight_fake_quant: got 4.0, a float; accepted: 2 to 8"),
        ({"*": 5}, ValueError, r'^1.weight_fake_quant: bits: got 5 with quantizer="nf4"; accepted: 4'),
        ({"1.*": "cyclic"}, ValueError, r'^1.weight_fake_quant: bits: got 3 with quantizer="nf4"'),
        ({"2.*": "cyclic"}, ValueError, r'^2.weight_fake_quant: bits: got 3 with quantizer="kmeans"'),
        ({"0.*": lambda step: 12}, ValueError, r"^0.weight_fake_quant, at step 0: got 12; accepted: 2 to 8"),
    ],
)
def test_what_a_quantizer_does_not_take_is_refused_before_training(widths, error, text) -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    rules = [("1", {"weight": qk.QSpec(4, quantizer="nf4")}), ("2", {"weight": qk.QSpec(4, quantizer="kmeans")})]
    model = qk.prepare(layers, qk.QConfig(qk.QSpec(8), None, rules=rules))
    before = snapshot(model)
    cyclic = qk.schedules.cyclic(3, 8, period=4)
    if isinstance(widths, dict):
        widths = {glob: cyclic if width == "cyclic" else width for glob, width in widths.items()}
    with pytest.raises(error, match=text):
        qk.BitSchedule(model, widths)
    assert_unchanged(model, before)
    qk.BitSchedule(model, {"*": cyclic, "[12].*": 4}).step()  # a later glob takes them out


def test_bad_arguments_are_refused_by_name() -> None:
    for make, text in (
        (lambda: qk.schedules.cyclic(8, 3, period=4), r"^low: got 8 with high=3; accepted: at most high"),
        (lambda: qk.schedules.cyclic(3, 9, period=4), r"^high: got 9; accepted: 2 to 8"),
        (lambda: qk.schedules.cyclic(3, 8, period=0), r"^period: got 0; accepted: a whole number of at least 1"),
        (
            lambda: qk.schedules.cyclic(3, 8, period=4, steps=0),
            r"^steps: got 0; accepted: a whole number of at least 1",
        ),
        (lambda: qk.schedules.cosine(8, 1, steps=3), r"^end: got 1; accepted: 2 to 8"),
        (lambda: qk.schedules.steps({5: 8}), r"^widths: got steps \[5\]; accepted: 0, and others above it"),
        (lambda: qk.schedules.steps({0: 8, 7: 12}), r"^the width from step 7 on: got 12"),
        (
            lambda: qk.BitSchedule(nn.Linear(3, 3), {"*": 4}),
            r"^model: got one without quantizers or Int8TrainingLinear",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    with pytest.raises(TypeError, match=r"^steps: got 2.5, a float"):
        qk.schedules.progressive(8, 4, steps=2.5)
    with pytest.raises(TypeError, match=r"^widths: got \[8, 4\]; accepted: a dict of steps and their widths"):
        qk.schedules.steps([8, 4])  # type: ignore[arg-type]
    model = prepared("mlp")
    schedule = qk.BitSchedule(model, {"*": lambda step: 8 - 4 * step})
    schedule.step()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^0.weight_fake_quant, at step 2: got 0; accepted: 2 to 8"):
        schedule.step()
    assert schedule.steps == 1
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"^state: got \{\}; accepted: what state_dict\(\) returned"):
        schedule.load_state_dict({})


@pytest.mark.parametrize("made", [lambda width: width, lambda width: qk.BitSchedule(both(), {"0.*": width})])
def test_schedules_pickle_and_copy(made) -> None:
    for width in (
        qk.schedules.cyclic(3, 8, period=20, steps=50),
        qk.schedules.cosine(8, 2, steps=30),
        qk.schedules.progressive(8, 4, steps=10),
        qk.schedules.steps({0: 8, 3: 6, 4: 4}),
        qk.schedules.random(2, 8, seed=3),
    ):
        own = made(width)
        for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            if isinstance(own, qk.BitSchedule):
                for _ in range(5):
                    assert other.step() == own.step()
                own = made(width)
            else:
                assert repr(other) == repr(own)
                assert (other.every, drawn(other, 60, "a")) == (own.every, drawn(own, 60, "a"))


def best_range(x: torch.Tensor, quantizer: qk.nn.FakeQuantize) -> torch.Tensor:
    fresh = qk.nn.FakeQuantize(bits=quantizer.bits, granularity=quantizer.granularity, shape=x.shape)
    fresh.start(x)
    return fresh.scale


def test_a_weights_range_fits_its_width() -> None:
    model = prepared("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # and it is that of the present weights
    schedule = qk.BitSchedule(model, {"*": qk.schedules.steps(dict(enumerate((8, 2, 4, 8, 3))))})
    weights = {name: q for name, q in quantizers(model).items() if q.is_weight}
    for _ in range(4):
        schedule.step()
        for name, quantizer in weights.items():
            weight = model.get_parameter(name.removesuffix("_fake_quant"))
            if quantizer.bits <= 4:
                torch.testing.assert_close(quantizer.scale, best_range(weight.detach(), quantizer))
            else:
                torch.testing.assert_close(quantizer.qparams(weight)[0] * 127, weight.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("way", ["lsq", "lsq+", "pact", "ewgs"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_inputs_range_fits_its_width_about_as_well_as_a_calibration(way: str, bits: int) -> None:
    torch.manual_seed(0)
    for x in (torch.randn(20000), torch.randn(20000).relu()):
        fitting = qk.nn.FakeQuantize(quantizer=way)
        fitting.start(x)
        before, kept = fitting.scale.clone(), copy.deepcopy(fitting)
        kept.freeze()
        for quantizer in (fitting, kept):
            quantizer.set_bits(bits)
        torch.testing.assert_close(kept.scale * kept.steps, before * 255 if not kept.symmetric else before * 127)
        best = qk.nn.FakeQuantize(bits=bits, quantizer=way)
        best.start(x)
        error, held, least = ((quantizer.eval()(x) - x).square().sum() for quantizer in (fitting, kept, best))
        assert error < 1.25 * least
        assert error < held
        fitting.set_bits(8)
        torch.testing.assert_close(fitting.scale, before)


def test_what_is_set_by_hand_keeps_its_range() -> None:
    model = prepared("mlp", bits=4)
    for quantizer in quantizers(model).values():
        quantizer.scale = torch.full_like(quantizer.scale, 0.5)
    ranges = {name: 0.5 * quantizer.steps for name, quantizer in quantizers(model).items()}
    qk.set_bits(model, 2)
    for name, quantizer in quantizers(model).items():
        torch.testing.assert_close(quantizer.scale * quantizer.steps, torch.full_like(quantizer.scale, ranges[name]))
