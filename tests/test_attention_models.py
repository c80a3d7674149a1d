"""Attention in models: what prepare, convert, report and unprepare make of it."""

import copy
import itertools
import pickle

import pytest
import torch
from attention_cases import HEADS, SETTINGS, E, L, N, S, attention, inputs
from converting import assert_converts
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.nn import (
    FakeQuantize,
    Int4Linear,
    Int8Linear,
    IntegerMultiheadAttention,
    PerChannel,
    PerTensor,
    PerToken,
    QATLinear,
    QATMultiheadAttention,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report, unprepare

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


def calls_of(layer: nn.Module) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, FakeQuantize):
            seen = found.setdefault(name.removesuffix("_fake_quant"), [])
            module.register_forward_hook(lambda module, args, y, seen=seen: seen.append(args[0]))
    return found


@pytest.mark.parametrize(
    ("kind", "memory", "expected"),
    [("self", False, (1, 0)), ("query and key", False, (2, 0)), ("memory", False, (2, 0)), ("three", False, (3, 0)),
     ("memory", True, (1, 1)), ("three", True, (1, 2)), ("query and key", True, (1, 1))],
)  # fmt: skip
def test_each_tensor_is_quantized_once(kind, memory, expected):
    layer = attention(torch.float32, add_bias_kv=True)
    rule = {"attention": QSpec(8)} | ({"memory": {"bits": 6}} if memory else {})
    prepared = prepare(layer, QConfig(rules=[(nn.MultiheadAttention, rule)]))
    if memory:  # a rule changes the spec of "input"
        assert (prepared.memory_fake_quant.bits, prepared.memory_fake_quant.symmetric) == (6, False)
    found = calls_of(prepared)
    tensors = inputs(layer, kind)
    prepared(*tensors)
    assert (len(found["input"]), len(found.get("memory", ()))) == expected
    assert len(found["in_proj_weight"]) == len(found["out_proj.weight"]) == len(found["query"]) == 1
    assert found["key"][0].shape == (N, HEADS, tensors[1].shape[1] + 1, E // HEADS)  # with the row of bias_k


def test_memory_has_a_quantizer_only_where_it_is_sure_to_be_used():
    model = nn.Transformer(E, HEADS, 1, 1, 8, 0.0, batch_first=True)
    prepared = prepare(model)
    found = {name for name, m in prepared.named_modules() if getattr(m, "memory_fake_quant", None) is not None}
    assert found == {"decoder.layers.0.multihead_attn"}
    assert prepare(attention(kdim=7)).memory_fake_quant is not None
    assert prepare(attention()).memory_fake_quant is None
    assert prepare(attention(kdim=7), QConfig(rules=[("", {"memory": None})])).memory_fake_quant is None
    assert prepare(attention(kdim=7), QConfig(input=None)).memory_fake_quant is None
    calibrate(prepared, [(torch.randn(N, L, E), torch.randn(N, S, E))])
    prepared.train()(torch.randn(N, L, E), torch.randn(N, S, E)).square().sum().backward()
    assert [name for name, p in prepared.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with pytest.raises(ValueError, match="layer 'linear1': a rule gives 'memory'; accepted for this layer: input, out"):
        prepare(nn.TransformerEncoderLayer(E, HEADS, 8), QConfig(rules=[("linear1", {"memory": {"bits": 4}})]))


def test_out_proj_goes_with_the_attention():
    model = nn.ModuleDict({"attention": attention(torch.float32), "fc": nn.Linear(E, E)})
    left = prepare(model, QConfig(rules=[("*out_proj", None)]))["attention"]
    assert type(left.out_proj) is type(model["attention"].out_proj)
    assert "no rule or default of the config selects it" in report(left).notes["out_proj"]
    x = torch.randn(N, L, E)
    calibrate(left, [dict.fromkeys(("query", "key", "value"), x)])
    assert type(convert(left).out_proj) is type(model["attention"].out_proj)
    with pytest.warns(UserWarning, match=r"attention.out_proj \(MultiheadAttention.forward reads its weight"):
        prepared = prepare(model, QConfig(rules=[("attention", None)]))
    assert type(prepared["attention"]) is nn.MultiheadAttention
    assert type(prepared["attention"].out_proj) is type(model["attention"].out_proj)
    assert "MultiheadAttention.forward reads" in report(prepared).notes["attention.out_proj"]
    output = QConfig(output=QSpec(4), rules=[("attention.out_proj", {"weight": {"bits": 3}})])
    both = prepare(model, output)["attention"]
    assert both.output_fake_quant.bits == 4
    assert both.out_proj.output_fake_quant is None
    assert both.out_proj.weight_fake_quant.bits == 3
    with_own = prepare(model, QConfig(rules=[("attention.out_proj", {"output": QSpec(4)})]))["attention"]
    assert with_own.out_proj.output_fake_quant is not None
    assert with_own.output_fake_quant is None


@pytest.mark.parametrize("weights", [True, False])
def test_eval_mode_does_not_leave_the_quantizers(weights):
    torch.manual_seed(0)
    layer = attention(torch.float32).eval()
    prepared = prepare(layer, QConfig(QSpec(2), QSpec(4)))
    x = inputs(layer, "self")
    calibrate(prepared, [dict(zip(("query", "key", "value"), x, strict=True))])
    qk.freeze_observers(prepared)
    slow = prepared.train()(*x, need_weights=weights)[0].detach()
    with torch.no_grad():
        y, plain = prepared.eval()(*x, need_weights=weights)[0], layer(*x, need_weights=weights)[0]
    torch.testing.assert_close(y, slow)
    assert (y - plain).abs().max() > 0.05


CONFIGS = {
    "int8": QConfig(),
    "int4": QConfig(QSpec(4)),
    "2 bits, zero points": QConfig(QSpec(2, symmetric=False)),
    "one scale": QConfig(QSpec(8, PerTensor())),
    "tokens": QConfig(QSpec(8), QSpec(8, PerToken(), quantizer="dynamic")),
    "dynamic": QConfig(QSpec(4, quantizer="dynamic"), QSpec(8, quantizer="dynamic")),
    "weights of 8 bits": QConfig(QSpec(8, symmetric=False), None),
    "weights of 4 bits": QConfig(QSpec(4), None),
    "operands": QConfig(QSpec(8), QSpec(8), QSpec(8), rules=[(nn.MultiheadAttention, {"attention": QSpec(8)})]),
}


@pytest.mark.parametrize("settings", ["plain", "sequence first", "rows", "dims", "no bias"])
@pytest.mark.parametrize("config", CONFIGS)
def test_it_converts_to_integers(config, settings):
    torch.manual_seed(0)
    layer = nn.ModuleDict({"a": attention(torch.float32, **SETTINGS[settings])})
    kinds = ("three",) if settings == "dims" else ("self", "query and key", "memory", "three")
    prepared = prepare(layer, CONFIGS[config])
    names = ("query", "key", "value")
    attend = prepared["a"]
    calibrate(attend, [dict(zip(names, inputs(layer["a"], kind), strict=True)) for kind in kinds])
    made = convert(prepared)
    assert type(made["a"]) is IntegerMultiheadAttention
    few = CONFIGS[config].weight.bits < 5
    assert {type(part) for part in (*made["a"].projections, made["a"].out_proj)} == {Int4Linear if few else Int8Linear}
    other = convert(prepare_like(layer, CONFIGS[config], names, kinds))
    other.load_state_dict(made.state_dict(), strict=True)
    copies = [made, other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    for kind, weights in itertools.product(kinds, (True, False)):
        x = inputs(layer["a"], kind)
        with torch.no_grad():
            expected = attend.eval()(*x, need_weights=weights)
            results = [copied["a"](*x, need_weights=weights) for copied in copies]
        for got, want in zip(results[0], expected, strict=True):
            if want is not None:  # a code of out_proj's input, or of an operand, may fall on the other side of a tie
                error = (got - want).abs() / expected[0].abs().max()
                assert (error > 1e-5).float().mean() < (0.1 if config != "operands" else 1)
                assert error.max() < 2e-2
        assert all(torch.equal(result[0], results[0][0]) for result in results[1:])


def prepare_like(layer: nn.Module, config: QConfig, names, kinds) -> nn.Module:
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    prepared = prepare(other, config)
    calibrate(prepared["a"], [dict(zip(names, inputs(other["a"], kind), strict=True)) for kind in kinds])
    return prepared


def test_what_the_kernels_do_not_take_is_burnt_in():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(E, HEADS, 8, 0.0, batch_first=True)
    x = torch.randn(N, L, E)
    zero_points = QConfig(QSpec(8, symmetric=False), rules=[("*out_proj", {"weight": QSpec(4)})])
    columns = QConfig(QSpec(8, PerChannel(1)), None, rules=[("*out_proj", {"weight": QSpec(4), "input": QSpec(8)})])
    for config, kind in ((zero_points, QATMultiheadAttention), (columns, QATMultiheadAttention)):
        prepared = prepare(model, config)
        calibrate(prepared, [x])
        assert "converts to float weights" in report(prepared).notes["self_attn"]
        converted = assert_converts(prepared, x, tolerance=1e-3)
        assert type(converted.self_attn) is kind
        assert type(converted.self_attn.out_proj) is Int4Linear
        assert "float weights that hold quantized values: its in_proj_weight" in report(converted).notes["self_attn"]
    columns_alone = prepare(model, QConfig(QSpec(8, PerChannel(1)), None))
    calibrate(columns_alone, [x])
    assert type(assert_converts(columns_alone, x, tolerance=1e-4).self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("bits", [8, 4])
def test_report_of_attention(bits):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)
    x = torch.randn(N, L, 16)
    prepared = prepare(model, QConfig(QSpec(bits)))
    calibrate(prepared, [x])
    converted = convert(prepared)
    rows = []
    for made in (report(prepared, x, float_model=model), report(converted, x, float_model=model), report(converted)):
        assert made.notes == {}
        assert [row.name for row in made.layers] == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
        row = made.layers[0]
        assert (row.weight_bits, row.input_bits) == (bits, 8)
        assert row.float_bytes == 4 * (3 * 16 * 16 + 3 * 16)
        rows.append(row)
    assert rows[0].weight_sqnr == pytest.approx(rows[1].weight_sqnr, abs=1e-3)
    assert rows[0].output_sqnr == pytest.approx(rows[1].output_sqnr, abs=0.1)
    assert rows[0].input_clipped == pytest.approx(rows[1].input_clipped, abs=1e-3)
    assert rows[0].quantized_bytes == rows[1].quantized_bytes == rows[2].quantized_bytes
    assert rows[0].quantized_bytes >= 3 * 16 * 16 * bits // 8


class Twice(nn.MultiheadAttention):
    """Calls the parent's forward."""

    def forward(self, x, **options):
        y, _ = super().forward(x, x, x, need_weights=False, **options)
        return 2 * y


class Named(nn.MultiheadAttention):
    """Has torch's forward."""


class Elsewhere(nn.MultiheadAttention):
    def forward(self, x):
        return nn.functional.linear(x, self.in_proj_weight)


@pytest.mark.parametrize("kind", [Twice, Named])
def test_subclasses(kind):
    torch.manual_seed(0)
    model = kind(E, HEADS, batch_first=True)
    x = torch.randn(N, L, E)
    call = (x,) if kind is Twice else (x, x, x)
    prepared = prepare(model, QConfig(QSpec(4)))
    assert isinstance(prepared, kind)
    calibrate(prepared, [call if kind is Twice else dict(zip(("query", "key", "value"), call, strict=True))])
    plain = attention(torch.float32)
    plain.load_state_dict(model.state_dict())
    expected = prepare(plain, QConfig(QSpec(4)))
    expected.load_state_dict(prepared.state_dict(), strict=True)

    def first(result):
        return result / 2 if kind is Twice else result[0]

    with torch.no_grad():
        y = first(prepared.eval()(*call))
        torch.testing.assert_close(y, expected.eval()(x, x, x)[0])
        assert torch.equal(first(pickle.loads(pickle.dumps(prepared))(*call)), y)
        converted = convert(prepared)
        torch.testing.assert_close(first(converted(*call)), y, rtol=1e-4, atol=1e-4)
    assert isinstance(converted, IntegerMultiheadAttention) == (kind is Named)
    with pytest.raises(ValueError, match="the forward of Elsewhere does not call that of MultiheadAttention"):
        prepare(Elsewhere(E, HEADS))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = attention(torch.float32), nn.Linear(E, E)

    def forward(self, x):
        return self.fc(x @ self.attention.in_proj_weight[:E])


def test_an_attention_whose_weight_is_read_stays_in_float():
    with pytest.warns(UserWarning, match=r"attention \(Reader.forward reads its weight instead"):
        prepared = prepare(Reader())
    assert type(prepared.attention) is nn.MultiheadAttention


class Tied(nn.Module):
    """Two attentions of one Parameter, and a third that is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = attention(torch.float32), attention(torch.float32)
        self.b.in_proj_weight, self.c = self.a.in_proj_weight, self.a

    def forward(self, x):
        for attend in (self.a, self.b, self.c):
            x = attend(x, x, x, need_weights=False)[0]
        return x


def test_tied_attentions_share_their_quantizer_and_their_codes():
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(N, L, E)
    prepared = prepare(model)
    calibrate(prepared, [x])
    assert prepared.a.in_proj_weight_fake_quant is prepared.b.in_proj_weight_fake_quant
    converted = assert_converts(prepared, x, tolerance=1e-2)
    assert converted.c is converted.a
    state = converted.state_dict()
    for name in ("q_proj", "k_proj", "v_proj"):
        codes = [state[f"{attend}.{name}.codes"] for attend in "abc"]
        assert len({t.data_ptr() for t in codes}) == 1
    rows = {row.name: row for row in report(converted).layers}
    assert rows["b"].quantized_bytes < rows["a"].quantized_bytes - 3 * E * E
    other = convert(prepared)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), converted(x))


def small_transformer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(E, HEADS, 8, 0.0, batch_first=True)
    return model, (torch.randn(N, L, E), torch.randn(N, S, E))


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_break(dynamic):
    layer = attention(torch.float32, kdim=7, vdim=7)
    prepared, x = prepare(layer), inputs(layer, "memory")
    calibrate(prepared, [dict(zip(("query", "key", "value"), x, strict=True))])
    compiled = torch.compile(copy.deepcopy(prepared), fullgraph=True, backend="eager")
    mask = {"key_padding_mask": torch.arange(S) >= torch.tensor([[S], [2]])}
    for t in x if dynamic else ():  # the sizes of the mask stay numbers, as when other layers were compiled before
        for dim in range(t.dim()):
            torch._dynamo.maybe_mark_dynamic(t, dim)
    for weights in (True, False):
        torch.testing.assert_close(
            compiled(*x, need_weights=weights, **mask), prepared(*x, need_weights=weights, **mask)
        )


def test_checkpointing_and_copies_and_states():
    model, x = small_transformer()
    prepared = prepare(model, QConfig(QSpec(4)))
    calibrate(prepared, [x])
    qk.freeze_observers(prepared)
    again, leaf = copy.deepcopy(prepared), x[0].clone().requires_grad_()
    prepared(leaf, x[1]).square().sum().backward()
    plain, other = leaf.grad.clone(), x[0].clone().requires_grad_()
    checkpoint(again, other, x[1], use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(other.grad, plain)
    for (name, p), q in zip(prepared.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    assert all(map(torch.equal, again.state_dict().values(), prepared.state_dict().values()))
    fresh = prepare(model, QConfig(QSpec(4)))
    fresh.load_state_dict(prepared.state_dict(), strict=True)
    pickled = pickle.loads(pickle.dumps(prepared))
    for copied in (fresh, pickled):
        assert torch.equal(copied.eval()(*x), prepared.eval()(*x))
    prepared.load_state_dict(model.state_dict(), strict=False)


def test_controls_and_the_way_back():
    model, x = small_transformer()
    prepared = prepare(model)
    calibrate(prepared, [x])
    changed = qk.set_bits(prepared, 3, "*in_proj_weight_fake_quant")
    assert sorted(changed) == ["multihead_attn.in_proj_weight_fake_quant", "self_attn.in_proj_weight_fake_quant"]
    assert_converts(prepared, *x, tolerance=2e-2)
    qk.freeze_observers(prepared)
    torch.testing.assert_close(prepared.train()(10 * x[0], x[1]), prepared.eval()(10 * x[0], x[1]))
    with torch.no_grad():
        back = unprepare(prepared)
        assert {type(m) for m in back.modules()} == {type(m) for m in model.modules()}
        torch.testing.assert_close(back.eval()(*x), model.eval()(*x))
        burnt = unprepare(prepared, burn_in=True).self_attn
    assert burnt.in_proj_weight.unique().numel() <= 3 * E * 7
    kept = dict(model.named_modules())
    assert prepare(model, inplace=True) is model
    assert all(module is kept[name] for name, module in model.named_modules() if name in kept)
    assert isinstance(model.self_attn.out_proj, QATLinear)


def test_exact_is_what_converts():
    model, x = small_transformer()
    prepared = prepare(model, QConfig(QSpec(4)))
    calibrate(prepared, [x])
    with torch.no_grad():
        assert torch.equal(qk.exact(prepared)(*x), convert(prepared)(*x))
