"""Int8LSTM, Int8GRU and Int8RNN: equal to the prepared layers they are made of, in every option; their state."""

import copy
import pickle
import warnings

import pytest
import torch
from recurrent_models import leaves, packed
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk
from qkernels.nn import (
    QATLSTM,
    FakeQuantize,
    Int8GRU,
    Int8Linear,
    Int8LSTM,
    Int8RNN,
    PerGroup,
    PerToken,
    recurrent_kernel,
)
from qkernels.qat import QConfig, QSpec
from qkernels.qat.selection import no_integers


class Calls(TorchDispatchMode):
    """The ops of qkernels that are called."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qkernels":
            self.ops.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


LAYERS = {nn.LSTM: Int8LSTM, nn.GRU: Int8GRU, nn.RNN: Int8RNN}
DYNAMIC = QSpec(quantizer="dynamic")
PER_TOKEN = QSpec(8, PerToken(), quantizer="dynamic")
WHOLE_ROWS = QSpec(8, quantizer="minmax")
GEOMETRIES = (
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    {"num_layers": 3, "dropout": 0.5, "bidirectional": True},
)
CONFIGS = {  # what is quantized besides the weights
    "default": (QConfig(), {}),
    "weights": (QConfig(input=None), {}),
    "weights-groups": (QConfig(QSpec(8, PerGroup(4), symmetric=False), None), {}),
    "hidden": (QConfig(), {"hidden": {}}),
    "hidden-4": (QConfig(QSpec(4)), {"hidden": QSpec(4, symmetric=False), "output": {"bits": 6}}),
    "hidden-only": (QConfig(input=None), {"hidden": QSpec(symmetric=False)}),
    "tokens": (QConfig(QSpec(5), PER_TOKEN), {"hidden": PER_TOKEN}),
    "dynamic": (QConfig(WHOLE_ROWS, DYNAMIC), {"hidden": QSpec(7, symmetric=False, quantizer="dynamic")}),
}
OTHERS = {
    "minmax": (QConfig(input=QSpec(symmetric=False, quantizer="minmax")), {"hidden": QSpec(quantizer="minmax")}),
    "cell": (QConfig(), {"hidden": {}, "cell": {}}),
    "cell-only": (QConfig(), {"cell": QSpec(6, symmetric=False)}),
}


def prepared_and_converted(layer, config="hidden", scale=1.0):
    base, rule = {**CONFIGS, **OTHERS}[config]
    model = nn.Sequential(layer)
    made = qk.prepare(model, QConfig(base.weight, base.input, rules=[("0", rule)] if rule else ()))
    width, dtype = layer.input_size, layer.weight_ih_l0.dtype
    sequences = [scale * torch.randn(length, width, dtype=dtype) for length in (9, 7, 3)]
    qk.calibrate(made, [pack_sequence(sequences, enforce_sorted=False)])
    return made.eval()[0], qk.convert(made)[0]


def inputs(layer, dtype=torch.float32):
    """Every form of sequences and states that torch's layers take: (input, hx)."""
    x = torch.randn(*((3, 4) if layer.batch_first else (4, 3)), layer.input_size, dtype=dtype)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 2 if layer.mode == "LSTM" else 1]
    states = [torch.rand(count, 3, width, dtype=dtype) - 0.5 for width in widths]

    def hx(single=False):
        chosen = tuple(state[:, 0] if single else state for state in states)
        return chosen if layer.mode == "LSTM" else chosen[0]

    batch_first = torch.arange(12 * layer.input_size).view(3, 4, -1).cos().to(dtype)
    yield x, None
    yield x, hx()
    yield x[0], hx(single=True)
    yield packed(batch_first, [2, 4, 1]), None
    yield packed(batch_first, [2, 4, 1]), hx()
    yield x[:0] if layer.batch_first else x[:, :0], None
    strided = torch.randn(*x.shape[:2], 2 * layer.input_size, dtype=dtype)[..., ::2]
    yield strided, hx()


def assert_same(converted, prepared, cases, tolerance=1e-5, flips=0.0):
    """``flips``: how far results may be apart where a state near a tie got another code; most are not."""
    for input, hx in cases:
        with torch.no_grad():
            wanted, made = leaves(prepared(input, hx)), leaves(converted(input, hx))
        for one, other in zip(made, wanted, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=tolerance, atol=max(tolerance, flips))
            assert not one.numel() or float((one - other).abs().float().quantile(0.5)) <= tolerance


def assert_equal(converted, prepared, layer, config="hidden"):
    """In fp32, where a code may flip at a near tie, and in fp64, where that does not happen."""
    assert_same(converted, prepared, inputs(layer), flips=0.03 if config == "hidden-4" else 2e-3)
    assert_same(converted, copy.deepcopy(prepared).double(), inputs(layer, torch.float64), 1e-9)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_last_states_are_tensors_of_their_own(kind):
    """Truncated backpropagation detaches them in place, which no view allows."""
    prepared, converted = prepared_and_converted(kind(12, 20), "hidden")
    for model in (prepared, converted):
        _, states = model(torch.randn(3, 2, 12))
        for state in states if kind is nn.LSTM else [states]:
            state.detach_()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_prepared_layer(kind, geometry, config):
    torch.manual_seed(0)
    layer = kind(12, 20, **geometry)
    prepared, converted = prepared_and_converted(layer, config)
    assert type(converted) is LAYERS[kind]
    assert all(isinstance(part, Int8Linear) for part in converted.parts.values())
    assert_equal(converted, prepared, layer, config)


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (lambda: nn.LSTM(12, 20, 2, bidirectional=True), "cell"),
        (lambda: nn.LSTM(12, 20), "cell-only"),
        (lambda: nn.LSTM(12, 20, 2, proj_size=8, bidirectional=True), "hidden"),
        (lambda: nn.LSTM(12, 20, proj_size=8), "default"),
        (lambda: nn.LSTM(12, 20, 2, proj_size=8, batch_first=True), "cell"),
        (lambda: nn.RNN(12, 20, 2, nonlinearity="relu"), "hidden"),
        (lambda: nn.LSTM(1, 1), "hidden"),
        (lambda: nn.GRU(33, 31, 2), "hidden"),
        (lambda: nn.LSTM(64, 96, bidirectional=True), "hidden"),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_cells_and_odd_sizes(layer, config):
    torch.manual_seed(0)
    layer = layer()
    prepared, converted = prepared_and_converted(layer, config)
    assert_equal(converted, prepared, layer)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(kind, dtype):
    """In half precision a prepared layer rounds each gate and state; the converted one rounds its results alone."""
    torch.manual_seed(0)
    layer = kind(12, 20, 2)
    prepared, converted = prepared_and_converted(layer)
    tolerance = {torch.bfloat16: 4e-2, torch.float16: 2e-2}[dtype]
    assert_same(converted, copy.deepcopy(prepared).to(dtype), inputs(layer, dtype), tolerance)
    cast = copy.deepcopy(converted).to(dtype)
    assert cast.weight_hh_l1.dtype == dtype
    assert cast.hh_l1.scale.dtype == torch.float32
    x = torch.randn(4, 3, 12)
    torch.testing.assert_close(cast(x.to(dtype))[0].float(), converted(x)[0], rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = converted(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), converted(x)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("config", ["minmax", "tokens", "weights"])
def test_gradients(kind, config):
    """Of inputs, first states and biases, as through the prepared layer; the weights are frozen."""
    torch.manual_seed(0)
    layer = kind(12, 20, 2, bidirectional=True)
    prepared, converted = prepared_and_converted(layer, config, scale=4.0)
    x, states = torch.randn(4, 3, 12), [torch.rand(4, 3, 20) - 0.5 for _ in range(2 if kind is nn.LSTM else 1)]
    grads = []
    for module in (prepared, converted):
        x_, hx = x.clone().requires_grad_(), [s.clone().requires_grad_() for s in states]
        results = leaves(module(x_, tuple(hx) if kind is nn.LSTM else hx[0]))
        sum((y * y.detach().cos()).sum() for y in results).backward()
        biases = [getattr(module, name).grad for names in layer._all_weights for name in names if "bias" in name]
        grads.append([x_.grad, *(s.grad for s in hx), *biases])
    for wanted, made in zip(*grads, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_how_often_codes_flip():
    """A state that differs in its last bits may get another code near a tie, and the steps go on from there."""
    torch.manual_seed(0)
    layer = nn.LSTM(64, 128, 2)
    prepared, converted = prepared_and_converted(layer)
    x = torch.randn(60, 8, 64)
    with torch.no_grad():
        wanted, made = prepared(x)[0], converted(x)[0]
    apart = (made - wanted).abs()
    assert float((apart > 1e-6).float().mean()) < 0.2
    assert float(apart.max()) < 2e-3
    assert float(apart[0].max()) < 1e-6


@pytest.mark.parametrize("kind", LAYERS)
def test_pieces(kind, monkeypatch):
    """A long sequence goes through the ops a few steps at a time, in the order in which its direction runs."""
    torch.manual_seed(0)
    layer = kind(12, 20, 2, bidirectional=True)
    _, converted = prepared_and_converted(layer)
    cases = list(inputs(layer))
    with torch.no_grad():
        whole = [leaves(converted(*case)) for case in cases]
        for size in (1, 1600):
            monkeypatch.setattr(recurrent_kernel, "PIECE_BYTES", size)
            for case, wanted in zip(cases, whole, strict=True):
                for one, other in zip(leaves(converted(*case)), wanted, strict=True):
                    assert torch.equal(one, other)


@pytest.mark.parametrize("config", ["default", "hidden"])
def test_compiles_whole(config):
    """torch's own recurrent layers break the graph."""
    torch.manual_seed(0)
    _, converted = prepared_and_converted(nn.LSTM(12, 20, 2, bidirectional=True), config)
    x = torch.randn(4, 3, 12)
    with torch.no_grad():
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        for one, wanted in zip(leaves(compiled(x)), leaves(converted(x)), strict=True):
            assert torch.equal(one, wanted)
        program = torch.export.export(nn.Sequential(converted), (x,))
        for one, wanted in zip(leaves(program.module()(x)), leaves(converted(x)), strict=True):
            assert torch.equal(one, wanted)


def test_which_kernel_runs():
    """By the op where it takes a layer, gradients or not; by torch's ops elsewhere."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12)
    for layer, config, by_op in (
        (nn.LSTM(12, 20), "default", True),
        (nn.GRU(12, 20), "tokens", True),
        (nn.LSTM(12, 20), "cell", True),
        (nn.LSTM(12, 20), "dynamic", False),
        (nn.LSTM(12, 20), "weights-groups", False),
        (nn.LSTM(12, 20, proj_size=4), "hidden", False),
    ):
        _, converted = prepared_and_converted(layer, config)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), Calls() as calls:
                converted(x)
            assert ("int8_recurrent" in calls.ops) == by_op


def test_life():
    torch.manual_seed(0)
    source = nn.Sequential(nn.LSTM(12, 20, 2, bidirectional=True, proj_size=4))
    source[0].note = "kept"
    seen = []
    source[0].register_forward_hook(lambda module, args, result: seen.append(type(module)))
    config = QConfig(rules=[("0", {"hidden": {}, "cell": {}, "output": {}})])
    prepared = qk.prepare(source, config)
    x = torch.randn(5, 3, 12)
    qk.calibrate(prepared, [x])
    converted = qk.convert(prepared)
    layer = converted[0]
    assert layer.note == "kept"
    y = converted(x)[0]
    assert seen[-1] is Int8LSTM
    for names in source[0]._all_weights:
        for name in names:
            if name.startswith("weight"):
                wanted = prepared[0].quantizer_of(name)(getattr(prepared[0], name))
                torch.testing.assert_close(getattr(layer, name), wanted)
            else:
                assert torch.equal(getattr(layer, name), getattr(source[0], name))
    layer.flatten_parameters()
    state = converted.state_dict()
    assert {"0.ih_l0.codes", "0.hh_l1_reverse.scale", "0.hr_l1.codes", "0.hh_l0.input_scale"} <= set(state)
    weights = sum(t.numel() for t in state.values() if t.dim() > 1)
    assert weights == sum(p.numel() for p in source.parameters() if p.dim() > 1)
    assert all(t.dtype == torch.int8 for t in state.values() if t.dim() > 1)
    again = qk.prepare(nn.Sequential(nn.LSTM(12, 20, 2, bidirectional=True, proj_size=4)), config)
    qk.calibrate(again, [2 * x])
    again = qk.convert(again)
    assert not torch.equal(again(x)[0], y)
    with pytest.raises(RuntimeError, match=r"hh_l1\.codes: got torch\.int8 of shape"):
        again.load_state_dict({**state, "0.hh_l1.codes": state["0.hh_l1.codes"][1:]})
    again.load_state_dict(state)
    source[0]._forward_hooks.clear()
    layer._forward_hooks.clear()
    for same in (again, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(same(x)[0], y)
    assert str(layer).startswith("Int8LSTM(\n  12, 20, num_layers=2, bidirectional=True, proj_size=4\n")
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), layer))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert torch.equal(traced(x)[0], layer(x.relu())[0])
    converted.train()
    assert converted(x)[0].shape == y.shape


def test_report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRU(12, 20, 2))
    prepared = qk.prepare(model, QConfig(rules=[("0", {"hidden": {}})]))
    x = torch.randn(5, 3, 12)
    qk.calibrate(prepared, [x])
    before = qk.report(prepared, x, float_model=model)
    after = qk.report(qk.convert(prepared), x, float_model=model)
    assert (before.notes, after.notes) == ({}, {})
    (row,), (wanted,) = after.layers, before.layers
    assert (row.kind, row.weight_bits, row.input_bits) == ("Int8GRU", 8, 8)
    assert (row.float_bytes, row.quantized_bytes) == (wanted.float_bytes, wanted.quantized_bytes)
    assert after.ratio > 2
    assert row.weight_sqnr == pytest.approx(wanted.weight_sqnr)
    assert row.output_sqnr == pytest.approx(wanted.output_sqnr, abs=1)


def test_exact_is_the_converted_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRU(12, 20, 2))
    prepared = qk.prepare(model, QConfig(rules=[("0", {"hidden": {}})]))
    x = torch.randn(5, 3, 12)
    qk.calibrate(prepared, [x])
    assert torch.equal(qk.exact(prepared)(x)[0], qk.convert(prepared)(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("act_bits", [8, 16])
def test_from_float(kind, act_bits):
    torch.manual_seed(0)
    layer = kind(32, 48, 2, bidirectional=True)
    made = LAYERS[kind].from_float(layer, act_bits=act_bits)
    x = torch.randn(6, 4, 32)
    for one, wanted in zip(leaves(made(x)), leaves(layer(x)), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=0.03)
    with pytest.raises(TypeError, match=f"layer: got Linear; accepted: {kind.__name__}"):
        LAYERS[kind].from_float(nn.Linear(2, 2))
    with torch.no_grad():
        layer.weight_hh_l1[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight: got NaN"):
        LAYERS[kind].from_float(layer)


def test_refusals():
    layer = Int8LSTM.from_float(nn.LSTM(12, 20, 2))
    x, h = torch.randn(4, 3, 12), torch.zeros(2, 3, 20)
    for input, hx, message in (
        (x[..., :5], None, "input: got 5 features; accepted: 12"),
        (x[None], None, "input: got 4 dims; accepted: 2"),
        (x.long(), None, "input: got torch.int64; accepted: a floating dtype"),
        (x, (h,), "hx: got 1 tensors; accepted: 2"),
        (x, (h, h[:1]), r"hx: got c_0 of shape \[1, 3, 20\]; accepted: \[2, 3, 20\]"),
        (x[0], (h, h), r"hx: got h_0 of shape \[2, 1, 3, 20\]"),
        (x[:0], None, "input: got a sequence without steps; accepted: at least one"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            layer(input, hx)


class Own(nn.LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return 2 * output, states


@pytest.mark.parametrize(
    ("kind", "weight", "rule", "reason"),
    [
        (Own, {}, {}, "its forward is its own"),
        (nn.LSTM, {"quantizer": "nf4", "bits": 4}, {}, 'the values of "nf4" are no integers times a scale'),
        (nn.LSTM, {}, {"hidden": {"quantizer": "po2", "bits": 4}}, 'quantizer "po2" are no integers times a scale'),
        (nn.LSTM, {"symmetric": False}, {}, "its weight_ih_l0 is quantized with a zero point"),
        (nn.LSTM, {"granularity": PerGroup(4)}, {}, r"its weight_ih_l0 has PerGroup\(size=4\)"),
    ],
)
def test_what_stays_in_float(kind, weight, rule, reason):
    torch.manual_seed(0)
    model = nn.Sequential(kind(12, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = qk.prepare(model, QConfig(rules=[("0", {"weight": weight, **rule})]))
    x = torch.randn(5, 3, 12)
    qk.calibrate(prepared, [x])
    converted = qk.convert(prepared)
    assert not isinstance(converted[0], Int8LSTM)
    torch.testing.assert_close(converted(x)[0], prepared.eval()(x)[0], rtol=1e-5, atol=1e-5)
    assert reason.replace("\\", "") in qk.report(converted).notes["0"]


def test_a_weight_in_float():
    layer = QATLSTM.from_float(nn.LSTM(12, 20), weight_ih_l0=FakeQuantize(shape=(80, 12)))
    assert no_integers(layer) == "its weight_hh_l0 is not quantized"


def test_a_list_with_the_rows_of_the_states_stands_for_every_step():
    """AOTInductor cannot hand an empty list to an op."""
    from qkernels.ops.int8_recurrent import int8_recurrent_op

    codes = torch.randint(-127, 128, (20, 20), dtype=torch.int8)
    weight = qk.PackedInt8.from_quantized(codes, torch.full((20,), 1e-3))
    gates, states = torch.randn(6, 20), torch.rand(1, 3, 20)
    none = None, None, -128, 127
    rest = "RNN_TANH", weight.data, weight.colsum, weight.scale, None, True, *none, *none, False
    for found, expected in zip(
        int8_recurrent_op(gates, states, [3], *rest), int8_recurrent_op(gates, states, [], *rest), strict=True
    ):
        assert torch.equal(found, expected)
    for sizes in ([2], [3, 2]):
        with pytest.raises(RuntimeError, match="sizes: got a sum of"):
            int8_recurrent_op(gates, states, sizes, *rest)
