"""QATLSTM, QATGRU and QATRNN against formulas in plain torch, step by step, and through a training's life."""

import copy
import pickle

import pytest
import torch
from conftest import lstm_runs_under_autocast
from recurrent_models import CASES, Tagger, build, leaves, packed, rebuilt, reference, rule_for
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.nn import QATGRU, QATLSTM, QATRNN, FakeQuantize, PerToken
from qkernels.nn.quantizer_rules import RULES
from qkernels.qat import QConfig, QSpec

FLOAT_AND_QAT = ((nn.LSTM, QATLSTM), (nn.GRU, QATGRU), (nn.RNN, QATRNN))
STATES = {"hidden": {}, "cell": {}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_formulas(case):
    """Outputs, last states, and the gradients of inputs, first states, parameters, scales and zero points."""
    layer, sequences, states = build(case)
    x = [s.clone().requires_grad_() for s in sequences]
    hx = [s.clone().requires_grad_() for s in states]
    output, last = case.run(layer, x, hx)
    wanted_output, wanted_last, qparams = reference(layer, sequences, states)
    torch.testing.assert_close(output, wanted_output.output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, wanted_last, rtol=1e-9, atol=1e-9)
    weigh = torch.Generator().manual_seed(1)
    factors = [torch.randn(t.shape, generator=weigh, dtype=t.dtype) for t in (*output, *last)]
    sum((t * f).sum() for t, f in zip((*output, *last), factors, strict=True)).backward()
    everything = (*wanted_output.output, *wanted_last)
    sum((t * f).sum() for t, f in zip(everything, factors, strict=True)).backward()
    for ours, theirs in zip((*x, *hx), (*wanted_output.x, *wanted_output.hx), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)
    for name, parameter in layer.named_parameters():
        if "fake_quant" not in name:
            torch.testing.assert_close(parameter.grad, qparams.parameters[name].grad, rtol=1e-7, atol=1e-9, msg=name)
    for name, (scale, zero_point, factor) in qparams.scales.items():
        quantizer = layer.quantizer_of(name)
        if quantizer.quantizer == "minmax":
            continue
        start, steps = quantizer.state_dict()["start"], quantizer.steps
        grad = (2 * factor * scale.grad / (start * steps**0.5)).to(quantizer.log_scale.dtype)
        assert bool(grad.abs().max() > 0), name
        torch.testing.assert_close(quantizer.log_scale.grad, grad, rtol=1e-4, atol=1e-8, msg=name)
        if zero_point is not None:
            grad = (factor * zero_point.grad).to(quantizer.zero_point.dtype)
            torch.testing.assert_close(quantizer.zero_point.grad, grad, rtol=1e-4, atol=1e-8, msg=name)


VARIANTS = (
    {},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True, "bias": False},
    {"num_layers": 3, "dropout": 0.5},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("pair", "options"),
    [(pair, options) for pair in FLOAT_AND_QAT for options in VARIANTS]
    + [(FLOAT_AND_QAT[0], {"proj_size": 3, "num_layers": 2}), (FLOAT_AND_QAT[2], {"nonlinearity": "relu"})],
    ids=lambda value: value[0].__name__ if isinstance(value, tuple) else "-".join(value),
)
def test_without_quantizers_it_is_the_float_layer(pair, options, dtype, monkeypatch):
    """Bit for bit with torch's kernels, dropout's draws too; and to rounding by the loop over steps."""
    torch.manual_seed(0)
    kind, qat = pair
    layer = kind(5, 7, **options, dtype=dtype)
    batch_first = layer.batch_first
    x = torch.randn(*((3, 4) if batch_first else (4, 3)), 5, dtype=dtype)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    hx = [torch.randn(count, 3, width, dtype=dtype) for width in (layer.proj_size or 7, 7)]

    def first_states(single):
        states = [state[:, 0] for state in hx] if single else hx
        return tuple(states) if kind is nn.LSTM else states[0]

    loop = qat.from_float(layer)
    monkeypatch.setattr(loop, "_run_fused", lambda *args: loop._run_steps(*args, [(None, None)] * loop.directions))
    unsorted = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 3, 1]), batch_first, enforce_sorted=False)
    in_order = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    empty = x[:0] if batch_first else x[:, :0]
    for input, single in ((x, False), (x[0], True), (empty, None), (unsorted, False), (in_order, False)):
        for states in (None,) if single is None else (None, first_states(single)):
            made = []
            for module in (layer, qat.from_float(layer), loop):
                torch.manual_seed(1)
                made.append(module(input, states))
            flat = [leaves(result) for result in made]
            for wanted, fused, stepped in zip(*flat, strict=True):
                assert torch.equal(wanted, fused)
                torch.testing.assert_close(stepped, wanted, rtol=tolerance, atol=tolerance)
            assert [t.stride() for t in flat[0]] == [t.stride() for t in flat[1]]
    grads = []
    for module in (layer, loop):
        layer.zero_grad()
        torch.manual_seed(1)
        module(x)[0].square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in layer.parameters()])
    if dtype != torch.bfloat16:
        for wanted, stepped in zip(*grads, strict=True):
            torch.testing.assert_close(stepped, wanted, rtol=10 * tolerance, atol=10 * tolerance)


def test_names():
    """Each layer has a quantizer of its input; each direction has its own for weights, a scale a row, and states."""
    everything = {"hidden": {}, "cell": {}, "output": {}}
    model = nn.Sequential(nn.LSTM(5, 8, 2, bidirectional=True, proj_size=3))
    layer = qk.prepare(model, QConfig(rules=[("0", everything)]))[0]
    parts = [f"l{index}{direction}" for index in (0, 1) for direction in ("", "_reverse")]
    names = [f"weight_{kind}_{part}" for part in parts for kind in ("ih", "hh", "hr")]
    names += ["input", "input_l1", *(f"hidden_{part}" for part in parts), *(f"cell_{part}" for part in parts), "output"]
    assert [name for name, _, _ in layer.own_quantizers()] == names
    assert layer.weight_hh_l0_reverse_fake_quant.scale.shape == (32, 1)
    assert layer.weight_hr_l1_fake_quant.scale.shape == (3, 1)
    default = qk.prepare(nn.Sequential(nn.GRU(5, 8, 2)))[0]
    weights = [f"weight_{kind}_l{index}" for index in (0, 1) for kind in ("ih", "hh")]
    assert [name for name, _, _ in default.own_quantizers()] == [*weights, "input", "input_l1"]
    with pytest.raises(ValueError, match="layer '0': a rule gives 'cell'; accepted for this layer: hidden"):
        qk.prepare(nn.Sequential(nn.GRU(5, 8)), QConfig(rules=[("0", {"cell": {}})]))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"])
@pytest.mark.parametrize("states", [False, True], ids=["default", "states"])
def test_life(kind, states):
    torch.manual_seed(0)
    model = Tagger(kind)
    x, target = torch.randn(6, 4, 5), torch.randint(3, (6, 4))
    config = QConfig(rules=[("rnn", rule_for(kind))] if states else ())
    prepared = qk.prepare(model, config)
    assert prepared.load_state_dict(model.state_dict(), strict=False).unexpected_keys == []
    qk.calibrate(prepared, [x])
    optimizer = torch.optim.Adam(qk.parameter_groups(prepared, 1e-2))
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(prepared(x).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in prepared.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]
    prepared.eval()
    with torch.no_grad():
        y = prepared(x)
    loaded = qk.prepare(model, config)
    loaded.load_state_dict(prepared.state_dict())
    for same in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), loaded.eval()):
        assert type(same.rnn) is type(prepared.rnn)
        assert torch.equal(same(x), y)
    converted = qk.convert(prepared)
    torch.testing.assert_close(converted(x), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(converted)(x), converted(x))
    weight = next(iter(prepared.rnn.quantized_weights()))
    torch.testing.assert_close(getattr(converted.rnn, weight[0]), weight[1](getattr(prepared.rnn, weight[0])))
    row = qk.report(prepared, x, float_model=model).layers[0]
    assert (row.weight_bits, row.input_bits) == (8, 8)
    assert row.weight_sqnr > 40
    assert row.output_sqnr is not None
    assert "rnn" not in qk.report(converted, x, float_model=model).notes
    qk.set_bits(prepared, 3, "rnn.*")
    coarse = (prepared(x) - y).abs().mean()
    qk.set_bits(prepared, 8, "rnn.*")
    assert (prepared(x) - y).abs().mean() < 0.1 * coarse
    qk.enable_fake_quant(prepared, False)
    plain = prepared.rnn.to_float()
    assert type(plain) is type(model.rnn)
    model.load_state_dict({key: prepared.state_dict()[key] for key in model.state_dict()})
    torch.testing.assert_close(prepared(x), model(x))
    copied = copy.deepcopy(plain).double()
    assert copied(torch.randn(2, 5, dtype=torch.float64))[0].dtype == torch.float64


def test_to_float_trains():
    """nn.LSTM keeps lists of its weights, which must be those of the new layer."""
    layer = qk.prepare(nn.Sequential(nn.LSTM(5, 8)))[0]
    layer.flatten_parameters()
    plain = layer.to_float()
    plain.weight_ih_l0 = nn.Parameter(torch.zeros(32, 5))
    assert not torch.equal(layer._flat_weights[0], plain._flat_weights[0])
    assert plain._flat_weights[0] is plain.weight_ih_l0
    source = nn.LSTM(5, 8)
    made = QATLSTM.from_float(source)
    made.weight_ih_l0 = nn.Parameter(torch.zeros(32, 5))
    assert source._flat_weights[0] is source.weight_ih_l0


def test_hidden_state_starts_from_its_bounds():
    """h of tanh lies within (−1, 1); other states need calibration, and say so."""
    x = torch.randn(6, 4, 5)
    for bits in (4, 8):
        spec = {"hidden": {"bits": bits}}
        for layer in (nn.LSTM(5, 8), nn.GRU(5, 8), nn.RNN(5, 8)):
            prepared = qk.prepare(nn.Sequential(layer), QConfig(input=None, rules=[("0", spec)]))
            assert float(prepared[0].hidden_l0_fake_quant.scale) == pytest.approx(1 / (2 ** (bits - 1) - 1))
            prepared.eval()(x)
            qk.calibrate(prepared, [x])
            assert float(prepared[0].hidden_l0_fake_quant.scale) < 1 / (2 ** (bits - 1) - 1)
    for layer, spec in (
        (nn.LSTM(5, 8, proj_size=3), {"hidden": {}}),
        (nn.RNN(5, 8, nonlinearity="relu"), {"hidden": {}}),
        (nn.LSTM(5, 8), {"cell": {"quantizer": "minmax"}}),
    ):
        prepared = qk.prepare(nn.Sequential(layer), QConfig(input=None, rules=[("0", spec)])).eval()
        with pytest.raises(RuntimeError, match=rf"0\.{next(iter(spec))}_l0_fake_quant: this .* has no scale yet"):
            prepared(x)
        qk.calibrate(prepared, [x])
        prepared(x)


def test_first_sequence_sets_a_scale():
    """Without calibration the states of the first sequence in training pass in float; all of them set the range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(5, 8))
    x = torch.randn(6, 4, 5)
    prepared = qk.prepare(model, QConfig(None, None, rules=[("0", {"cell": {}})]))
    output, (_, _) = prepared(x)
    torch.testing.assert_close(output, model(x)[0])
    cells = [torch.zeros(4, 8)] + [model(x[:count])[1][1][0] for count in range(1, 6)]
    largest = float(torch.stack(cells).detach().abs().max())
    assert float(prepared[0].cell_l0_fake_quant.scale) == pytest.approx(largest / 127)
    assert not torch.equal(prepared(x)[0], output)


@pytest.mark.parametrize("bits", [4, 8])
def test_ranges_move_once_a_sequence(bits):
    """By the values of all steps; steps behind the end of a shorter sequence are none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(5, 8))
    sequences = [4 * torch.randn(length, 5) for length in (6, 2, 3)]
    config = QConfig(None, None, rules=[("0", {"cell": {"bits": bits}})])
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, [(pack_sequence([0.02 * s for s in sequences], enforce_sorted=False),)])
    seen: list[torch.Tensor] = []
    still = copy.deepcopy(prepared)
    qk.freeze_observers(still)
    quantize = still[0].cell_l0_fake_quant
    for s in sequences:
        h = c = torch.zeros(1, 8)
        for row in s:
            seen.append(c)
            h, c = torch.lstm_cell(row[None], (h, quantize(c)), *still[0]._flat_weights)
    values = torch.cat(seen).detach()
    quantizer = prepared[0].cell_l0_fake_quant
    before, magnitude = float(quantizer.scale), float(quantizer.state_dict()["magnitude"])
    if bits == 8:
        wanted = before + 0.1 * (float(values.abs().max()) / 127 - before)
    else:
        wanted = before * (1 + 0.1 * (float(values.abs().mean()) / magnitude - 1.5))
    output = prepared(pack_sequence(sequences, enforce_sorted=False))[0]
    assert torch.equal(output.data, still(pack_sequence(sequences, enforce_sorted=False))[0].data)
    output.data.sum().backward()
    assert wanted > 1.01 * before
    assert float(quantizer.scale) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("calibrated", [True, False])
def test_checkpointing_repeats_the_steps(calibrated):
    """With the scales from before the last step moved them, or without a scale if there was none."""
    torch.manual_seed(0)
    rule = {"hidden": QSpec(symmetric=False), "cell": QSpec(4)}
    prepared = qk.prepare(nn.Sequential(nn.LSTM(5, 8)), QConfig(None, None, rules=[("0", rule)]))
    if calibrated:
        qk.calibrate(prepared, [torch.zeros(6, 4, 5)])
    x, results = (3 * torch.randn(6, 4, 5)).requires_grad_(), []
    before = copy.deepcopy(prepared.state_dict())
    for checkpointed in (False, True):
        model = copy.deepcopy(prepared)
        y = checkpoint(model, x, use_reentrant=False)[0] if checkpointed else model(x)[0]
        y.sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((model.state_dict(), grads, y.detach()))
    (plain, plain_grads, y), (again, grads, same) = results
    assert torch.equal(y, same)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert not torch.equal(plain["0.cell_l0_fake_quant.scale"], before["0.cell_l0_fake_quant.scale"])
    for name, grad in plain_grads.items():
        assert grad is grads[name] is None or torch.equal(grad, grads[name]), name
    if calibrated:
        assert not torch.equal(plain["0.hidden_l0_fake_quant.zero_point"], before["0.hidden_l0_fake_quant.zero_point"])
        assert all(grad is not None for grad in grads.values())


OF_STATES = [name for name, rule in RULES.items() if rule.inputs and name != "ema"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("quantizer", OF_STATES)
def test_a_step_is_a_forward_pass(quantizer, training):
    """Of every quantizer that a state may have, with the gradients, while its range stands still."""
    torch.manual_seed(0)
    module = FakeQuantize(bits=4, quantizer=quantizer).train()
    module(torch.randn(64, 8))
    module.disable_observer()
    module.train(training)
    x, results = 1.5 * torch.randn(3, 4, 8), []
    for steps in (False, True):
        module.zero_grad()
        values = x.clone().requires_grad_()
        if "offset" in dict(module.named_buffers()):
            module.offset.fill_(5)
        if steps:
            quantize, finish = module.for_steps(values[0])
            assert finish is None
        else:
            quantize = module
        y = torch.stack([quantize(step) for step in values])
        (y * x.cos()).sum().backward()
        results.append([y.detach(), values.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    for wanted, stepped in zip(*results, strict=True):
        torch.testing.assert_close(stepped, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(results[0][0], x)


@pytest.mark.parametrize("kind", ["hidden", "cell"])
@pytest.mark.parametrize("layer", [nn.LSTM(5, 8), nn.LSTMCell(5, 8)])
def test_averages_of_states_are_refused(layer, kind):
    model = nn.Sequential(layer)
    spec = {kind: {"quantizer": "ema"}}
    with pytest.raises(ValueError, match=rf'0\.{kind}_?\w*: got quantizer="ema", whose averages .*; accepted: lsq'):
        qk.prepare(model, QConfig(rules=[("0", spec)]))
    assert type(model[0]) is type(layer)
    name = kind if isinstance(layer, nn.LSTMCell) else f"{kind}_l0"
    made = qk.nn.QATLSTMCell if isinstance(layer, nn.LSTMCell) else QATLSTM
    with pytest.raises(ValueError, match=f"{name}: got quantizer"):
        made.from_float(layer, **{name: FakeQuantize(quantizer="ema")})


@pytest.mark.parametrize("granularity", [None, PerToken()], ids=["tensor", "token"])
def test_dynamic_states(granularity):
    torch.manual_seed(0)
    spec = QSpec(5, granularity, quantizer="dynamic")
    layer = qk.prepare(nn.Sequential(nn.GRU(5, 8)), QConfig(None, None, rules=[("0", {"hidden": spec})]))[0].double()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    h, outputs = torch.zeros(3, 8, dtype=torch.float64), []
    for row in x:
        largest = h.abs().amax(1, keepdim=True) if granularity else h.abs().max()
        scale = (largest.float() / 15).double().clamp(min=1e-38)
        read = (h / scale).round() * scale
        r, z, n = (row @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(3, 1)
        hr, hz, hn = (read @ layer.weight_hh_l0.T + layer.bias_hh_l0).chunk(3, 1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        h = (1 - z) * (n + r * hn).tanh() + z * h
        outputs.append(h)
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs), rtol=1e-6, atol=1e-6)


class Doubled(nn.LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return 2 * output, states


class Own(nn.GRU):
    def forward(self, input, hx=None):
        return input @ self.weight_ih_l0.T


def test_subclasses():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5)
    model = nn.Sequential(Doubled(5, 8))
    prepared = qk.prepare(model, QConfig(rules=[("0", STATES)]))
    qk.calibrate(prepared, [x])
    plain = nn.LSTM(5, 8)
    plain.load_state_dict(model[0].state_dict())
    same = qk.prepare(nn.Sequential(plain), QConfig(rules=[("0", STATES)]))
    qk.calibrate(same, [x])
    assert torch.equal(prepared(x)[0], 2 * same(x)[0])
    assert isinstance(prepared[0], Doubled)
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(again(x)[0], prepared(x)[0])
    assert type(prepared[0].to_float()) is Doubled
    with pytest.warns(UserWarning, match="0 .*the forward of Own does not call that of GRU"):
        qk.prepare(nn.Sequential(Own(5, 8), nn.Linear(8, 2)))


@pytest.mark.parametrize("states", [False, True])
def test_weight_norm(states):
    """The quantizer gets what the parametrization computes; torch's list of weights holds it with its graph."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5)
    model = nn.Sequential(parametrizations.weight_norm(nn.LSTM(5, 8), "weight_hh_l0"))
    model(x)[0].sum().backward()
    prepared = qk.prepare(model, QConfig(rules=[("0", STATES)] if states else ()))
    qk.calibrate(prepared, [x])
    assert torch.equal(copy.deepcopy(prepared.float())(x)[0], prepared(x)[0])
    prepared(x)[0].sum().backward()
    assert bool(prepared[0].parametrizations.weight_hh_l0.original0.grad.abs().max() > 0)
    with torch.no_grad():
        prepared[0].parametrizations.weight_hh_l0.original0 *= 1.5
    wanted = prepared.eval()(x)[0]
    torch.testing.assert_close(qk.convert(prepared)(x)[0], wanted, rtol=1e-5, atol=1e-6)
    plain = nn.LSTM(5, 8)
    plain.load_state_dict({name: getattr(prepared[0], name).detach() for name in plain.state_dict()})
    same = qk.prepare(nn.Sequential(plain), QConfig(rules=[("0", STATES)] if states else ()))
    qk.calibrate(same, [x])
    state = {k: v for k, v in prepared.state_dict().items() if "fake_quant" in k}
    same.load_state_dict({**state, **{f"0.{k}": v for k, v in plain.state_dict().items()}})
    torch.testing.assert_close(same.eval()(x)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rules", [(), [("0", STATES)]], ids=["default", "states"])
def test_in_training_loops(rules):
    """Activation checkpointing, functional_call, autocast, bf16, torch.compile."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5)
    prepared = qk.prepare(nn.Sequential(nn.LSTM(5, 8, 2, dropout=0.3)), QConfig(rules=rules))
    qk.calibrate(prepared, [x])
    qk.freeze_observers(prepared)
    grads = []
    for run in (prepared, lambda x: checkpoint(prepared, x, use_reentrant=False)):
        prepared.zero_grad()
        torch.manual_seed(1)
        run(x)[0].sum().backward()
        grads.append([parameter.grad.clone() for parameter in prepared.parameters()])
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
    prepared.eval()
    wanted = prepared(x)[0]
    parameters = {name: parameter.clone() for name, parameter in prepared.named_parameters()}
    assert torch.equal(functional_call(prepared, parameters, (x,))[0], wanted)
    parameters["0.weight_hh_l1"] = torch.zeros(32, 8)
    changed = functional_call(prepared, parameters, (x,))[0]
    assert not torch.equal(changed, wanted)
    compiled = torch.compile(prepared, backend="eager")(x)[0]
    torch.testing.assert_close(compiled, wanted)
    if lstm_runs_under_autocast(torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            cast = prepared(x)[0]
        cast.float().sum().backward()
        torch.testing.assert_close(cast.float(), wanted, rtol=0, atol=0.05)
    low = copy.deepcopy(prepared).bfloat16()(x.bfloat16())[0]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["lstm_cell", "gru_cell", "rnn_cell"])
def test_cells_compile_as_one_graph(kind):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    prepared = qk.prepare(Tagger(kind), QConfig(rules=[("rnn", rule_for(kind))]))
    qk.calibrate(prepared, [x])
    qk.freeze_observers(prepared)
    grads = []
    for run in (prepared, torch.compile(prepared, backend="aot_eager", fullgraph=True)):
        prepared.zero_grad()
        run(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in prepared.parameters()])
    for wanted, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, wanted, rtol=1e-4, atol=1e-5)


def test_reset_parameters_leaves_quantizers():
    prepared = qk.prepare(nn.Sequential(nn.LSTM(5, 8), nn.GRUCell(5, 8)), QConfig())
    for layer in prepared:
        before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        layer.reset_parameters()
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, before[name]) == ("fake_quant" in name)
            assert bool(parameter.abs().max() <= 8**-0.5) or "fake_quant" in name


def test_wrong_input():
    layer = QATLSTM.from_float(nn.LSTM(5, 8), hidden_l0=FakeQuantize())
    for module in (layer, QATLSTM.from_float(nn.LSTM(5, 8))):
        with pytest.raises(ValueError, match="input: got 4 dims; accepted: 2"):
            module(torch.randn(1, 2, 3, 5))
        with pytest.raises(RuntimeError, match="input_size"):
            module(torch.randn(2, 3, 6))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 3, 8\)"):
            module(torch.randn(2, 3, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 7)))
        with pytest.raises(ValueError, match="does not match weight dtype"):
            module(torch.randn(2, 3, 5).double())
    with pytest.raises(RuntimeError, match="input: got a sequence without steps; accepted: at least one"):
        layer(torch.randn(0, 3, 5))


def test_padding_is_not_seen():
    x = torch.randn(3, 6, 5)
    x[1, 2:], x[2, 4:] = 100, -100
    prepared = qk.prepare(nn.Sequential(nn.GRU(5, 8, batch_first=True)), QConfig(rules=[("0", {"hidden": {}})]))
    inputs = packed(x, [6, 2, 4])
    qk.calibrate(prepared, [(inputs,)])
    low, high = inputs.data.min(), inputs.data.max()
    assert float(prepared[0].input_fake_quant.scale) == pytest.approx(float(high - low) / 255, rel=1e-4)
    outputs = nn.GRU.forward(prepared[0].to_float(), inputs)[0]
    seen = max(float(row[:-1].detach().abs().max()) for row in rebuilt(outputs) if len(row) > 1)
    assert float(prepared[0].hidden_l0_fake_quant.scale) == pytest.approx(seen / 127, rel=1e-4)
