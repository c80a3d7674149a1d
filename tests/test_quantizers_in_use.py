"""Every quantizer by name in a training loop, saved, copied, compiled, at other widths; what is refused."""

import copy
import inspect
import io
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from named_quantizers import INPUTS, KEEPING, NEW, WITHOUT_INTEGERS, made, width
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import FakeQuantize, PerChannel, PerGroup, PerTensor, PerToken
from qkernels.nn.quantizer_rules import QUANTIZERS, RULES


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x)))


def configuration(name):
    weight = qk.QSpec(width(name), quantizer=name) if RULES[name].weights else qk.QSpec(8)
    input = qk.QSpec(width(name), quantizer=name) if RULES[name].inputs else qk.QSpec(8, symmetric=False)
    return qk.QConfig(weight, input)


def problem():
    torch.manual_seed(0)
    x = torch.randn(128, 8)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3:].sum(1)], 1)


def train(model, optimizer, count):
    x, target = problem()
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", QUANTIZERS)
def test_training(name, tmp_path):
    """The loss falls, all parameters have gradients, and a run goes on from its state bit for bit."""
    torch.manual_seed(0)
    model = Tiny()
    x = problem()[0]
    prepared = qk.prepare(model, configuration(name))
    qk.calibrate(prepared, [x])
    optimizer = torch.optim.Adam(qk.parameter_groups(prepared, lr=0.01))
    losses = train(prepared, optimizer, 60)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses[::10]
    for key, parameter in prepared.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    torch.save({"model": prepared.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = train(prepared, optimizer, 3)
    after = copy.deepcopy(prepared.state_dict())
    y = prepared.eval()(x)
    for assign in (False, True):
        saved = torch.load(tmp_path / "state.pt")
        resumed = qk.prepare(model, configuration(name))
        resumed.load_state_dict(saved["model"], assign=assign)
        optimizer = torch.optim.Adam(qk.parameter_groups(resumed, lr=0.01))
        optimizer.load_state_dict(saved["optimizer"])
        assert train(resumed, optimizer, 3) == expected
        for key, value in after.items():
            assert torch.equal(value, resumed.state_dict()[key]), key
        assert torch.equal(resumed.eval()(x), y)


@pytest.fixture
def one_process(tmp_path):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    yield
    dist.destroy_process_group()


def test_sharded_bf16_models(one_process):
    from torch.distributed.fsdp import fully_shard

    x = problem()[0].bfloat16()
    for name in ("pact", "stochastic", "dorefa", "midrise", "kmeans"):
        torch.manual_seed(0)
        plain = qk.prepare(Tiny(), configuration(name))
        qk.calibrate(plain, [x.float()])
        plain = plain.bfloat16()
        sharded = fully_shard(copy.deepcopy(plain))
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(qk.parameter_groups(model, lr=0.1))
            for _ in range(2):
                optimizer.zero_grad()
                model(x).float().square().mean().backward()
                optimizer.step()
        state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in sharded.state_dict().items()}
        for key, value in plain.state_dict().items():
            assert torch.equal(state[key], value), (name, key)
        resumed = qk.prepare(Tiny(), configuration(name)).bfloat16()
        resumed.load_state_dict(state)
        assert torch.equal(resumed.eval()(x), sharded.eval()(x)), name
        for model in (plain, sharded):
            model.hidden.weight_fake_quant.start(2 * plain.hidden.weight)
        assert torch.equal(plain.eval()(x), sharded(x)), name


@pytest.mark.parametrize("method", ["mse", "entropy", "minmax"])
def test_calibration_measures_no_codes_where_there_are_none(method):
    torch.manual_seed(0)
    x, model = torch.randn(64, 8), nn.Linear(8, 6)
    for name in ("nf4", "apot", "po2", "midrise"):
        prepared = qk.prepare(model, configuration(name))
        qk.calibrate(prepared, [x], method=method)
        assert torch.equal(prepared.input_fake_quant.scale, x.abs().max().reshape(1))
        assert torch.equal(prepared.weight_fake_quant.scale, model.weight.detach().abs().amax(1, keepdim=True))


@pytest.mark.parametrize("method", ["auto", "minmax", "lsq", "mse"])
def test_calibration_of_other_learned_scales_is_that_of_lsq(method):
    torch.manual_seed(0)
    x, model = torch.randn(64, 8), nn.Linear(8, 6)
    scales = {}
    for name, symmetric in (("lsq", True), ("ewgs", True), ("lsq", False), ("lsq+", False)):
        spec = qk.QSpec(4, quantizer=name, symmetric=symmetric)
        prepared = qk.prepare(model, qk.QConfig(spec, spec))
        qk.calibrate(prepared, [x], method=method)
        prepared(x)
        scales[name, symmetric] = [q.scale for q in (prepared.weight_fake_quant, prepared.input_fake_quant)]
    for ours, lsq in ((("ewgs", True), ("lsq", True)), (("lsq+", False), ("lsq", False))):
        assert all(map(torch.equal, scales[ours], scales[lsq]))


@pytest.mark.parametrize("name", KEEPING)
def test_states_copies_and_casts(name):
    torch.manual_seed(0)
    shape = (6, 8) if RULES[name].weights else None
    x = torch.randn(6, 8)
    quantizer = made(name, shape)
    quantizer(x)
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), torch.load(buffer, weights_only=False)]
    for again in copies:
        assert type(again) is type(quantizer)
        assert torch.equal(again(x), copy.deepcopy(quantizer)(x))
    assert isinstance(quantizer, torch.ao.quantization.FakeQuantizeBase)
    half = copy.deepcopy(quantizer).bfloat16()
    assert all(t.dtype != torch.bfloat16 for t in half.buffers())
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = made(name, shape)
    empty.to_empty(device="cpu")
    empty.load_state_dict(quantizer.state_dict())
    quantizer.eval()
    assert torch.equal(empty.eval()(x), quantizer(x))
    empty.forget()
    assert not empty._ready
    assert torch.equal(empty.train()(2 * x).isfinite(), torch.ones_like(x, dtype=torch.bool))
    off = copy.deepcopy(quantizer)
    off.apply(torch.ao.quantization.disable_fake_quant)
    assert torch.equal(off(x), x)
    off.apply(torch.ao.quantization.enable_fake_quant)
    assert torch.equal(off(x), quantizer(x))
    assert quantizer.integer_codes == (name not in WITHOUT_INTEGERS)
    if quantizer.integer_codes:
        assert torch.equal(qk.dequantize(*quantizer.quantize(x)), quantizer(x))
    else:
        with pytest.raises(RuntimeError, match=f'got quantizer="{name}", whose levels are no integers times a scale'):
            quantizer.quantize(x)
        if name != "dorefa":
            index = qk.quantize_codebook(x, quantizer.qparams(x)[0], quantizer.levels)
            y = qk.dequantize_codebook(index, quantizer.qparams(x)[0], quantizer.levels)
            torch.testing.assert_close(y, quantizer(x))


@pytest.mark.parametrize("name", ["minmax", "ternary", "dorefa", "nf4", "midrise", "kmeans", "stochastic"])
def test_weights_are_followed_until_frozen(name):
    torch.manual_seed(0)
    w = torch.randn(4, 16)
    quantizer = made(name, w.shape, granularity=PerChannel()).eval()
    y = quantizer(w)
    if name == "dorefa":
        assert torch.equal(quantizer.scale, w.abs().amax(1, keepdim=True).tanh())
    else:
        torch.testing.assert_close(quantizer(2 * w), 2 * y)
    quantizer.train()(2 * w)
    moved = quantizer.scale.clone()
    quantizer.disable_observer()
    quantizer(5 * w)
    assert torch.equal(quantizer.scale, moved)
    quantizer.enable_observer()
    with torch.no_grad():
        quantizer.follow(w)
    if name != "dorefa":
        torch.testing.assert_close(quantizer.scale, moved / 2)


@pytest.mark.parametrize("name", KEEPING)
def test_set_bits(name):
    torch.manual_seed(0)
    shape = (6, 32) if RULES[name].weights else None
    x = torch.randn(6, 32)
    quantizer = made(name, shape, bits=4)
    quantizer(x)
    quantizer.set_bits(quantizer.bits)
    if name in ("nf4", "ternary", "kmeans"):
        with pytest.raises(ValueError, match=f'bits: got 8 with quantizer="{name}".*; accepted: {quantizer.bits}'):
            quantizer.set_bits(8)
        assert quantizer(x).isfinite().all()
        return
    before = (quantizer.eval()(x) - x).norm().detach()
    quantizer.set_bits(8)
    after = (quantizer(x) - x).norm().detach()
    if name == "pact":
        assert (quantizer(x) - x).clamp(max=0).abs().max() < before
    else:
        assert after < before * (1.01 if name in ("po2", "dorefa") else 0.3)
    assert quantizer.bits == 8
    if name in ("apot", "po2", "midrise"):
        assert quantizer.levels.numel() == {"apot": 255, "po2": 255, "midrise": 256}[name]
    with pytest.raises(ValueError, match="bits: got 9; accepted: 2 to 8"):
        quantizer.set_bits(9)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(4)], ids=str)
def test_compiled_and_transformed(name, granularity):
    """After the first tensor: one graph; and torch.func's gradient is autograd's."""
    torch.manual_seed(0)
    shape = (6, 8) if RULES[name].weights else None
    x = torch.randn(6, 8)
    eager = made(name, shape, granularity=granularity if shape else None)
    eager(x)
    torch._dynamo.reset()
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for forward, given in zip((compiled, eager), inputs, strict=True):
            forward(given).square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(module.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    gradient = torch.func.grad(lambda t: eager(t).square().sum())(x)
    given = x.clone().requires_grad_()
    copy.deepcopy(eager)(given).square().sum().backward()
    torch.testing.assert_close(gradient, given.grad)


@pytest.mark.parametrize("name", NEW)
def test_nothing_waits_for_the_device(name):
    """A value of a meta tensor cannot be read: once it has its scale, a quantizer computes on such tensors too."""
    shape = (6, 8) if RULES[name].weights else None
    quantizer = made(name, shape)
    quantizer(torch.randn(6, 8))
    ready = copy.deepcopy(quantizer).to("meta")
    x = torch.empty(6, 8, device="meta", requires_grad=True)
    for mode in (True, False):
        y = ready.train(mode)(x)
        assert y.is_meta
        y.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "lsq+", "symmetric": True}, 'symmetric: got True with quantizer="lsq+"; accepted: False'),
        ({"quantizer": "pact", "symmetric": True}, 'symmetric: got True with quantizer="pact"; accepted: False'),
        ({"quantizer": "po2", "symmetric": False}, 'symmetric: got False with quantizer="po2"; accepted: True'),
        ({"quantizer": "pact", "shape": (4, 4)}, 'quantizer: got "pact" for a weight; accepted: lsq, minmax'),
        ({"quantizer": "dorefa"}, 'quantizer: got "dorefa" for an input (no shape); accepted: lsq, minmax'),
        ({"quantizer": "kmeans"}, 'quantizer: got "kmeans" for an input'),
        ({"quantizer": "ternary", "bits": 2}, 'quantizer: got "ternary" for an input'),
        ({"quantizer": "nf4"}, 'bits: got 8 with quantizer="nf4"; accepted: 4'),
        ({"quantizer": "ternary", "bits": 3}, 'bits: got 3 with quantizer="ternary"; accepted: 2'),
        ({"quantizer": "apot", "bits": 2}, 'bits: got 2 with quantizer="apot"; accepted: 3 to 8'),
        ({"quantizer": "apot", "bits": 9}, "bits: got 9; accepted: 2 to 8"),
        (
            {"quantizer": "pact", "straight_through": "lsq"},
            "straight_through: got 'lsq' with quantizer=\"pact\"; accepted: 'pact'",
        ),
        (
            {"quantizer": "ewgs", "straight_through": "clip"},
            "straight_through: got 'clip' with quantizer=\"ewgs\"; accepted: 'ewgs'",
        ),
        (
            {"quantizer": "midrise", "straight_through": "pass"},
            "straight_through: got 'pass' with quantizer=\"midrise\"; accepted: 'clip'",
        ),
        ({"quantizer": "po2", "granularity": PerToken()}, "granularity: got PerToken"),
        ({"quantizer": "po2", "granularity": PerChannel()}, "shape: got None with granularity=PerChannel"),
        ({"quantizer": "nf5"}, "quantizer: got 'nf5'; accepted: lsq, minmax, ema, dynamic"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        FakeQuantize(**options)
    assert message in str(error.value)
    if not {"shape", "granularity"} & options.keys() and "for an input" not in message:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            qk.QSpec(**options)
        assert message in str(error.value)


def test_specs():
    for name in QUANTIZERS:
        spec = qk.QSpec(width(name), quantizer=name)
        assert spec.symmetric is (name not in ("lsq+", "pact"))
        assert eval(repr(spec), {"QSpec": qk.QSpec}) == spec
    assert qk.QSpec(symmetric=False).symmetric is False
    with pytest.raises(ValueError, match=r"quantizer: got 'kmean'.*did you mean 'kmeans'"):
        qk.QSpec(quantizer="kmean")
    with pytest.raises(TypeError, match="symmetric: got 1, a int; accepted: True, False, None"):
        qk.QSpec(symmetric=1)
    for weight, input, message in (("pact", "lsq", "for a weight"), ("lsq", "dorefa", "for an input")):
        with pytest.raises(ValueError, match=f"config, layer 'hidden'.*: quantizer: got .* {message}"):
            qk.prepare(Tiny(), qk.QConfig(qk.QSpec(quantizer=weight), qk.QSpec(quantizer=input)))


def test_one_class_is_what_users_construct():
    names = list(inspect.signature(FakeQuantize).parameters)
    assert names[:4] == ["bits", "granularity", "symmetric", "quantizer"]

    class Own(FakeQuantize):
        pass

    assert type(Own()) is Own
    with pytest.raises(ValueError, match='quantizer: got "nf4" in Own; accepted: FakeQuantize itself'):
        Own(quantizer="nf4", bits=4)


def test_a_state_of_other_levels_is_refused():
    names = ("minmax", "nf4", "apot", "po2", "midrise", "kmeans", "stochastic")  # po2 and apot have 15 levels each
    states = {name: made(name, (4, 8)).state_dict() for name in names}
    for name, state in states.items():
        for other in {*states} - {name, "kmeans"}:
            with pytest.raises(RuntimeError, match=r"levels: got 1[56] levels of another|Unexpected key|Missing key"):
                made(other, (4, 8)).load_state_dict(state)
    with pytest.raises(RuntimeError, match="bits: got a state of 4 bits; accepted: 8, the width of this quantizer"):
        made("apot", (4, 8), 8).load_state_dict(states["apot"])


@pytest.mark.parametrize("name", [name for name in NEW if RULES[name].weights])
def test_symbolic_trace(name):
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    quantizer = made(name, x.shape)
    quantizer(x)
    quantizer.eval()
    traced = torch.fx.symbolic_trace(nn.Sequential(quantizer))
    assert torch.equal(traced(x), quantizer(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_a_result_may_be_written_in_place(name, symmetric, training):
    """As that of any function of torch: in a forward with ``y += x`` a quantizer stands behind the first y."""
    if symmetric not in RULES[name].symmetric:
        pytest.skip("RULES says so")
    quantizer = made(name, symmetric=symmetric)
    x = torch.randn(4, 16, requires_grad=True)
    quantizer(x)
    quantizer.train(training)
    apart = copy.deepcopy(quantizer)
    y = quantizer(x * 1)
    y += x
    expected = apart(x * 1) + x
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
