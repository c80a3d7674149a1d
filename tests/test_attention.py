"""QATMultiheadAttention against torch's layer and against a formula."""

import itertools
import math

import pytest
import torch
from attention_cases import HEADS, SETTINGS, E, L, N, S, attention, inputs

from qkernels.nn import (
    FakeQuantize,
    QATMultiheadAttention,
)
from qkernels.qat import QConfig, QSpec, calibrate, prepare

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


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
    padding = torch.arange(L) >= torch.tensor([[L], [2]])
    for weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            made, theirs = (f(x, x, x, padding, need_weights=weights) for f in (ours, layer))
        for got, expected in zip(made, theirs, strict=True):
            if expected is not None:  # the same dtype too
                torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * float(expected.detach().abs().max()))


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
    ],
)
def test_refusals_name_the_argument(change, message):
    layer = QATMultiheadAttention.from_float(attention(torch.float32))
    arguments = {"query": torch.zeros(N, L, E), "key": torch.zeros(N, S, E), "value": torch.zeros(N, S, E)}
    with pytest.raises(RuntimeError, match=message):
        layer(**{**arguments, **change})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_are_refused():
    layer, x = QATMultiheadAttention.from_float(attention(torch.float32)), torch.zeros(N, L, E)
    nested = torch.nested.nested_tensor([torch.zeros(L, E)] * N)
    with pytest.raises(RuntimeError, match="key: got a nested tensor; accepted: a padded one with a mask"):
        layer(x, nested, x)


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
