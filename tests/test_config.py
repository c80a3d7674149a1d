"""QConfig: text that makes an equal config, JSON, presets, and rules for modules, types and parameters."""

import json
import re

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, snapshot
from torch import nn

import qkernels as qk
from qkernels import PerChannel, PerGroup, PerTensor, PerToken, QConfig, QSpec


class Own(nn.Linear):
    pass


CONFIGS = {
    "default": QConfig(),
    "everything": QConfig(
        QSpec(4, PerGroup(32), symmetric=False, straight_through="pass"),
        QSpec(8, PerToken(), quantizer="dynamic"),
        QSpec(7),
        QSpec(8, PerTensor(), quantizer="ema"),
        rules=[
            ("layer1.*", None),
            (nn.Conv2d, {"weight": {"bits": 3, "granularity": PerChannel((0, 1))}, "input": None}),
            (Own, {"hidden": QSpec(8), "output": {}}),
        ],
    ),
    **qk.presets,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_repr_and_json_make_an_equal_config(name):
    config = CONFIGS[name]
    names = {"torch": torch, __name__: __import__("sys").modules[__name__], **vars(qk)}
    again = eval(repr(config), names)  # what a user pastes
    assert again == QConfig(**{**vars(config), "rules": list(config.rules)})
    assert repr(again) == repr(config)
    loaded = QConfig.from_json(config.to_json())
    assert repr(loaded) == repr(config)
    assert loaded.specs("layer1.fc", nn.Linear(1, 1)) == config.specs("layer1.fc", nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "text: got no JSON"),
        ('{"weigth": null}', "'weigth'; accepted: .*did you mean 'weight'"),
        ('{"weight": {"bits": 9}}', "bits: got 9"),
        ('{"weight": {"granularity": {"kind": "PerRow"}}}', "granularity: got 'PerRow'"),
        ('{"rules": [[{"module": "nowhere", "name": "Layer"}, null]]}', "rules: got the type nowhere.Layer"),
        ("[1]", "text: got a list"),
        ('{"weight": {"bit": 4}}', "QSpec: got the key 'bit'.*did you mean 'bits'"),
    ],
)
def test_json_that_is_no_config_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        QConfig.from_json(text)


def test_presets():
    assert set(qk.presets) >= {"w8a8", "w4a8", "w4a16-g128", "w4a4", "w2a2", "weight-only", "activation-only"}
    bits = {name: (c.weight and c.weight.bits, c.input and c.input.bits) for name, c in qk.presets.items()}
    assert bits["w4a8"] == (4, 8)
    assert bits["w4a16-g128"] == (4, None)
    assert bits["activation-only"] == (None, 8)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 3))
    for name in qk.presets:
        prepared = qk.prepare(model, name)
        qk.calibrate(prepared, [torch.randn(4, 256)])
        y = qk.convert(prepared)(torch.randn(4, 256)).sum()
        y.backward() if y.requires_grad else None
    with pytest.raises(KeyError, match="did you mean 'w4a8'"):
        qk.presets["w4a88"]
    with pytest.raises(ValueError, match=r"config: got 'w8a'; accepted: w8a8.*did you mean 'w8a8'"):
        qk.prepare(model, "w8a")
    assert json.loads(qk.presets["w8a8"].to_json())["weight"]["bits"] == 8


@pytest.mark.parametrize(
    ("ask", "meant"),
    [
        (lambda: QSpec(quantizer="LSQ+"), "lsq+"),
        (lambda: QSpec(straight_through="clipp"), "clip"),
        (lambda: qk.nn.FakeQuantize(quantizer="minimax"), "minmax"),
        (lambda: qk.calibrate(qk.prepare(nn.Linear(4, 4)), [torch.randn(2, 4)], method="entropie"), "entropy"),
        (lambda: qk.prepare(Block(), QConfig(rules=[("experts.gate_up", {"weight": {}})])), "experts.gate_up_proj"),
    ],
)
def test_an_unknown_name_gets_the_nearest(ask, meant):
    with pytest.raises(ValueError, match=f"did you mean {re.escape(repr(meant))}"):
        ask()


class Experts(nn.Module):
    """Fused expert weights, as mixtures of experts hold them: [E, N, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.bias = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x):
        return torch.einsum("bk,enk->ben", x, self.gate_up_proj) + self.bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.experts(x).mean(1))


def test_a_rule_quantizes_a_parameter_wherever_it_is_read():
    torch.manual_seed(0)
    model = nn.Sequential(Block())
    config = QConfig(rules=[("*.experts.gate_up_proj", {"weight": {"bits": 4, "quantizer": "minmax"}})])
    prepared = qk.prepare(model, config)
    experts = prepared[0].experts
    assert isinstance(experts, Experts)
    w = model[0].experts.gate_up_proj.detach()
    scale = w.abs().amax(-1, keepdim=True) / 7
    expected = (w / scale).round().clamp(-7, 7) * scale
    torch.testing.assert_close(experts.gate_up_proj, expected)
    assert dict(prepared.named_parameters())["0.experts.gate_up_proj"].shape == w.shape
    assert set(model.state_dict()) < set(prepared.state_dict())
    x = torch.randn(5, 4)
    qk.calibrate(prepared, [x])
    loss = prepared(x).square().mean()
    loss.backward()
    gradient = dict(prepared.named_parameters())["0.experts.gate_up_proj"].grad
    twin = nn.Sequential(Block())
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin[0].experts.gate_up_proj.copy_(expected)
    fq = prepared[0].head.input_fake_quant
    hidden = fq(twin[0].experts(x).mean(1))
    torch.nn.functional.linear(
        hidden, prepared[0].head.weight_fake_quant(twin[0].head.weight), twin[0].head.bias
    ).square().mean().backward()
    torch.testing.assert_close(gradient, twin[0].experts.gate_up_proj.grad)
    converted = qk.convert(prepared)
    assert type(converted[0].experts) is Experts
    torch.testing.assert_close(converted[0].experts.gate_up_proj, expected)
    torch.testing.assert_close(converted(x), prepared.eval()(x))
    assert "hold quantized values" in qk.report(converted).notes["0.experts"]
    assert qk.report(prepared).layers[0].weight_bits == 4
    import copy
    import pickle

    for again in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(again(x), prepared(x))
        assert torch.equal(again[0].experts.gate_up_proj, experts.gate_up_proj)
    assert type(qk.unprepare(prepared)[0].experts) is Experts


def test_a_table_that_several_modules_read_is_quantized_by_its_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(4, 8, bias=False)

        def forward(self, x):
            return torch.nn.functional.linear(self.table(x), self.table.weight.t())

    torch.manual_seed(0)
    model = Tied()
    prepared = qk.prepare(model, QConfig(QSpec(3), rules=[("table.weight", {"weight": {}})]))
    q = prepared.table.weight
    assert q.unique().numel() <= 8 * 7
    x = torch.randn(2, 4)
    torch.testing.assert_close(prepared(x), x @ q.t() @ q)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            QConfig(rules=[("*.gate_up_proj", {"input": {}})]),
            "matches the parameter '0.experts.gate_up_proj' and gives",
        ),
        (QConfig(rules=[("*.gate_proj", None)]), "'\\*.gate_proj' matches no module and no parameter"),
        (
            QConfig(rules=[("0.head", {"cell": {}})]),
            "layer '0.head': a rule gives 'cell'; accepted for this layer: input",
        ),
        (QConfig(QSpec(4, PerGroup(16))), r"layer '0.head' \(Linear\): granularity: got PerGroup\(size=16\).*rule"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_config_that_does_not_fit_leaves_the_model_as_it_was(config, message, inplace):
    model = nn.Sequential(Block())
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        qk.prepare(model, config, inplace=inplace)
    assert_unchanged(model, before)


def test_a_long_model_prepares_fast_and_names_all_that_stays_in_float():
    model = nn.Sequential(*[Experts() for _ in range(12)], ConvNet())
    with pytest.warns(UserWarning, match="12 layers that config does not select stay in float") as caught:
        prepared = qk.prepare(model)
    for i in range(12):
        assert f"{i}" in str(caught[0].message)
        assert "Experts is no layer that prepare knows" in qk.report(prepared).notes[str(i)]


def test_another_quantizer_in_a_rule_brings_its_own_defaults():
    rules = [("nf4", {"input": {"quantizer": "nf4", "bits": 4}}), ("lsq+", {"weight": {"quantizer": "lsq+"}})]
    config = QConfig(QSpec(8), QSpec(8, symmetric=False, straight_through="lsq"), rules=rules)
    specs = config.specs("nf4", nn.Linear(1, 1))
    assert (specs["input"].symmetric, specs["input"].bits, specs["weight"]) == (True, 4, QSpec(8))
    assert not config.specs("lsq+", nn.Linear(1, 1))["weight"].symmetric
    with pytest.raises(ValueError, match=r'rules\[0\], symmetric: got False with quantizer="nf4"'):
        QConfig(rules=[("x", {"input": {"quantizer": "nf4", "bits": 4, "symmetric": False}})])
