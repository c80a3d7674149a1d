"""QATMultiheadAttention against torch's layer and against a formula; what prepare, convert and report make of it."""

import copy
import itertools
import math
import pickle

import pytest
import torch
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

E, HEADS, N, L, S = 12, 3, 2, 5, 4
SETTINGS = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "rows": {"add_bias_kv": True, "add_zero_attn": True},
    "rows, sequence first": {"add_bias_kv": True, "batch_first": False},
    "dims": {"kdim": 7, "vdim": 9},
    "vdim": {"vdim": 5, "bias": False, "batch_first": False},
}


def attention(dtype=torch.float64, **settings) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **settings}).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def inputs(layer: nn.MultiheadAttention, kind: str, batched: bool = True) -> list[torch.Tensor]:
    """Query, key and value: one tensor, query and key alike, key and value alike, or three."""
    dtype = layer.out_proj.weight.dtype

    def one(length: int, features: int) -> torch.Tensor:
        x = torch.randn(N, length, features, dtype=dtype) if batched else torch.randn(length, features, dtype=dtype)
        return x.transpose(0, 1).contiguous() if batched and not layer.batch_first else x

    query = one(L, E)
    if kind == "self":
        return [query, query, query]
    if kind == "query and key":
        return [query, query, one(L, layer.vdim)]
    key = one(S, layer.kdim)
    return [query, key, key] if kind == "memory" else [query, key, one(S, layer.vdim)]


def masks(source: int, batched: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    dtype, n = torch.float64, N if batched else 1
    causal = torch.ones(L, source, dtype=torch.bool).triu(1)
    padding = torch.arange(source) >= torch.tensor([[source], [source - 1]])[:n]
    padding = padding if batched else padding[0]
    several = torch.rand(n * HEADS, L, source) < 0.3
    several[..., 0] = False
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(L, source, dtype=dtype)},
        "several": {"attn_mask": several},
        "several floats": {"attn_mask": torch.randn(n * HEADS, L, source, dtype=dtype)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(padding.shape, dtype=dtype)},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }


def assert_same(layer, other, tensors, tolerance=1e-6, **options) -> None:
    """The results and all gradients of two layers that share their parameters."""
    results = []
    for module in (layer, other):
        leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
        torch.manual_seed(5)
        y, weights = module(*[leaves[id(t)] for t in tensors], **options)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        if weights is not None:
            loss = loss + (weights.square() * torch.arange(weights.shape[-1])).sum()
        used = {name: p for name, p in layer.named_parameters() if name in dict(other.named_parameters())}
        found = torch.autograd.grad(loss, [*leaves.values(), *used.values()], allow_unused=True)
        results.append([y, weights, *found])
    assert len(results[0]) == len(results[1])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_without_quantizers_it_is_torchs(settings, batched):
    torch.manual_seed(0)
    layer = attention(**SETTINGS[settings])
    ours = QATMultiheadAttention.from_float(layer)
    same = layer.kdim == layer.vdim == E
    kinds = ("self", "query and key", "memory", "three") if same else ("three",)
    for kind in kinds:
        tensors = inputs(layer, kind, batched)
        source = tensors[1].shape[0] if not batched or not layer.batch_first else tensors[1].shape[1]
        given = masks(source, batched)
        if kind not in ("self", "three"):
            given = {name: given[name] for name in ("none", "both")}
        for mask, (weights, average) in itertools.product(given.values(), [(False, True), (True, True), (True, False)]):
            assert_same(ours, layer, tensors, need_weights=weights, average_attn_weights=average, **mask)


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_is_torchs(weights):
    layer = attention(dropout=0.5)
    ours = QATMultiheadAttention.from_float(layer)
    assert_same(ours, layer, inputs(layer, "self"), need_weights=weights)
    x = inputs(layer, "self")
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(*x, need_weights=weights), layer.eval()(*x, need_weights=weights))


def test_other_dtypes_strides_and_empty_batches():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        layer = attention(dtype)
        x = torch.randn(N, E, L).to(dtype).transpose(1, 2)
        assert_same(QATMultiheadAttention.from_float(layer), layer, [x, x, x], tolerance, need_weights=False)
    layer = attention(torch.float32)
    ours, empty = QATMultiheadAttention.from_float(layer), torch.empty(0, L, E)
    assert ours(empty, empty, empty)[0].shape == (0, L, E)
    x = torch.randn(N, L, E)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x, x, x, need_weights=False)[0], layer(x, x, x, need_weights=False)[0]
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_the_result_has_torchs_memory_order():
    layer = attention(batch_first=False)
    x = inputs(layer, "self")
    assert QATMultiheadAttention.from_float(layer)(*x)[0].is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(L, E)}, r"key: got shape \[2, 4, 12\]; accepted: the dims of the query"),
        ({"query": torch.zeros(E)}, r"query: got shape \[12\]; accepted: \[batch, length, 12\], or \[length, 12\]"),
        ({"query": torch.zeros(N, L, 8)}, "query: got shape"),
        ({"key": torch.zeros(3, S, E)}, r"key: got shape \[3, 4, 12\]"),
        (
            {"value": torch.zeros(N, 3, E)},
            r"value: got shape \[2, 3, 12\]; accepted: the dims of the key, \[2, 4, 12\]",
        ),
        ({"is_causal": True}, "attn_mask: got None with is_causal=True"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "attn_mask: got torch.int64; accepted: torch.bool, a fl"),
        ({"attn_mask": torch.zeros(S, L)}, r"attn_mask: got shape \[4, 5\]; accepted: \[5, 4\] or \[6, 5, 4\]"),
        ({"attn_mask": torch.zeros(N, L, S)}, r"attn_mask: got shape \[2, 5, 4\]"),
        ({"key_padding_mask": torch.zeros(S)}, r"key_padding_mask: got shape \[4\]; accepted: \[2, 4\]"),
        ({"key": torch.nested.nested_tensor([torch.zeros(S, E)] * N)}, "key: got a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_refusals_name_the_argument(change, message):
    layer = QATMultiheadAttention.from_float(attention(torch.float32))
    arguments = {"query": torch.zeros(N, L, E), "key": torch.zeros(N, S, E), "value": torch.zeros(N, S, E)}
    with pytest.raises(RuntimeError, match=message):
        layer(**{**arguments, **change})


def rounded(x: torch.Tensor, quantizer: FakeQuantize, scale=None) -> torch.Tensor:
    """Fake quantization with the gradient that passes inside the range."""
    scale = quantizer.scale if scale is None else scale
    code = (x / scale).round()
    inside = (code >= quantizer.quant_min) & (code <= quantizer.quant_max)
    y = code.clamp(quantizer.quant_min, quantizer.quant_max) * scale
    return torch.where(inside, x + (y - x).detach(), y.detach())


def per_row(weight: torch.Tensor, quantizer: FakeQuantize) -> torch.Tensor:
    return rounded(weight, quantizer, (weight.detach().abs().amax(1, keepdim=True).float() / quantizer.quant_max))


def by_hand(layer: QATMultiheadAttention, query, key, value, bias=None):
    """The output and the weights of the heads, by the formula; batch first."""
    source = layer.memory_fake_quant or layer.input_fake_quant
    q, k, v = rounded(query, layer.input_fake_quant), rounded(key, source), rounded(value, source)
    if layer.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = [per_row(getattr(layer, name), getattr(layer, name + "_fake_quant")) for name in names]
    else:
        weights = per_row(layer.in_proj_weight, layer.in_proj_weight_fake_quant).split(E)
    q, k, v = (torch.einsum("nlk,ek->nle", x, w) for x, w in zip((q, k, v), weights, strict=True))
    if layer.in_proj_bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), layer.in_proj_bias.split(E), strict=True))
    d, heads = E // HEADS, []
    for h in range(HEADS):
        operands = [x[..., h * d : (h + 1) * d] for x in (q, k, v)]
        if layer.key_fake_quant is not None:
            each = (layer.query_fake_quant, layer.key_fake_quant, layer.value_fake_quant)
            operands = [rounded(x, quantizer) for x, quantizer in zip(operands, each, strict=True)]
        scores = operands[0] @ operands[1].mT / math.sqrt(d)
        scores = scores if bias is None else scores + bias
        share = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append((share @ operands[2], share))
    y = torch.cat([result for result, _ in heads], -1)
    y = rounded(y, layer.out_proj.input_fake_quant) @ per_row(layer.out_proj.weight, layer.out_proj.weight_fake_quant).T
    y = y if layer.out_proj.bias is None else y + layer.out_proj.bias
    return rounded(y, layer.output_fake_quant), torch.stack([share for _, share in heads], 1)


FIXED = QSpec(4, quantizer="minmax")
EVERYWHERE = QConfig(QSpec(5, quantizer="minmax"), FIXED, FIXED)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("settings", ["plain", "no bias", "dims"])
def test_quantized_it_is_the_formula(settings, inside, weights):
    torch.manual_seed(1)
    layer = attention(**SETTINGS[settings])
    kind = "self" if settings == "no bias" else "three"
    rule = {"memory": FIXED} | ({"attention": FIXED} if inside else {})
    config = QConfig(EVERYWHERE.weight, FIXED, FIXED, rules=[("", {} if kind == "self" and not inside else rule)])
    if kind == "self":
        config = QConfig(EVERYWHERE.weight, FIXED, FIXED, rules=[("", {"attention": FIXED})] if inside else [])
    prepared = prepare(layer, config)
    calibrate(prepared, [dict(zip(("query", "key", "value"), inputs(layer, kind), strict=True))])
    assert (prepared.query_fake_quant is not None) == inside
    assert (prepared.memory_fake_quant is not None) == (kind != "self")
    assert prepared.out_proj.output_fake_quant is None
    tensors = inputs(layer, kind)
    bias = torch.randn(L, tensors[1].shape[1], dtype=torch.float64)
    results = []
    for training, function in itertools.product((True, False), (prepared, lambda *a, **k: by_hand(prepared, *a, bias))):
        prepared.train(training)
        leaves = {id(t): t.clone().requires_grad_() for t in tensors}
        options = {"attn_mask": bias, "need_weights": weights, "average_attn_weights": False}
        y, share = function(*[leaves[id(t)] for t in tensors], **options)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        if weights:
            loss = loss + (share * torch.linspace(0, 1, share.numel()).view(share.shape)).sum()
        trained = [p for name, p in prepared.named_parameters() if p.requires_grad and "fake_quant" not in name]
        found = torch.autograd.grad(loss, [*leaves.values(), *trained])
        results.append([y, share if weights else None, *found])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    plain = layer(*tensors, attn_mask=bias)[0]
    assert (results[0][0] - plain).abs().max() > 0.05


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


def small_transformer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(E, HEADS, 8, 0.0, batch_first=True)
    return model, (torch.randn(N, L, E), torch.randn(N, S, E))


def test_it_compiles_without_a_break():
    layer = attention(torch.float32, kdim=7, vdim=7)
    prepared, x = prepare(layer), inputs(layer, "memory")
    calibrate(prepared, [dict(zip(("query", "key", "value"), x, strict=True))])
    compiled = torch.compile(copy.deepcopy(prepared), fullgraph=True, backend="eager")
    mask = {"key_padding_mask": torch.arange(S) >= torch.tensor([[S], [2]])}
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
