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
    assert not any(module._forward_hooks for module in made.modules())
    assert not any(module._load_state_dict_pre_hooks for module in made.modules() if module is not made)
    assert len(made._load_state_dict_pre_hooks) == (back is qk.convert)  # which refuses states of other models
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


def small(*layers: nn.Module, config: QConfig | None = None, calibrated: bool = True):
    model = qk.prepare(nn.Sequential(*(layers or (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))), config)
    if calibrated:
        qk.calibrate(model, [torch.randn(16, 8)])
    return model


@pytest.mark.parametrize("freeze", [qk.freeze_scales, qk.freeze_observers, qk.freeze_bn])
@pytest.mark.parametrize("frozen", ["*weight*", None, 0])
def test_a_freeze_takes_a_bool_and_names_by_where(freeze, frozen):
    model = small()
    with pytest.raises(TypeError, match=rf"^frozen: got {re.escape(repr(frozen))}.*accepted: True or False .*where="):
        freeze(model, frozen)
    assert not any(q.frozen for q in model.modules() if isinstance(q, qk.nn.FakeQuantize))
    assert type(model[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_scale_that_is_not_positive_is_refused_by_hand_and_from_a_state(quantizer, value):
    config = QConfig(QSpec(8, quantizer=quantizer), QSpec(8, quantizer=quantizer))
    model = small(config=config)
    text = rf"0\.weight_fake_quant\.scale: got {value}; accepted: positive, finite numbers"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^{text}"):
        model[0].weight_fake_quant.scale = value
    state = copy.deepcopy(before)
    state["0.weight_fake_quant.scale"][-1] = value
    for load in (model.load_state_dict, lambda state: nn.ModuleList([model]).load_state_dict(state)):
        if load != model.load_state_dict:
            state = {f"0.{key}": t for key, t in state.items()}
        with pytest.raises(RuntimeError, match=text):
            load(state)
        for key, t in model.state_dict().items():
            if "0.weight_fake_quant" in key:
                assert torch.equal(t, before[key]), key
    empty = small(config=config, calibrated=False)
    empty.load_state_dict(empty.state_dict())  # whose scales are NaN


def test_a_scale_of_another_shape_is_named():
    quantizer = small()[2].weight_fake_quant
    with pytest.raises(
        ValueError, match=r"^2.weight_fake_quant.scale: got shape \[3\]; accepted: a number, or shape \["
    ):
        quantizer.scale = torch.ones(3)
    for scale in (0.5, torch.tensor([0.5]), torch.full_like(quantizer.scale, 0.5)):
        quantizer.scale = scale
        assert bool((quantizer.scale == 0.5).all())


def test_states_of_something_else_are_refused_in_few_words():
    model = small()
    recipe = qk.Recipe(model, [qk.Phase(steps=3)])
    with pytest.raises(ValueError, match=r"^state: got one with the keys '0.weight', .*, and \d+ more; acc") as error:
        recipe.load_state_dict(model.state_dict())
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match=r"^state: got one at step 4; accepted: up to 3, which"):
        recipe.load_state_dict({**recipe.state_dict(), "steps": 4})
    recipe.start()
    for _ in range(5):
        recipe.step()
    assert recipe.steps == 3
    recipe.load_state_dict(recipe.state_dict())


def test_a_bit_schedule_takes_its_own_state_alone():
    model = small()
    state = qk.BitSchedule(model, {"*": 8, "2.weight*": qk.schedules.steps({0: 8, 1: 5})}).state_dict()
    other = qk.BitSchedule(model, {"*": 8, "2.weight*": qk.schedules.steps({0: 8, 1: 4})})
    text = (
        r"^state: got one of another schedule, 2.weight_fake_quant: 'schedules.steps\({0: 8, 1: 5}\)'; accepted: 'sche"
    )
    with pytest.raises(ValueError, match=text):
        other.load_state_dict({**state, "steps": 1})
    assert (other.steps, model[2].weight_fake_quant.bits) == (0, 8)
    other.load_state_dict({"steps": 1})  # as earlier versions wrote it
    assert model[2].weight_fake_quant.bits == 4
    other.load_state_dict(other.state_dict())


def test_long_lists_of_names_end_after_three():
    layers = [nn.Linear(8, 8) for _ in range(4)]
    more = r"(, [\w'.]+){2}, and \d more"
    with pytest.raises(
        ValueError, match=r"0.input_fake_quant' is not calibrated, nor are '1.\w+', '2.\w+', '3.\w+'; acc"
    ):
        qk.convert(small(*layers, calibrated=False).eval())
    model = small(*layers)
    with pytest.raises(ValueError, match=rf"on the names of quantizers: '0.weight_fake_quant'{more}"):
        qk.freeze_scales(model, where="nothing")
    qk.freeze_scales(model)
    with pytest.raises(ValueError, match=rf"all frozen \(0.weight_fake_quant{more}\)"):
        qk.calibrate(model, [torch.randn(2, 8)])
    qk.enable_fake_quant(model, False)
    with pytest.raises(ValueError, match=rf"switched off in 0.weight_fake_quant{more};"):
        qk.convert(model.eval())


@pytest.mark.parametrize("method", [qk.gptq, qk.adaround, qk.correct_bias])
def test_a_model_without_weights_to_round_is_said_to_have_none(method):
    model = small(config=QConfig(QSpec(4, quantizer="nf4")))
    with pytest.raises(
        ValueError, match=r"^model: got one in which .* no Linear layer or convolution .*; accepted: one"
    ):
        method(model, [torch.randn(4, 8)])


def test_what_is_frozen_without_a_scale_says_how_it_gets_one():
    model, x = small(calibrated=False), torch.randn(4, 8)
    qk.freeze_scales(model)
    with pytest.raises(RuntimeError, match=r"forward pass call qk.calibrate.*behind qk.freeze_scales\(model, False\)"):
        model(x)
    qk.calibrate(model, [x])
    model(x)


def test_a_list_of_batches_for_one_is_named():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
    prepared = qk.prepare(model)
    qk.calibrate(prepared, [x])
    batches = [(x, torch.ones(1))] * 3
    for function in (lambda: qk.compare(model, prepared, batches), lambda: qk.measure_latency(model, batches)):
        with pytest.raises(TypeError, match=r": got a list of 3, each a tuple, .*; accepted: one batch") as error:
            function()
        assert len(str(error.value)) < 200
