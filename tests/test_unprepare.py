"""unprepare, prepare in place, and the switches of quantizers."""

import copy
import warnings

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, quantizers, snapshot
from torch import nn
from torch.nn.utils import parametrizations

import qkernels as qk
from qkernels.nn import FakeQuantize


class Padded(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Linear):
    """A subclass without a forward of its own."""


def mixed() -> nn.Module:
    torch.manual_seed(0)
    normed = parametrizations.weight_norm(nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), Padded(8, 8), Doubled(8, 8), normed, nn.Conv1d(5, 6, 3), nn.LayerNorm(6))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module, x: torch.Tensor, **options) -> nn.Module:
    prepared = qk.prepare(model, qk.QConfig(qk.QSpec(4)), **options)
    qk.calibrate(prepared, [x])
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    return prepared


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [mixed, ConvNet])
def test_the_float_model_comes_back_with_the_trained_weights(make, inplace):
    model = make()
    x = X if make is mixed else images()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    calls = []
    model[0].register_forward_hook(lambda module, args, y: calls.append(module)) if make is mixed else None
    prepared = trained(model, x)
    before = snapshot(prepared)
    state = {key: value.clone() for key, value in prepared.state_dict().items()}
    back = qk.unprepare(copy.deepcopy(prepared) if inplace else prepared, inplace=inplace)
    assert_unchanged(prepared, before)
    found = [(name, type(module)) for name, module in back.named_modules()]
    assert [name for name, _ in found] == [name for name, _ in kinds]
    plain = [kind for _, kind in kinds if "Parametrized" not in kind.__name__]
    assert [kind for _, kind in found if "Parametrized" not in kind.__name__] == plain
    assert list(back.state_dict()) == list(model.state_dict())
    for key, value in back.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert back.training == prepared.training
    twin = make()
    twin.load_state_dict(back.state_dict())
    torch.testing.assert_close(back.eval()(x), twin.eval()(x))
    if make is mixed:
        assert calls[-1] is back[0]
    again = qk.prepare(back)  # nothing is left behind
    assert quantizers(again).keys() == quantizers(prepared).keys()


@pytest.mark.parametrize("inplace", [False, True])
def test_frozen_batch_norms_are_ordinary_again(inplace):
    prepared = trained(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), X)
    qk.freeze_bn(prepared)
    back = qk.unprepare(prepared, inplace=inplace)
    assert type(back[1]) is nn.BatchNorm1d
    assert back[1].training
    assert torch.equal(back[1].running_mean, prepared[1].running_mean)
    assert inplace or type(prepared[1]) is not nn.BatchNorm1d


def test_burnt_in_weights_are_those_that_the_quantizers_gave():
    prepared = trained(mixed(), X)
    qk.enable_fake_quant(prepared, inputs=False)
    with torch.no_grad():
        expected = prepared.eval()(X)
    back = qk.unprepare(prepared, burn_in=True)
    assert not any(isinstance(module, FakeQuantize) for module in back.modules())
    torch.testing.assert_close(back(X), expected)
    assert all(len(row.unique()) <= 15 for row in back[0].weight)
    assert set(dict(back.named_parameters())) >= {"0.weight", "3.weight", "4.weight"}
    twin = nn.Sequential(
        nn.Linear(8, 8), Padded(8, 8), Doubled(8, 8), nn.Linear(8, 8), nn.Conv1d(5, 6, 3), nn.LayerNorm(6)
    )
    twin.load_state_dict(back.state_dict())
    torch.testing.assert_close(twin(X), expected)


def test_prepare_in_place_keeps_every_module_and_computes_as_a_copy_does():
    model = mixed()
    twin = copy.deepcopy(model)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    seen = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(module))
    prepared = trained(model, X, inplace=True)
    assert prepared is model
    assert all(prepared.get_submodule(name) is module for name, module in modules.items())
    assert all(dict(prepared.named_parameters())[name] is p for name, p in parameters.items())
    assert seen[-1] is modules["0"]
    torch.testing.assert_close(prepared(X), trained(twin, X)(X))
    with pytest.raises(ValueError, match=r"prepared already \(it holds '0.weight_fake_quant'\)"):
        qk.prepare(model, inplace=True)
    assert qk.unprepare(model, inplace=True) is model
    assert type(modules["0"]) is nn.Linear
    assert type(modules["1"]) is Padded
    with pytest.raises(ValueError, match="without quantizers"):
        qk.unprepare(model)


def test_switches_of_weights_and_inputs():
    prepared = trained(nn.Sequential(nn.Linear(8, 8)), X).eval()
    layer = prepared[0]
    weight, input = layer.weight_fake_quant, layer.input_fake_quant
    w, x = weight(layer.weight), input(X)
    for arguments, (weights, inputs) in {
        (("weights", False),): (False, True),
        (("inputs", False),): (False, False),
        (("weights", True),): (True, False),
        (("enabled", True), ("weights", False)): (False, True),
        (): (True, True),
        (("enabled", False),): (False, False),
    }.items():
        qk.enable_fake_quant(prepared, **dict(arguments))
        assert (weight.quantizes, input.quantizes) == (weights, inputs)
        expected = nn.functional.linear(x if inputs else X, w if weights else layer.weight, layer.bias)
        torch.testing.assert_close(prepared(X), expected)
    with pytest.raises(ValueError, match=r"switched off in 0\.weight_fake_quant; accepted: one behind qk.ena"):
        qk.unprepare(prepared, burn_in=True)


def test_the_fused_paths_of_torch_come_back():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = qk.prepare(model)
    assert not prepared.use_nested_tensor
    assert not prepared.layers[0].activation_relu_or_gelu
    back = qk.unprepare(prepared)
    assert back.use_nested_tensor is model.use_nested_tensor is True
    assert back.layers[0].activation_relu_or_gelu == 1
    assert set(vars(back.layers[0])) == set(vars(model.layers[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qk.prepare(two_layers(6)), r"0\.weight: got shape \[6, 8\]"),
        (lambda: qk.prepare(two_layers(), "w4a8"), r"0\.weight_fake_quant\.bits: got a state of 4 bits; accepted: 8"),
        (lambda: qk.prepare(two_layers(), qk.QConfig(qk.QSpec(8, qk.PerTensor()))), r"fake_quant\.scale: got shape"),
        (lambda: nn.ModuleDict({"other": nn.Linear(8, 8)}), "keys begin with 'other.weight'; accepted: .*'0.weight'"),
    ],
)  # fmt: skip
def test_the_state_of_another_model_is_refused_before_any_of_it_is_loaded(make, message):
    torch.manual_seed(0)
    prepared = qk.prepare(two_layers())
    qk.calibrate(prepared, [X])
    before = snapshot(prepared)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"{message}.*[Nn]othing was loaded"):
            prepared.load_state_dict(make().state_dict(), strict=strict)
        assert_unchanged(prepared, before)
    prepared.load_state_dict(two_layers().state_dict(), strict=False)
    for made in (qk.convert(prepared), qk.unprepare(prepared), copy.deepcopy(qk.unprepare(prepared, burn_in=True))):
        converted = any(isinstance(module, qk.nn.Int8Linear) for module in made.modules())
        assert len(made._load_state_dict_pre_hooks) == converted  # which refuses other models too
        assert not made._forward_hooks


def two_layers(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
