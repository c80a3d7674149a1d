"""Faults that a user's trial of the guide found: small models, each beside the documented case."""

import copy
import dataclasses
import re
import warnings

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import QConfig, QSpec


@pytest.mark.parametrize("name", list(qk.presets))
def test_repr_and_json_give_an_equal_config(name):
    config = dataclasses.replace(qk.presets[name], rules=[("head", None), [nn.Conv2d, {"weight": {"bits": 3}}]])
    for each in (QConfig(), qk.presets[name], config):
        assert QConfig.from_json(each.to_json()) == each
        assert eval(repr(each), {**vars(qk), "torch": torch}) == each
    assert config != qk.presets[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rules": 3}', "rules: got 3"),
        ('{"rules": [["a"]]}', r"rules\[0\]: got \['a'\]; accepted: a pair"),
        ('{"rules": [[{"type": "Linear"}, null]]}', "got {'type': 'Linear'} as a pattern"),
        ('{"rules": [[{"module": "torch.nn", "name": 3}, null]]}', "as a pattern; accepted"),
        ('{"weight": {"granularity": {"PerGroup": 3}}}', r"granularity: got {'PerGroup': 3}; accepted"),
        ('{"weight": {"granularity": {"kind": "PerGroup", "sise": 3}}}', "PerGroup: got the key 'sise'.*'size'"),
    ],
)
def test_json_that_is_no_config_is_refused_by_its_part(text, message):
    with pytest.raises((TypeError, ValueError), match=message):
        QConfig.from_json(text)


@pytest.mark.parametrize(("bits", "kind"), [(9, ValueError), (4.0, TypeError), (True, TypeError), (3, ValueError)])
def test_a_width_that_is_refused_changes_nothing(bits, kind):
    rules = [("1", {"weight": QSpec(2, quantizer="ternary")})]
    model = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), QConfig(rules=rules))
    qk.calibrate(model, [torch.randn(4, 8)])
    with torch.no_grad():
        model[0].weight.mul_(3)
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    with pytest.raises(kind, match="bits: got"):
        qk.set_bits(model, bits)
    assert model[0].weight_fake_quant.bits == 8
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("empty", [nn.Linear(0, 4), nn.Linear(4, 0), nn.Embedding(0, 4), nn.Conv1d(0, 4, 1)])
def test_a_layer_without_elements_stays_in_float(empty):
    with pytest.warns(UserWarning, match=r"empty \(its weight has no elements\)"):
        prepared = qk.prepare(nn.ModuleDict({"empty": empty, "full": nn.Linear(3, 4)}))
    assert type(prepared["empty"]) is type(empty)
    assert prepared["full"].weight_fake_quant is not None


@pytest.mark.parametrize("inplace", [False, True])
def test_a_lazy_batch_norm_is_named(inplace):  # torch cannot copy its buffers
    model = nn.Sequential(nn.Linear(8, 4), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'1.running_mean' has no shape yet; .*call the model once"):
        qk.prepare(model, inplace=inplace)
    assert type(model[0]) is nn.Linear
    model(torch.randn(3, 8))
    assert qk.prepare(model, inplace=inplace)[0].weight_fake_quant is not None


def test_a_lazy_module_of_another_class_is_named():
    model = nn.Sequential(nn.Linear(8, 4), nn.Module())
    model[1].table = nn.UninitializedParameter()
    with pytest.warns(UserWarning, match="1 \\(Module is no layer that prepare knows; .* 'table'"):
        assert qk.prepare(model, inplace=True)[0].weight_fake_quant is not None


def test_a_converted_model_is_named_so():
    prepared = qk.prepare(nn.Sequential(nn.Linear(8, 4)))
    qk.calibrate(prepared, [torch.randn(4, 8)])
    with pytest.raises(ValueError, match="converted already"):
        qk.prepare(qk.convert(prepared))


@pytest.mark.parametrize("back", [qk.convert, qk.unprepare])
def test_no_hook_stays_of_a_prepared_part(back):
    model = nn.Sequential(qk.prepare(nn.Sequential(nn.Linear(8, 4))), nn.ReLU())
    qk.calibrate(model, [torch.randn(4, 8)])
    made = back(model)
    assert not any(module._forward_hooks or module._load_state_dict_pre_hooks for module in made.modules())
    assert model[0]._load_state_dict_pre_hooks


def test_a_rule_for_a_layers_own_parameter_says_what_it_costs():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match=r"1 layer whose parameter alone is quantized.* stay in float: 0 \(weight\)"):
        prepared = qk.prepare(model, QConfig(rules=[("0.weight", {"weight": {"bits": 4}})]))
    qk.calibrate(prepared, [torch.randn(4, 8)])
    assert "a rule names its parameter and not the layer" in str(qk.report(prepared))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.prepare(model, QConfig(rules=[("0", {"weight": {"bits": 4}})]))


def test_a_rule_that_reaches_a_container_alone_is_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"'0' leaves no layer in float.* such as '0.0'; accepted: .* '0.\*'"):
        qk.prepare(model, QConfig(rules=[("0", None)]))
    with pytest.warns(UserWarning, match="leaves no layer in float"):
        qk.prepare(model[0], QConfig(rules=[(nn.Sequential, None)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = qk.prepare(model, QConfig(rules=[("0*", None), (nn.ReLU, None)]))
    assert type(left[0][0]) is nn.Linear
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 4)})
    assert type(qk.prepare(attention, QConfig(rules=[("a", None)]))["a"]) is nn.MultiheadAttention


def test_a_rule_for_another_name_of_a_shared_layer_is_refused():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(ValueError, match="'2' matches '2', another name of '0'"):
        qk.prepare(model, QConfig(rules=[("2", {"weight": {"bits": 4}})]))
    assert qk.prepare(model, QConfig(rules=[("[02]", {"weight": {"bits": 4}})]))[2].weight_fake_quant.bits == 4


def test_a_scripted_model_is_refused():
    with pytest.raises(TypeError, match="model: got a ScriptModule; accepted"):
        qk.prepare(torch.jit.script(nn.Linear(4, 4)))


def test_a_rule_leaves_a_weight_in_float_by_its_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    prepared = qk.prepare(model, QConfig(rules=[("0.weight", None)]))
    assert prepared[0].weight_fake_quant is None
    assert prepared[0].input_fake_quant is not None
    assert prepared[1].weight_fake_quant is not None
    recurrent = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "head": nn.Linear(4, 2)})
    assert qk.prepare(recurrent, QConfig(input=None, rules=[("lstm.weight_*", None)]))["lstm"] is not None
    with pytest.raises(ValueError, match="layer 'lstm': a rule leaves 'weight_ih_l0' in float and not 'weight_hh_l0'"):
        qk.prepare(recurrent, QConfig(rules=[("*.weight_ih_l0", None)]))


class Branches(nn.Module):
    """Of each kind of layer one, some frames below the model's call."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1))
        self.up = nn.ModuleList([nn.ConvTranspose1d(3, 4, 2)])
        self.linear, self.table, self.gru = nn.Linear(6, 6), nn.Embedding(9, 6), nn.GRU(6, 6)
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, kind, x):
        if kind == "attention":
            return self.attention(x, x, x)
        return self.up[0](x) if kind == "up" else getattr(self, kind)(x)


class Pairs(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pair):
        return self.model(*pair)


INPUTS = {
    "conv": torch.rand(2, 3, 5, 5),
    "up": torch.rand(2, 3, 5),
    "linear": torch.rand(2, 6),
    "table": torch.tensor([[0, 8]]),
    "gru": torch.rand(4, 2, 6),
    "attention": torch.rand(4, 2, 6),
}
WRONG = [
    ("conv", torch.rand(2, 5, 8, 8), "conv.0.0", "Conv2d", "5, 8, 8"),
    ("conv", torch.zeros(2, 3, 8, 8, dtype=torch.int64), "conv.0.0", "Conv2d", "int64|Long"),
    ("up", torch.rand(2, 4, 5), "up.0", "ConvTranspose1d", "2, 4, 5"),
    ("up", torch.rand(2, 4, 5, 5), "up.0", "ConvTranspose1d", "2, 4, 5, 5"),
    ("linear", torch.rand(2, 5), "linear", "Linear", "2, 5|2x5"),
    ("table", torch.rand(2), "table", "Embedding", "float|Float"),
    ("table", torch.tensor([9]), "table", "Embedding", "out of range"),
    ("linear", [0.5], "linear", "Linear", "list"),
    ("gru", torch.rand(4, 2, 5), "gru", "GRU", "6"),
    ("gru", torch.rand(5), "gru", "GRU", "dims"),
    ("attention", torch.rand(4, 2, 5), "attention", "Attention", "4, 2, 5"),
]


@pytest.fixture(scope="module")
def stages():
    prepared = qk.prepare(Branches())
    qk.calibrate(prepared, list(INPUTS.items()))
    whole, hooked = (qk.convert(prepared.eval()) for _ in range(2))
    hooked.conv[0][0].register_forward_hook(lambda *_: None)  # layers then run one by one
    return {"prepared": prepared, "converted": whole, "hooked": hooked, "copied": copy.deepcopy(whole)}


@pytest.mark.parametrize("stage", ["prepared", "converted", "hooked", "copied"])
@pytest.mark.parametrize(("kind", "x", "name", "layer", "text"), WRONG, ids=range(len(WRONG)))
def test_an_error_says_which_layer_of_the_model_it_is_of(stages, stage, kind, x, name, layer, text):
    """By the name in the model that was called, whatever model that is."""
    for model, prefix in ((stages[stage], ""), (nn.Sequential(Pairs(stages[stage])), "0.model.")):
        with pytest.raises((RuntimeError, TypeError, ValueError, IndexError, AttributeError)) as error:
            model((kind, x)) if prefix else model(kind, x)
        place = re.escape(prefix + name)
        assert re.match(rf"{place} \(\w*{layer}\w*\): .*({text})", str(error.value), re.DOTALL), error.value


def test_an_error_of_a_layer_alone_says_its_class():
    layer = qk.nn.Int8Linear.from_float(nn.Linear(3, 4))
    with pytest.raises(RuntimeError, match=r"^Int8Linear: input: got shape \[2, 4\]; accepted: \[\.\.\., 3\]$"):
        layer(torch.rand(2, 4))


class Steps(nn.Module):
    """As Lightning's modules: another method than forward is called, and calls the parts."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def step(self, x):
        return self.model.conv(x)


def test_the_name_is_that_in_the_module_whose_method_runs(stages):
    with pytest.raises(RuntimeError, match=r"^model\.conv\.0\.0 \(Int8Conv2d\): input: got shape"):
        Steps(stages["converted"]).step(torch.rand(2, 5, 8, 8))
    with pytest.raises(RuntimeError, match=r"^conv\.0\.0 \(Int8Conv2d\): input: got shape"):
        stages["converted"].forward("conv", torch.rand(2, 5, 8, 8))


def test_an_error_of_one_of_torchs_layers_says_which():
    """An fp64 image passes through an integer layer, and not through a norm in fp32."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    prepared = qk.prepare(model)
    qk.calibrate(prepared, [torch.rand(2, 3, 4, 4)])
    converted = qk.convert(prepared.eval())
    with pytest.raises(RuntimeError, match=r"^2 \(BatchNorm2d\): .*dtype"):
        converted(torch.rand(2, 3, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    "function",
    [
        lambda model: qk.calibrate(model, [torch.ones(2, 4)]),
        lambda model: qk.reestimate_bn(model, [torch.ones(2, 4)]),
        lambda model: qk.gptq(model, [torch.ones(2, 4)]),
        lambda model: qk.set_bits(model, 4),
        lambda model: qk.parameter_groups(model, lr=0.1),
        qk.freeze_observers,
        qk.freeze_scales,
        qk.freeze_bn,
        qk.enable_fake_quant,
        qk.report,
    ],
)
def test_what_is_no_model_is_named(function):
    with pytest.raises(TypeError, match=r"^model: got a NoneType; accepted: "):
        function(None)


def test_switches_percentages_and_numbers_of_another_type_are_named():
    model = qk.prepare(nn.Linear(4, 4))
    x = [torch.randn(3, 4)]
    with pytest.raises(TypeError, match=r"^weights: got 'no', a str; accepted: True, False or None"):
        qk.enable_fake_quant(model, weights="no")
    with pytest.raises(ValueError, match=r"^percentile: got '99'; accepted: above 50, at most 100"):
        qk.calibrate(model, x, method="percentile", percentile="99")
    with pytest.raises(ValueError, match=r"^max_batches: got True; accepted: a whole number"):
        qk.calibrate(model, x, max_batches=True)
    with pytest.raises(ValueError, match=r"^model: 'input_fake_quant' is not calibrated; accepted: one behind qk.cali"):
        qk.gptq(model, x)
    qk.calibrate(model, x)
    with pytest.raises(TypeError, match=r"^float_model: got a int; accepted: the model before qk.prepare"):
        qk.report(model, float_model=3)
    with pytest.raises(RuntimeError, match=r"^example: .* failed with .*; accepted: what the model takes"):
        qk.report(model, torch.randn(3, 5))
