"""gptq, adaround, correct_bias: a smaller error on new inputs, weights on the grid, a model untouched by what fails."""

from __future__ import annotations

import random

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import qkernels as qk

QUICK = {"steps": 80, "lr": 5e-2}
METHODS = {
    "gptq": qk.gptq,
    "adaround": lambda model, batches, **options: qk.adaround(model, batches, **{**QUICK, **options}),
    "correct_bias": qk.correct_bias,
}


def correlated(rows: int, features: int = 32) -> torch.Tensor:
    """Inputs with a few strong directions, the same at each call."""
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(5)) / features**0.5
    return torch.randn(rows, features) @ (mix * torch.linspace(2, 0.1, features))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24))


def prepared(model, batches, bits=3, **fields):
    made = qk.prepare(model, qk.QConfig(qk.QSpec(bits, **fields)))
    qk.calibrate(made, batches)
    return made


def error(model, quantized, x):
    with torch.no_grad():
        return float((quantized.eval()(x) - model.eval()(x)).square().mean())


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("method", "left"), [("gptq", 0.8), ("adaround", 0.75), ("correct_bias", 0.92)])
def test_smaller_error_on_new_inputs(method: str, left: float, bits: int) -> None:
    model, batches, new = mlp(), [correlated(256), correlated(256)], correlated(256)
    made = prepared(model, batches, bits)
    before = error(model, made, new)
    METHODS[method](made, batches)
    assert error(model, made, new) < left * before


@pytest.mark.parametrize("method", METHODS)
def test_convolutions(method: str) -> None:
    """Groups, dilation and a BatchNorm behind each; neighbours alike, as in images."""
    model = ConvNet()
    pictures = [F.avg_pool2d(torch.randn(32, 3, 12, 12), 5, 1) * 4 for _ in range(2)]
    made = prepared(model, pictures[:1])
    before = error(model, made, pictures[1])
    found = METHODS[method](made, pictures[:1])
    assert list(found) == ["conv1", "conv2", "fc"]
    assert error(model, made, pictures[1]) < 0.85 * before


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": 8},
        {"symmetric": False},
        {"granularity": qk.PerGroup(16)},
        {"granularity": qk.PerTensor(), "quantizer": "minmax"},
        {"quantizer": "minmax", "symmetric": False, "bits": 6},
    ],
    ids=["learned", "8 bits", "zero point", "groups", "per tensor", "minmax"],
)
def test_weights_are_on_the_grid(method: str, fields) -> None:
    """The layer computes with the very weights that were found, trained or not, and so does the converted one."""
    model, batches = mlp(), [correlated(128)]
    made = prepared(model, batches, **{"bits": 3, **fields})
    scales = [made[at].weight_fake_quant.qparams(made[at].weight) for at in (0, 2)]
    errors = METHODS[method](made, batches)
    assert all(after <= before for before, after in errors.values())
    assert any(after < before for before, after in errors.values())
    for training in (False, True):
        made.train(training)
        for at, (scale, zero_point) in zip((0, 2), scales, strict=True):
            layer = made[at]
            assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
            now = layer.weight_fake_quant.qparams(layer.weight)
            assert torch.equal(now[0], scale)
            assert zero_point is None or torch.equal(now[1], zero_point)
    x = correlated(64)
    assert error(made, qk.convert(made), x) < 1e-10
    state = qk.prepare(mlp(), qk.QConfig(qk.QSpec(**{"bits": 3, **fields})))
    state.load_state_dict(made.state_dict())
    assert error(made, state, x) == 0


def test_errors_that_gptq_names() -> None:
    """They are those of the first layer's output by the rounding of its weight."""
    model, x = nn.Sequential(nn.Linear(32, 24)), correlated(200)
    made = prepared(model, [x])
    layer = made[0]
    quantized = layer.input_fake_quant(x)

    def measured():
        rounded = layer.weight_fake_quant(layer.weight)
        return float((quantized @ (rounded - model[0].weight).T).square().mean().detach())

    made.eval()
    nearest = measured()
    before, after = qk.gptq(made, [x])["0"]
    assert before == pytest.approx(nearest, rel=1e-3)
    assert after == pytest.approx(measured(), rel=1e-3)


def test_convolution_is_the_product_with_its_patches() -> None:
    """A 1x1 convolution and a Linear layer of the same weight are rounded alike; so are three kernels of one shape."""
    linear, x = nn.Linear(12, 8), correlated(96, 12)
    found = {}
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
        conv = kind(12, 8, 1)
        with torch.no_grad():
            conv.weight.copy_(linear.weight.view(8, 12, *[1] * dims))
        made = prepared(nn.Sequential(conv), [x.view(-1, 12, *[1] * dims)])
        qk.gptq(made, [x.view(-1, 12, *[1] * dims)])
        found[kind] = made[0].weight.detach().view(8, 12)
    made = prepared(nn.Sequential(linear), [x])
    qk.gptq(made, [x])
    for weight in found.values():
        torch.testing.assert_close(weight, made[0].weight.detach())


def test_later_layers_see_the_inputs_that_earlier_ones_leave() -> None:
    model, batches = mlp(), [correlated(128)]
    made = prepared(model, batches, 2)
    alone = prepared(model, batches, 2)
    qk.gptq(made, batches)
    qk.gptq(alone, batches, where="2")
    assert not torch.equal(made[2].weight, alone[2].weight)
    assert torch.equal(alone[0].weight, model[0].weight)


def test_bias_correction_makes_means_equal() -> None:
    model, batches = ConvNet(), [images(32), images(16)]
    made = prepared(model, batches, 2)
    mean = made.norm1.running_mean.clone()
    moved = qk.correct_bias(made, batches)
    assert not torch.equal(made.norm1.running_mean, mean), "conv1 has no bias"
    assert all(value > 0 for value in moved.values())
    x = torch.cat(batches)
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(x).mean(0), model.eval()(x).mean(0), rtol=0, atol=1e-5)
    bare = prepared(nn.Sequential(nn.Linear(8, 4, bias=False)), [torch.randn(9, 8)])
    assert qk.correct_bias(bare, [torch.randn(9, 8)]) == {}


def test_float_model_gives_the_targets() -> None:
    """Behind gptq the prepared model no longer knows the float weights."""
    model, batches = mlp(), [correlated(256)]
    made = prepared(model, batches, 2)
    qk.gptq(made, batches)
    with pytest.warns(UserWarning, match="^0, 2: the weights hold quantized values already, as behind qk.gptq"):
        qk.correct_bias(made, batches)
    qk.correct_bias(made, batches, float_model=model)
    with torch.no_grad():
        torch.testing.assert_close(made(batches[0]).mean(0), model(batches[0]).mean(0), rtol=0, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"float_model: its '0\.weight' is missing; accepted: the model before qk.prepare"
    ):
        qk.correct_bias(made, batches, float_model=nn.Linear(3, 3))
    with pytest.raises(TypeError, match="float_model: got a int"):
        qk.adaround(made, batches, float_model=3)


class Queries(nn.Module):
    """Two layers read one tensor, and share its quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x)


def test_float_model_of_layers_that_share_a_quantizer() -> None:
    model, batches = Queries().eval(), [correlated(256)]
    made = prepared(model, batches)
    assert made.q.input_fake_quant is made.k.input_fake_quant
    qk.gptq(made, batches)
    assert set(qk.correct_bias(made, batches, float_model=model)) == {"q", "k"}
    with torch.no_grad():
        torch.testing.assert_close(made.eval().k(batches[0]).mean(0), model.k(batches[0]).mean(0), rtol=0, atol=1e-5)
    assert set(METHODS["adaround"](prepared(model, batches), batches, float_model=model)) == {"q", "k"}


def test_layers_that_the_float_model_does_not_call() -> None:
    """torch's attention reads the weight of its out_proj, and a whole layer on its fused path all weights."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(4, 6, 8)
    made = prepared(model, [x], 2)
    assert list(qk.gptq(made, [x])) == ["self_attn.out_proj", "linear1", "linear2"]
    assert min(qk.correct_bias(made, [x], float_model=model).values()) > 1e-4
    again = qk.correct_bias(made, [x], float_model=model)
    assert list(again) == ["self_attn.out_proj", "linear1", "linear2"]
    assert max(again.values()) < 1e-6, "the means were equal already"


def test_where_takes_names() -> None:
    made = prepared(mlp(), [correlated(64)])
    assert list(qk.gptq(made, [correlated(64)], where=["2", "[2-9]"])) == ["2"]
    with pytest.raises(ValueError, match="where: got 'nothing'; accepted: a glob"):
        qk.gptq(made, [correlated(64)], where=["2", "nothing"])


def test_shared_and_own_layers_are_left_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.twice, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight
            self.norm = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.unused = nn.Linear(8, 8)

        def forward(self, ids):
            return self.head(self.norm(self.twice(self.twice(self.table(ids)).relu())))

    model, batches = Model(), [torch.randint(0, 9, (6, 5)), torch.randint(0, 9, (3, 5))]
    made = qk.prepare(model, qk.QConfig(qk.QSpec(3), rules=[("unused", None)]))
    qk.calibrate(made, batches)
    assert list(qk.gptq(made, batches)) == ["twice"]
    assert torch.equal(made.table.weight, model.table.weight)
    assert made.head.weight is made.table.weight
    with pytest.raises(ValueError, match=r"where: got 'head'; accepted: .* layers that can be changed: 'twice'"):
        qk.gptq(made, batches, where="head")


@pytest.mark.parametrize("method", METHODS)
def test_modes_and_random_generators_stay(method: str) -> None:
    model = nn.Sequential(mlp(), nn.Dropout(), nn.Linear(24, 4))
    batches = [correlated(32)]
    made = prepared(model, batches).train()
    made[1].eval()
    modes, states = [module.training for module in made.modules()], (torch.get_rng_state(), random.getstate())
    first = METHODS[method](made, batches)
    assert [module.training for module in made.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not any(vars(module).get("_forward_hooks") for module in made[0])
    again = prepared(model, batches)
    assert METHODS[method](again, batches) == first
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


class Stops:
    """A loader that fails in the middle."""

    def __iter__(self):
        yield correlated(16)
        raise OSError("the disk is gone")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("batches", "options", "error", "text"),
    [
        ([], {}, ValueError, "batches: got none"),
        (correlated(4), {}, TypeError, "batches: got a Tensor"),
        ([correlated(4), correlated(4) * torch.nan], {}, ValueError, "the input of layer '0' holds NaN"),
        ([correlated(4, 7)], {}, RuntimeError, r"batches\[0\]: layer '0'"),
        (Stops(), {}, OSError, "the disk is gone"),
        ([correlated(4)], {"where": "nothing"}, ValueError, "where: got 'nothing'; accepted.*: '0', '2'"),
        ([correlated(4)], {"where": 2}, TypeError, "where: got 2; accepted: a glob"),
        ([correlated(4)], {"where": [2]}, TypeError, r"where: got \[2\]; accepted: a glob"),
        ([correlated(4)], {"max_batches": 0}, ValueError, "max_batches: got 0"),
    ],
    ids=["none", "tensor", "nan", "shape", "loader", "where", "number", "numbers", "max_batches"],
)
def test_refusals(method: str, batches, options, error, text) -> None:
    made = prepared(mlp(), [correlated(64)])
    before = snapshot(made)
    if method == "correct_bias" and "NaN" in text:
        text = "NaN"
    with pytest.raises(error, match=text):
        METHODS[method](made, batches, **options)
    assert_unchanged(made, before)


@pytest.mark.parametrize(
    ("method", "options", "error", "text"),
    [
        (qk.gptq, {"damping": 0}, ValueError, "damping: got 0; accepted: a positive number"),
        (qk.adaround, {"steps": 0}, ValueError, "steps: got 0"),
        (qk.adaround, {"steps": 1.5}, TypeError, "steps: got 1.5"),
        (qk.adaround, {"lr": -1}, ValueError, "lr: got -1"),
        (qk.adaround, {"batch_size": 0}, ValueError, "batch_size: got 0"),
    ],
    ids=lambda value: "",
)
def test_arguments(method, options, error, text) -> None:
    with pytest.raises(error, match=text):
        method(prepared(mlp(), [correlated(16)]), [correlated(4)], **options)


@pytest.mark.parametrize("method", METHODS)
def test_models(method: str) -> None:
    with pytest.raises(TypeError, match="model: got a int"):
        METHODS[method](3, [correlated(4)])
    with pytest.raises(ValueError, match="model: got one without quantizers"):
        METHODS[method](mlp(), [correlated(4)])
    with pytest.raises(ValueError, match="is not calibrated"):
        METHODS[method](qk.prepare(mlp()), [correlated(4)])


class Routed(nn.Module):
    """Each row goes to one of two layers, the first by default."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.first, self.second = nn.Linear(32, 2), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x):
        first = self.gate(x).argmax(-1) == 0
        y = x.new_zeros(len(x), 4)
        y[first], y[~first] = self.first(x[first]), self.second(x[~first])
        return y


@pytest.mark.filterwarnings("ignore:qk.calibrate. no batch reached second:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_layers_without_samples_stay(method: str) -> None:
    model, batches = Routed(), [correlated(64)]
    nn.init.zeros_(model.gate.weight)
    nn.init.constant_(model.gate.bias[:1], 1)
    made = qk.prepare(model, qk.QConfig(qk.QSpec(3)))
    qk.calibrate(made, batches, fallback=1.0)
    rounded = made.second.weight_fake_quant(made.second.weight).detach()
    found = METHODS[method](made, batches)
    assert "first" in found
    assert torch.equal(made.second.bias, model.second.bias)
    assert torch.equal(made.second.weight_fake_quant(made.second.weight), rounded)


def test_adaround_refuses_a_layer_that_gets_other_samples_in_float() -> None:
    model, batches = Routed(), [correlated(256)]
    made = qk.prepare(model, qk.QConfig(qk.QSpec(2), qk.QSpec(2)))
    qk.calibrate(made, batches)
    before = snapshot(made)
    with pytest.raises(ValueError, match="where: got 'first', to which the float model sends other samples"):
        qk.adaround(made, batches, where="first", steps=1)
    assert_unchanged(made, before)


def test_weight_of_a_layer_in_float_stays() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False))
    model[2].weight = model[0].weight
    batches = [torch.randint(0, 9, (6, 5))]
    made = qk.prepare(model, qk.QConfig(qk.QSpec(3), rules=[("0", None)]))
    qk.calibrate(made, batches)
    assert list(qk.gptq(made, batches)) == ["1"]
    assert torch.equal(made[0].weight, model[0].weight)


def test_bias_correction_leaves_shared_and_computed_biases() -> None:
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    model, batches = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), [correlated(64)]
    model[1].bias = model[0].bias
    parametrize.register_parametrization(model[2], "bias", Twice())
    made = prepared(model, batches)
    biases = [layer.bias.clone() for layer in made]
    assert list(qk.correct_bias(made, batches)) == ["3"]
    assert [torch.equal(layer.bias, bias) for layer, bias in zip(made, biases, strict=True)] == [True] * 3 + [False]


def test_inputs_whose_squares_overflow() -> None:
    batches = [correlated(8) * 1e25]
    made = prepared(mlp(), batches)
    before = snapshot(made)
    with pytest.raises(ValueError, match="batches: the squares of the inputs of layer '0' overflow fp32"):
        qk.gptq(made, batches)
    assert_unchanged(made, before)


def test_names_are_those_inside_a_wrapper() -> None:
    batches = [correlated(64)]
    model = mlp()
    wrapped = torch.compile(prepared(model, batches), backend="eager")
    assert list(qk.correct_bias(wrapped, batches, float_model=torch.compile(model, backend="eager"))) == ["0", "2"]
    assert list(qk.gptq(wrapped, batches, where="2")) == ["2"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_samples_without_a_batch(method: str, kind: type[nn.Module]) -> None:
    shape = (4, 9) if kind is nn.Conv1d else (4, 9, 7)
    model, batches = nn.Sequential(kind(4, 6, 3, groups=2)), [torch.randn(shape), torch.randn(shape)]
    alone, batched = prepared(model, batches), prepared(model, batches)
    METHODS[method](alone, batches)
    METHODS[method](batched, [x[None] for x in batches])
    for a, b in zip(alone.parameters(), batched.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_the_user_change_nothing(method: str) -> None:
    """The layer is compared with itself in float, before a hook makes something else of what it returns."""
    model, batches = nn.Sequential(nn.Linear(32, 24)), [correlated(64)]
    plain = prepared(model, batches)
    METHODS[method](plain, batches)
    hooked = prepared(model, batches)
    hooked[0].register_forward_hook(lambda layer, args, output: 3 * output)
    METHODS[method](hooked, batches)
    for a, b in zip(plain.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_model_with_an_autocast_of_its_own(method: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layers(x).float()

    model, batches, new = Model(), [correlated(256)], correlated(256)
    made = prepared(model, batches)
    before = error(model, made, new)
    assert list(METHODS[method](made, batches)) == ["layers.0", "layers.2"]
    assert error(model, made, new) < 0.92 * before
