"""Final fine-tuning with the tools removed, in its three readings: frozen grid, float tail, integer weights."""

from __future__ import annotations

import copy

import pytest
import torch
from loop_models import MAKERS
from qat_models import assert_same_numbers, config, quantizers, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.qat.fuse import FusedForward

STEPS = 40


def data(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return x, (x[:, :, :4].mean((1, 2, 3)) > x[:, :, 4:].mean((1, 2, 3))).long() + 2 * (x.mean((1, 2, 3)) > 0).long()


def ready(bits: int = 3, way: str = "lsq") -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, target = data()
    model = qk.prepare(MAKERS["cnn"](), config(bits, way))
    model.train()
    with torch.no_grad():
        qk.enable_fake_quant(model, False)
        for _ in range(30):
            model(x)  # statistics of the BatchNorms
        qk.enable_fake_quant(model)
    qk.calibrate(model.eval(), [x])
    return model, x, target


def loss(model: nn.Module, x: Tensor, target: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x), target))


def train(model: nn.Module, parameters, x: Tensor, target: Tensor, step=lambda: None, lr: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(parameters, lr)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        step()


def grids(model: nn.Module) -> dict[str, tuple]:
    return {name: tuple(t.clone() for t in q.qparams() if t is not None) for name, q in quantizers(model).items()}


@pytest.mark.parametrize("way", ["lsq", "lsq+", "minmax", "ewgs", "stochastic"])
def test_frozen_grid(way: str) -> None:
    model, x, target = ready(way=way)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)  # knows the scales, and has moved them
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model.train()(x), target).backward()
        optimizer.step()
    assert qk.freeze_scales(model) == list(quantizers(model))
    assert qk.freeze_scales(model) == []
    qk.freeze_bn(model)
    model(x)  # a learned zero point that lay outside of its codes is back
    before, grid, weight = loss(model.eval(), x, target), grids(model), model[0].weight.detach().clone()
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    for name, values in grids(model).items():
        assert all(map(torch.equal, values, grid[name])), name
    assert not torch.equal(model[0].weight, weight)
    assert loss(model.eval(), x, target) < 0.9 * before
    assert_same_numbers(qk.convert(model), model, x, flips=0.05)
    assert qk.freeze_scales(model, False) == list(quantizers(model))
    F.cross_entropy(model.train()(x), target).backward()
    assert all(p.grad is not None for q in quantizers(model).values() for p in q.parameters())


def test_some_scales_are_frozen_by_their_names() -> None:
    model, x, target = ready()
    frozen = qk.freeze_scales(model, where=["0.*", "7.weight*"])
    assert frozen == ["0.weight_fake_quant", "0.input_fake_quant", "7.weight_fake_quant"]
    F.cross_entropy(model.train()(x), target).backward()
    learning = [name for name, q in quantizers(model).items() if q.log_scale.grad is not None]
    assert learning == [name for name in quantizers(model) if name not in frozen]
    with pytest.raises(ValueError, match=r"^where: got 'fc'; accepted: .* the names of quantizers"):
        qk.freeze_scales(model, where="fc")
    with pytest.raises(ValueError, match=r"^model: got one without quantizers"):
        qk.freeze_scales(nn.Linear(2, 2))


@pytest.mark.parametrize("way", ["lsq", "minmax", "ema"])
def test_float_tail(way: str) -> None:
    """Alone, and as the last phase of a recipe: the same weights on the same grid."""
    model, x, target = ready(4, way)
    other, (before, grid) = copy.deepcopy(model), (loss(model, x, target), grids(model))
    qk.freeze_scales(model)
    qk.enable_fake_quant(model, False)
    train(model.train(), model.parameters(), x, target, lr=1e-3)
    qk.enable_fake_quant(model)
    for name, values in grids(model).items():
        assert all(map(torch.equal, values, grid[name])), name
    assert loss(model.eval(), x, target) < before
    assert_same_numbers(qk.convert(model), model, x, flips=0.05)
    recipe = qk.Recipe(other, [qk.Phase(steps=STEPS, fake_quant=False, freeze="scales")])
    recipe.start()
    train(other.train(), other.parameters(), x, target, recipe.step, lr=1e-3)
    assert torch.equal(other.eval()(x), model(x))


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in model.state_dict().items() if key.rpartition(".")[2] == "codes"}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_integer_weights(bits: int, training: bool, tmp_path) -> None:
    model, x, target = ready(bits)
    converted = qk.convert(model)
    before, integers = loss(converted, x, target), codes(converted)
    tuning = qk.ScaleTuning(converted)
    assert tuning.fixed == ()
    train(converted.train(training), tuning.parameters(), x, target, tuning.step)
    converted.eval()
    during = converted(x).detach()
    assert loss(converted, x, target) < 0.9 * before
    assert all(torch.equal(t, integers[key]) for key, t in codes(converted).items())
    assert "log_gain" not in "".join(converted.state_dict())
    tuning.finish()
    assert torch.equal(converted(x), during)
    torch.testing.assert_close(type(converted).forward(converted, x), during)
    qk.save(converted, tmp_path / "tuned.safetensors")
    assert torch.equal(qk.load(tmp_path / "tuned.safetensors", MAKERS["cnn"]())(x), during)
    assert not any(name.endswith("log_gain") for name, _ in converted.named_parameters())
    assert isinstance(vars(converted)["forward"], FusedForward)
    qk.report(converted, x, float_model=MAKERS["cnn"]())


@pytest.mark.parametrize("quantized_output", [False, True])
@pytest.mark.parametrize("name", ["linear8", "linear4", "groups", "weight only", "conv1d", "conv2d", "transposed"])
def test_gradients_of_scales_are_those_of_the_dequantized_layer(name: str, quantized_output: bool) -> None:
    torch.manual_seed(2)
    layer, x = {
        "conv1d": lambda: (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
        "conv2d": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 7, 7)),
        "transposed": lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), torch.randn(2, 4, 5, 5)),
    }.get(name, lambda: (nn.Linear(32, 6), torch.randn(5, 3, 32)))()
    weight = qk.QSpec(4 if name in ("linear4", "groups") else 8, qk.PerGroup(16) if name == "groups" else None)
    spec = qk.QSpec(8, symmetric=False)
    prepared = qk.prepare(
        layer, qk.QConfig(weight, None if name == "weight only" else spec, output=spec if quantized_output else None)
    )
    qk.calibrate(prepared, [x])
    made = qk.convert(prepared.eval())
    qk.ScaleTuning(made)
    y = made(x)
    gain = torch.zeros(6, requires_grad=True)
    along = gain.exp().view(-1, *[1] * (made.weight.dim() - 1))
    values = made.weight * (along.transpose(0, 1) if name == "transposed" else along)
    inputs = x if made.input_bits is None else prepared.input_fake_quant(x).detach()
    bias = None if made.bias is None else made.bias.detach()
    function = {"conv1d": F.conv1d, "conv2d": F.conv2d, "transposed": F.conv_transpose2d}.get(name, F.linear)
    options = {"conv2d": {"groups": 2}, "transposed": {"stride": 2}}.get(name, {})
    expected = function(inputs, values, bias, **options)
    if quantized_output:
        expected = prepared.output_fake_quant(expected)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(made.log_gain.grad, gain.grad, rtol=1e-3, atol=1e-3)
    if bias is not None:
        assert made.bias.grad is not None


def test_what_trains_and_what_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight
            self.norm, self.lstm, self.proj = nn.LayerNorm(8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.left = nn.Linear(8, 8)

        def forward(self, ids):
            x = self.norm(self.lstm(self.table(ids))[0])
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.left(self.proj(x).relu()))

    torch.manual_seed(0)
    ids = torch.randint(0, 12, (4, 6))
    prepared = qk.prepare(Model(), qk.QConfig(rules=[("left", None)]))
    qk.calibrate(prepared, [ids])
    converted = qk.convert(prepared.eval())
    state, wanted = snapshot(converted), [p.requires_grad for p in converted.parameters()]
    tuning = qk.ScaleTuning(converted)
    assert {"table", "head"} <= set(tuning.fixed)
    assert all(name in ("table", "head") or name.startswith("lstm") for name in tuning.fixed)
    given = {id(p) for p in tuning.parameters()}
    names = {name for name, p in converted.named_parameters() if id(p) in given}
    assert {"proj.log_gain", "proj.bias", "norm.weight", "norm.bias", "left.bias"} <= names
    assert {"attention.q_proj.log_gain", "attention.out_proj.log_gain"} <= names
    assert not {"left.weight", "head.scale", "proj.scale", "proj.weight_dtype"} & names
    converted(ids).square().mean().backward()
    assert {name for name, p in converted.named_parameters() if p.grad is not None} <= names
    assert all(float(converted.get_parameter(n).grad.abs().max()) > 0 for n in ("proj.log_gain", "norm.weight"))
    tuning.finish()
    assert [p.requires_grad for p in converted.parameters()] == wanted
    after = snapshot(converted)
    assert all(torch.equal(after[0][key], t) for key, t in state[0].items())


def test_a_recipe_of_a_converted_model_resumes_bit_for_bit() -> None:
    model, x, target = ready(4)
    results = []
    saved = None
    for resumes in (False, True):
        converted = qk.convert(model)
        tuning = qk.ScaleTuning(converted)
        recipe = qk.Recipe(tuning, [qk.Phase(steps=3), qk.Phase(steps=2)])
        optimizer = torch.optim.Adam(tuning.parameters(), 1e-2)
        if resumes:
            recipe.load_state_dict(saved[0])
            converted.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
        else:
            recipe.start()
        while not recipe.done:
            if recipe.steps == 2:
                saved = copy.deepcopy((recipe.state_dict(), converted.state_dict(), optimizer.state_dict()))
            optimizer.zero_grad()
            F.cross_entropy(converted(x), target).backward()
            optimizer.step()
            recipe.step()
        results.append(converted(x).detach())
    assert torch.equal(*results)
    for phase, text in (
        (qk.Phase(steps=1, bits=4), r"phases\[0\].bits: got 4 for a converted model; accepted: None"),
        (qk.Phase(steps=1, fake_quant=False), r"phases\[0\].fake_quant: got False for a converted model"),
        (qk.Phase(steps=1, calibrate=[x]), r"phases\[0\].calibrate: got batches for a converted model"),
        (qk.Phase(steps=1, freeze="scales"), r"phases\[0\].freeze: got 'scales' for a converted model"),
    ):
        with pytest.raises(ValueError, match=text):
            qk.Recipe(tuning, [phase])


@pytest.mark.nightly
def test_a_compiled_model_is_tuned() -> None:
    torch._dynamo.reset()
    model, x, target = ready(8)
    losses = []
    for compiles in (False, True):
        converted = qk.convert(model).train()
        tuning = qk.ScaleTuning(converted)
        called = torch.compile(converted, backend="aot_eager") if compiles else converted
        train(called, tuning.parameters(), x, target, tuning.step)
        losses.append(loss(converted.eval(), x, target))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch._dynamo.reset()


def test_other_models_and_states_are_refused() -> None:
    model, _, _ = ready(8)
    for given, error, text in (
        (3, TypeError, "^model: got a int; accepted: what qk.convert"),
        (model, ValueError, "^model: got one that is prepared and not converted"),
        (nn.Linear(2, 2), ValueError, "^model: got one without layers on integers"),
    ):
        with pytest.raises(error, match=text):
            qk.ScaleTuning(given)
    converted = qk.convert(model)
    tuning = qk.ScaleTuning(converted)
    with pytest.raises(ValueError, match=r"^model: got one that is being tuned"):
        qk.ScaleTuning(converted)
    before = snapshot(converted)
    with pytest.raises(ValueError, match=r"^state: got one without '0' as it is here; accepted: that of 0, 3, 7"):
        tuning.load_state_dict({"3": tuning.state_dict()["3"]})
    after = snapshot(converted)
    assert all(torch.equal(after[0][key], t) for key, t in before[0].items())
    tuning.finish()
    qk.ScaleTuning(converted)


def test_the_best_scales_can_be_taken_back() -> None:
    """``finish`` leaves the model as it is: a state loaded before stays."""
    model, x, target = ready()
    converted = qk.convert(model.eval())
    tuning = qk.ScaleTuning(converted)
    best = {name: t.clone() for name, t in converted.state_dict().items() if "log_gain" not in name}
    train(converted, tuning.parameters(), x, target, tuning.step)
    assert not torch.equal(
        best[next(n for n in best if n.endswith(".scale"))],
        dict(converted.state_dict())[next(n for n in best if n.endswith(".scale"))],
    )
    converted.load_state_dict(best, strict=False)
    tuning.finish()
    for name, t in converted.state_dict().items():
        assert torch.equal(t, best[name]), name
