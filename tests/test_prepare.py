"""Which layers prepare takes, and what it says of those it leaves: parents that read weights, subclasses, specs."""

import concurrent.futures
import copy
import pickle
import re
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from qkernels.nn import (
    Int4Linear,
    Int8Conv2d,
    Int8Linear,
    Int8TrainingLinear,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConv2d,
    QATLinear,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report

pytestmark = pytest.mark.filterwarnings("ignore:prepare. ", "ignore:enable_nested_tensor", "ignore:.*weight_norm")

FAST = {"batch_first": True, "dropout": 0.0}


def assert_converts(prepared: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5, **kwargs) -> nn.Module:
    """The converted model, after a check that it computes what the prepared one does."""
    converted = convert(prepared)
    with torch.no_grad():
        expected, y = prepared.eval()(*inputs, **kwargs), converted(*inputs, **kwargs)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    return converted


# Parents that read weights.


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_transformer_encoder_layer_calls_its_layers_in_eval_mode(norm_first, copies):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, norm_first=norm_first, **FAST)
    x = torch.randn(3, 5, 32)
    prepared = prepare(model, QConfig(QSpec(2), QSpec(8, symmetric=False)))
    calibrate(prepared, [x])
    assert prepared.linear1.input_fake_quant.is_calibrated
    prepared = copies(prepared)
    by_hand = copy.deepcopy(model)  # quantized by hand, on torch's slow path
    for name in ("linear1", "linear2"):
        setattr(by_hand, name, prepared.get_submodule(name))
    expected = by_hand.train()(x)
    with torch.no_grad():
        y, plain = prepared.eval()(x), model.eval()(x)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-5)
    assert (y - plain).abs().max() > 0.01
    converted = copies(assert_converts(prepared, x, tolerance=1e-2))
    assert type(converted.linear1) is Int4Linear
    with torch.no_grad():
        assert (converted(x) - plain).abs().max() > 0.01


@pytest.mark.parametrize("mask", [None, "padding"])
def test_transformer_encoder_leaves_its_nested_tensor_path(mask):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, **FAST)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), torch.randn(3, 5, 32)
    padding = None if mask is None else torch.arange(5) >= torch.tensor([[5], [3], [4]])
    prepared = prepare(model, QConfig(QSpec(2)))
    assert not prepared.use_nested_tensor
    calibrate(prepared, [{"src": x, "src_key_padding_mask": padding}])
    prepared.apply(torch.ao.quantization.disable_observer)  # or ranges would grow in training mode
    with torch.no_grad():
        y = prepared.eval()(x, src_key_padding_mask=padding)
        difference = y - model.eval()(x, src_key_padding_mask=padding)
        slow = prepared.train()(x, src_key_padding_mask=padding)
    seen = torch.ones(3, 5, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(y[seen], slow[seen], rtol=1e-5, atol=1e-5)
    assert difference[seen].abs().max() > 0.01
    assert_converts(prepared, x, src_key_padding_mask=padding, tolerance=1e-2)
    clones = nn.TransformerEncoder(prepared.layers[0], 2, enable_nested_tensor=True).eval()
    with torch.no_grad():
        assert torch.isfinite(clones(x, src_key_padding_mask=padding)).all()


def test_transformer_decoder_and_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, **FAST)
    x, y = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    with pytest.warns(
        UserWarning, match=r"encoder\.layers\.0\.self_attn\.out_proj \(MultiheadAttention\.forward reads"
    ):
        prepared = prepare(model, QConfig(QSpec(4)))
    calibrate(prepared, [{"src": x, "tgt": y}])
    assert sum(isinstance(module, QATLinear) for module in prepared.modules()) == 4
    converted = assert_converts(prepared, x, y, tolerance=2e-2)
    for made in (report(prepared), report(converted)):
        assert "stays float: MultiheadAttention.forward reads" in made.notes["decoder.layers.0.multihead_attn.out_proj"]
        assert "Linear and Conv2d are quantized" in made.notes["decoder.layers.0.self_attn"]


class Reader(nn.Module):
    """Layers called, read, and both, in the ways in which models do."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)
        self.named, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.loop = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.stack = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.deep = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(8, 8))})
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.both = nn.Linear(8, 8)
        self.dtype_only = nn.Linear(8, 8)

    def forward(self, x):
        x = self.called(x)
        x = F.linear(x, self.read.weight, self.read.bias)
        layer = self.named
        x = x @ layer.weight.t()
        x = self.helper(x)
        x = F.linear(x, weight=self.layers[0].weight)
        x = self.layers[1](x)
        for i, layer in enumerate(self.loop):
            x = torch.addmm(layer.bias, x, layer.weight.T) + i
        x = self.stack(x)
        x = F.linear(x, self.deep["inner"][0].weight)
        x = F.conv2d(x[None, None], self.conv.weight, self.conv.bias, padding=1)[0, 0]
        x = self.both(x) + 1e-3 * self.both.weight.square().sum()
        assert self.dtype_only.weight.dtype is not None
        return self.dtype_only(x.to(self.dtype_only.weight.device)) * len(self.dtype_only.weight.shape)

    def helper(self, x):
        return F.linear(x, self.shared.weight)


INSTEAD = ["read", "named", "shared", "layers.0", "loop.0", "loop.1", "deep.inner.0", "conv"]


def test_layers_whose_weight_a_parent_reads_stay_in_float_and_are_named():
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(5, 8)
    with pytest.warns(UserWarning, match="^prepare: 8 layers that config selects stay in float: read ") as caught:
        prepared = prepare(model)
    (text,) = [str(w.message) for w in caught]
    assert "read (Reader.forward reads its weight instead of calling it)" in text
    assert "shared (Reader.helper reads" in text
    assert "1 layer quantized only where called: both (Reader.forward also reads its weight" in text
    quantized = {name for name, module in prepared.named_modules() if isinstance(module, QATLinear | QATConv2d)}
    assert quantized == {"called", "layers.1", "stack.0", "both", "dtype_only"}
    calibrate(prepared, [x])
    converted = assert_converts(prepared, x, tolerance=1e-2)
    for made in (report(prepared, x, float_model=model), report(converted, x, float_model=model)):
        assert [name for name, note in made.notes.items() if "reads its weight instead" in note] == INSTEAD
        assert "also reads its weight" in made.notes["both"]
        assert "dtype_only" not in made.notes
    silent = prepare(model, QConfig(rules=[(name, None) for name in (*INSTEAD, "both")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(model, QConfig(rules=[(name, None) for name in (*INSTEAD, "both")]))
    assert type(silent.read) is nn.Linear


def test_a_model_that_only_reads_is_refused_by_name():
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.fc.weight)

    with pytest.raises(ValueError, match=r"holds no layer that config selects.*fc \(Only.forward reads its weight"):
        prepare(Only())


def test_forwards_without_a_source_are_passed_over():
    namespace = {"nn": nn, "F": F}
    exec(
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return F.linear(x, self.fc.weight)\n",
        namespace,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(prepare(namespace["Typed"]()).fc, QATLinear)


# Subclasses.


class PlainConv(nn.Conv2d):
    def __init__(self, *args, note: str = "", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.note = note

    def describe(self) -> str:
        return f"{self.note} of {self.out_channels}"


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does, more at the end than at the start."""

    def forward(self, x):
        pads = []
        for i in (1, 0):
            size, k, s, d = x.shape[i - 2], self.weight.shape[i - 2], self.stride[i], self.dilation[i]
            pad = max((-(size // -s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads += [pad // 2, pad - pad // 2]
        x = F.pad(x, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SuperConv(nn.Conv2d):
    def forward(self, x, scale: float = 1.0):
        return scale * super().forward(F.pad(x, [0, 1, 0, 1]))


class StaticConv(nn.Conv2d):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return self._conv_forward(self.static_padding(x), self.weight, self.bias)


class KeywordConv(nn.Conv2d):
    def forward(self, x):
        return torch.conv2d(
            x, weight=self.weight.to(x.dtype), bias=self.bias, stride=self.stride, groups=self.groups, padding="valid"
        )


class ParentConv(SameConv):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.relu(), weight, bias)

    def forward(self, x):
        return nn.Conv2d.forward(self, x)


class ScaledLinear(nn.Linear):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.tensor([0.25]))

    def forward(self, x):
        return F.linear(x.tanh(), self.weight, self.bias) * self.gain + self.shift


class SuperLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x[..., :1]


class Adapted(nn.Linear):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.down, self.up = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.randn(16, 2))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


CONVS = [PlainConv, SameConv, SuperConv, StaticConv, KeywordConv, ParentConv]
GEOMETRIES = [(4, 6, 3), (4, 8, (3, 2), (2, 1), 0, (1, 2), 2, False)]


def by_hand(model: nn.Module, prepared: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The prepared layer's output from the float layer, with quantized operands put into its product."""
    original = {"linear": F.linear, "conv2d": F.conv2d}

    def replaced(name):
        def product(input, weight, *args, **kwargs):
            if weight is not model.weight:  # another product
                return original[name](input, weight, *args, **kwargs)
            operands = prepared.input_fake_quant(input), prepared.weight_fake_quant(prepared.weight)
            return original[name](*operands, *args, **kwargs)

        return product

    try:
        F.linear, F.conv2d, torch.conv2d = replaced("linear"), replaced("conv2d"), replaced("conv2d")
        with torch.no_grad():
            return model.eval()(x)
    finally:
        F.linear, F.conv2d, torch.conv2d = original["linear"], original["conv2d"], original["conv2d"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", CONVS)
def test_subclass_of_conv2d(kind, geometry, bits):
    torch.manual_seed(0)
    model, x = kind(*geometry), torch.randn(2, 4, 9, 7) + 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(model, QConfig(QSpec(bits)))
    assert isinstance(prepared, QATConv2d)
    assert isinstance(prepared, kind)
    assert list(dict(model.named_parameters())) == [n for n, _ in prepared.named_parameters() if "fake_quant" not in n]
    calibrate(prepared, [x])
    expected = by_hand(model, prepared, x)
    with torch.no_grad():
        y, plain = prepared.eval()(x), model(x)
    torch.testing.assert_close(y, expected)
    assert not torch.equal(y, plain)
    prepared.train()(x).square().mean().backward()
    model.train()(x).square().mean().backward()
    cosine = F.cosine_similarity(prepared.weight.grad.flatten(), model.weight.grad.flatten(), dim=0)
    assert cosine > (0.99 if bits == 8 else 0.9)
    assert all(p.grad is not None for p in prepared.parameters())
    for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert type(copied) is type(prepared)
        assert torch.equal(copied.eval()(x), y)
    fresh = prepare(kind(*geometry), QConfig(QSpec(bits)))
    fresh.load_state_dict(prepared.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), y)
    converted = assert_converts(prepared, x)
    assert isinstance(converted, Int8Conv2d)
    assert isinstance(converted, kind)
    assert_converts(prepared, x.to(memory_format=torch.channels_last))
    assert_converts(prepared, x[0])
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(copied(x), converted(x))
    again = convert(fresh)
    again.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(again(x), converted(x))
    plain_conv = convert(prepare_and_calibrate(nn.Conv2d(*geometry), x, QConfig(QSpec(bits))))
    assert set(converted.state_dict()) == set(plain_conv.state_dict())


def prepare_and_calibrate(model: nn.Module, x: torch.Tensor, config: QConfig | None = None) -> nn.Module:
    prepared = prepare(model, config)
    calibrate(prepared, [x])
    return prepared


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [ScaledLinear, SuperLinear, Adapted])
@pytest.mark.parametrize("input", [QSpec(8, symmetric=False), QSpec(8, PerToken(), quantizer="dynamic"), None])
def test_subclass_of_linear(kind, input, bits):
    torch.manual_seed(0)
    model, x = kind(32, 16), torch.randn(2, 5, 32)
    prepared = prepare_and_calibrate(model, x, QConfig(QSpec(bits), input))
    assert isinstance(prepared, QATLinear)
    assert isinstance(prepared, kind)
    with torch.no_grad():
        assert not torch.equal(prepared.eval()(x), model.eval()(x))
    if input is not None:
        torch.testing.assert_close(prepared(x), by_hand(model, prepared, x))
    converted = assert_converts(prepared, x)
    assert isinstance(converted, kind)
    assert isinstance(converted, Int4Linear if bits == 4 else Int8Linear if input else nn.Linear)
    assert pickle.loads(pickle.dumps(converted))(x).equal(converted(x))
    if kind is ScaledLinear:
        assert {"gain", "shift"} <= set(converted.state_dict())


def test_methods_and_attributes_of_a_subclass_stay():
    model = PlainConv(3, 4, 3, note="first")
    prepared = prepare_and_calibrate(model, torch.randn(1, 3, 5, 5))
    assert convert(prepared).describe() == prepared.describe() == "first of 4"


def test_batch_norm_behind_a_subclass_is_folded_only_behind_its_product():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = SameConv(3, 4, 3, stride=2, bias=False), SuperConv(4, 4, 3)
            self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            for norm in (self.norm_a, self.norm_b):
                nn.init.normal_(norm.weight)
                norm.running_var.uniform_(0.5, 2)
                norm.running_mean.normal_()

        def forward(self, x):
            return self.norm_b(self.b(self.norm_a(self.a(x)).relu()))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 9, 9)
    prepared = prepare_and_calibrate(model, x)
    converted = assert_converts(prepared, x, tolerance=1e-2)
    assert isinstance(converted.norm_a, nn.Identity)
    assert isinstance(converted.norm_b, nn.BatchNorm2d)
    made = report(converted, x, float_model=model)
    assert "more than convolve" in made.notes["norm_b"]
    assert all(row.weight_sqnr > 30 and row.output_sqnr > 20 for row in made.layers)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Styled(nn.Linear):
    def forward(self, x, style):
        return F.linear(x * style, self.weight, self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(super().forward(x))


class Penalized(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) / self.weight.norm()


class LateBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight).relu() + self.bias


class Taken(nn.Linear):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.scale = 3.0


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Standardized(1, 1, 3), "the forward of Standardized computes another weight from its own"),
        (lambda: Styled(8, 8), r"the forward of Styled could not be tried.*\[2, 8\] \(TypeError.*style"),
        (lambda: Doubled(8, 8), "does not use its weight in one F.linear or F.conv2d"),
        (lambda: Penalized(8, 8), "the forward of Penalized uses its weight elsewhere too, in norm"),
        (lambda: LateBias(8, 8), "another bias or groups"),
        (lambda: Taken(8, 8), "its attribute 'scale' is also one of"),
        (lambda: Int8TrainingLinear(8, 8), "the forward of Int8TrainingLinear"),
        (lambda: nn.LazyLinear(8), "its shape is not known before the first batch"),
        (replaced_forward, "its forward was replaced on the instance"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "its weight is torch.complex64"),
    ],
)
def test_subclasses_that_stay_in_float_are_named(make, reason):
    model = nn.Sequential(nn.Linear(8, 8), make())
    with pytest.warns(UserWarning, match=f"1 layer that config selects stay in float: 1 \\(.*{reason}"):
        prepared = prepare(model)
    assert type(prepared[1]) is type(model[1])
    assert prepared[1] is not model[1]


def test_a_rule_by_type_asks_for_a_subclass():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.styled = Styled(8, 8)

        def forward(self, x):
            return self.styled(x, torch.tensor(0.5))

    x = torch.randn(4, 8)
    for bits in (8, 4):
        config = QConfig(QSpec(bits), rules=[(Styled, {"input": {"symmetric": True}})])
        prepared = prepare_and_calibrate(Net(), x, config)
        assert isinstance(prepared.styled, QATLinear)
        assert prepared.styled.input_fake_quant.symmetric
        assert_converts(prepared, x)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rule_by_type_asks_for_a_weight_that_the_forward_computes(bits):
    torch.manual_seed(0)
    model, x = nn.Sequential(Standardized(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        model[0].weight += 1.0
    prepared = prepare_and_calibrate(model, x, QConfig(QSpec(bits), rules=[(Standardized, {"weight": {}})]))
    assert isinstance(prepared[0], QATConv2d)
    weight = model[0].weight - model[0].weight.mean((1, 2, 3), keepdim=True)
    quantized = prepared[0].weight_fake_quant(weight)
    expected = F.conv2d(prepared[0].input_fake_quant(x), quantized, model[0].bias)
    torch.testing.assert_close(prepared.eval()[0](x), expected)
    assert (weight - quantized).square().mean() < 1e-2 * weight.square().mean()
    prepared.train()(x).square().mean().backward()
    assert prepared[0].weight.grad.abs().max() > 0
    converted = assert_converts(prepared, x, tolerance=1e-4)
    assert isinstance(converted[0], Int8Conv2d)
    assert isinstance(converted[1], nn.Identity)
    torch.testing.assert_close(converted[0].dequantize() * 0 + 1, torch.ones_like(weight))
    row, other = (report(made, x).layers[0] for made in (prepared, converted))
    assert row.weight_sqnr > 15
    assert row.quantized_bytes == other.quantized_bytes
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), converted(x))


def test_warns_when_most_weights_stay_in_float():
    model = nn.Sequential(nn.Embedding(100, 16), nn.LSTM(16, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="^prepare: only 3% of the weights are selected") as caught:
        prepare(model)
    (text,) = [str(w.message) for w in caught]
    assert "0 (64%: Embedding, where Linear and Conv2d are quantized), 1 (33%: LSTM" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(8, 8)), QConfig(rules=[("0", None)]))  # left out on purpose
        prepare(nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)))


# Specs and configs.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QSpec("4"), TypeError, "bits: got '4', a str; accepted: 2 to 8"),
        (lambda: QSpec(True), TypeError, "bits: got True, a bool"),
        (lambda: QSpec(4.0), TypeError, "bits: got 4.0, a float"),
        (lambda: QSpec(9), ValueError, "bits: got 9"),
        (lambda: QSpec(symmetric="yes"), TypeError, "symmetric: got 'yes'"),
        (lambda: QSpec(symmetric=1), TypeError, "symmetric: got 1, a int"),
        (lambda: QSpec(quantizer=None), TypeError, "quantizer: got None"),
        (lambda: QSpec(quantizer="min_max"), ValueError, "quantizer: got 'min_max'.*did you mean 'minmax'"),
        (lambda: QSpec(straight_through="clap"), ValueError, "straight_through: got 'clap'"),
        (lambda: QSpec(straight_through=3), TypeError, "straight_through: got 3"),
        (lambda: QSpec(quantizer="ema", straight_through="ewgs"), ValueError, "straight_through: got 'ewgs' with"),
        (lambda: QSpec(granularity=PerChannel), TypeError, r"PerChannel.*an instance, not the class"),
        (
            lambda: QSpec(granularity="per_channel"),
            TypeError,
            r"granularity: got 'per_channel'; accepted: PerTensor\(\)",
        ),
        (lambda: PerGroup("32"), TypeError, "size: got '32'"),
        (lambda: PerGroup(32.0), TypeError, "size: got 32.0"),
        (lambda: PerChannel(None), TypeError, "axis: got None"),
        (lambda: QConfig(weight=4), TypeError, r"weight: got 4; accepted: a QSpec such as QSpec\(bits=4\), None"),
        (lambda: QConfig(4), TypeError, r"QSpec\(bits=4\)"),
        (lambda: QConfig(input=True), TypeError, "input: got True; accepted: a QSpec"),
        (lambda: QConfig(weight={"bits": 4}), TypeError, "weight: got {'bits': 4}; accepted: a QSpec"),
        (lambda: QConfig(weight=QSpec), TypeError, "weight: got <class"),
        (lambda: QConfig(rules={"fc": None}), TypeError, "rules: got {'fc': None}; accepted: a list"),
        (lambda: QConfig(rules="fc"), TypeError, "rules: got 'fc'"),
        (lambda: QConfig(rules=("fc", None)), TypeError, r"rules\[0\]: got 'fc'; accepted: a pair"),
        (lambda: QConfig(rules=[("fc",)]), TypeError, r"rules\[0\]: got \('fc',\)"),
        (lambda: QConfig(rules=[(3, None)]), TypeError, r"rules\[0\]: got 3 as its pattern"),
        (lambda: QConfig(rules=[(int, None)]), TypeError, r"rules\[0\]: got <class 'int'> as its pattern"),
        (lambda: QConfig(rules=[("fc", 4)]), TypeError, r"rules\[0\]: got 4 as its overrides"),
        (lambda: QConfig(rules=[("fc", {"weights": None})]), ValueError, "'weights'.*did you mean 'weight'"),
        (lambda: QConfig(rules=[("fc", {"weight": 4})]), TypeError, r"rules\[0\], weight: got 4.*QSpec\(bits=4\)"),
        (lambda: QConfig(rules=[("fc", {"weight": {"bit": 4}})]), ValueError, "'bit'.*did you mean 'bits'"),
        (lambda: QConfig(rules=[("fc", {"input": {"bits": "4"}})]), TypeError, r"rules\[0\], bits: got '4'"),
        (lambda: prepare(nn.Linear(2, 2), QSpec(4)), TypeError, r"config: got QSpec.*accepted: QConfig\(weight="),
        (lambda: prepare(nn.Linear(2, 2), 4), TypeError, "config: got 4"),
        (lambda: prepare("model"), TypeError, "model: got a str"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "weight", "message"),
    [
        (nn.Linear(64, 4), QSpec(8, symmetric=False), "'0' is quantized with a zero point; accepted by the int8"),
        (nn.Linear(64, 4), QSpec(5, symmetric=False), "zero point"),
        (nn.Linear(64, 4), QSpec(8, PerGroup(32)), r"'0' has PerGroup\(size=32\); accepted by the int8 layers"),
        (nn.Linear(64, 4), QSpec(4, PerGroup(8)), "group_size: got 8"),
        (nn.Conv2d(2, 4, 4), QSpec(4, PerGroup(2)), r"PerGroup\(size=2\); accepted by the int8 layers"),
        (nn.Conv2d(2, 4, 4), QSpec(4, symmetric=False), "zero point"),
        (nn.Linear(131072, 1), QSpec(8), "K = 131072; accepted: K <= 131071"),
        (nn.Linear(131072, 1), QSpec(4), "K = 131072"),
    ],
)
def test_prepare_refuses_what_convert_refuses_with_the_same_words(layer, weight, message):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message) as refused:
        prepare(model, QConfig(weight))
    prepared = prepare(model, QConfig(weight, None)) if "accepted by" in message and weight.bits > 4 else None
    if prepared is not None:  # weight-only: converts to floats, until an input quantizer is put in
        prepared[0].input_fake_quant = QSpec(quantizer="dynamic").for_input(prepared[0])
        with pytest.raises(ValueError, match=f"^{re.escape(str(refused.value))}$"):
            convert(prepared)


@pytest.mark.parametrize("weight_bits", [8, 5, 4, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [None, PerTensor(), PerGroup(16), PerGroup(8), PerGroup(32)])
@pytest.mark.parametrize("input", [None, QSpec(8), QSpec(8, PerToken(), quantizer="dynamic")])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(32, 4), lambda: nn.Conv2d(2, 3, 16)])
def test_what_prepare_takes_converts(layer, input, granularity, symmetric, weight_bits):
    torch.manual_seed(0)
    model = layer()
    x = torch.randn(3, 32) if isinstance(model, nn.Linear) else torch.randn(2, 2, 17, 17)
    try:
        prepared = prepare(model, QConfig(QSpec(weight_bits, granularity, symmetric), input))
    except ValueError:
        return
    calibrate(prepared, [x])
    assert_converts(prepared, x)


# weight_norm, spectral_norm, pruning and other parametrizations.


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


NORMS = {
    "weight_norm, old": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm, old": lambda layer: nn.utils.spectral_norm(layer),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Double()) or layer,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.2), "weight", 0.2),
    "bias pruned": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), SameConv(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NORMS)
def test_parametrized_weights_prepare_train_and_convert(name, bits, when):
    torch.manual_seed(0)
    model, x = small_net(), torch.randn(6, 3, 8, 8)

    def parametrize_layers(net):
        for i in (0, 2, 4):
            NORMS[name](net[i])
        net(x)

    if when == "before":
        parametrize_layers(model)
    expected = copy_state(model)
    prepared = prepare(model, QConfig(QSpec(bits)))
    if when == "after":
        calibrate(prepared, [x])
        parametrize_layers(prepared)
    calibrate(prepared, [x])
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared.train()(x), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    before = copy_state(prepared)
    converted = assert_converts(prepared, x, tolerance=1e-2)
    assert all(map(torch.equal, before.values(), prepared.state_dict().values()))
    prepared.train()(x).sum().backward()  # still parametrized
    model(x)
    assert all(map(torch.equal, expected.values(), model.state_dict().values())) or "spectral" in name
    assert not any("orig" in key or "mask" in key for key in converted.state_dict())
    assert not any(layer._forward_pre_hooks for layer in converted.modules())
    plain = convert(prepare_and_calibrate(small_net(), x, QConfig(QSpec(bits))))
    assert set(converted.state_dict()) == set(plain.state_dict())
    if name == "pruned":
        assert (converted[4].dequantize() == 0).float().mean() >= 0.5
    # float weights are baked as well
    weight_only = prepare(model, QConfig(QSpec(8), None))
    assert_converts(weight_only, x)


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


# The meta device.


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
@pytest.mark.parametrize("bits", [8, 4])
def test_prepare_on_the_meta_device(bits, quantizer):
    torch.manual_seed(0)
    input = QSpec(8, symmetric=False, quantizer=quantizer)
    config = QConfig(QSpec(bits, quantizer=quantizer), input, rules=[("2", {"weight": {"bits": 6}})])
    real = small_net()
    x = torch.randn(6, 3, 8, 8)
    prepared = prepare_and_calibrate(real, x, config)
    with torch.device("meta"):
        empty = prepare(small_net(), config)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    for meta in (empty, prepare(small_net().to("meta"), config)):
        loaded = meta.to_empty(device="cpu")
        loaded.load_state_dict(prepared.state_dict(), strict=True)
        assert torch.equal(loaded.eval()(x), prepared.eval()(x))
        assert_converts(loaded, x, tolerance=1e-2)
    assigned = prepare(small_net().to("meta"), config)
    assigned.load_state_dict(prepared.state_dict(), strict=True, assign=True)
    assert torch.equal(assigned.eval()(x), prepared(x))
    if quantizer == "ema":
        return  # its switches are buffers, which to_empty leaves without values
    # A float checkpoint, then calibration.
    with torch.device("meta"):
        fresh = prepare(small_net(), config)
    fresh.to_empty(device="cpu").load_state_dict(real.state_dict(), strict=False)
    calibrate(fresh, [x])
    assert torch.equal(fresh.eval()(x), prepared(x))


def test_compile_and_export_of_a_subclass():
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    prepared = prepare_and_calibrate(
        nn.Sequential(SameConv(4, 4, 3, stride=2), nn.ReLU(), SuperConv(4, 4, 3)), x
    ).eval()
    converted = convert(prepared)
    with torch.no_grad():
        for model in (prepared, converted):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), model(x))
    prepared.train()
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    got = prepared[0].weight.grad.clone()
    prepared.zero_grad()
    prepared(x).sum().backward()
    torch.testing.assert_close(got, prepared[0].weight.grad)


# Forwards that take another way for another input.


class Branching(nn.Linear):
    """Does with its weight, for few rows, what no trial on two rows shows."""

    way = "plain"

    def forward(self, x):
        if x.shape[0] < 3:
            return super().forward(x)
        return {
            "plain": lambda: F.linear(x, self.weight, self.bias),
            "scaled": lambda: F.linear(x, 0.5 * self.weight, self.bias),
            "nested": lambda: F.linear(x, torch.cat([self.weight, self.weight])[: self.out_features], self.bias),
            "transposed": lambda: x @ self.weight.T + self.bias,
            "twice": lambda: super(Branching, self).forward(super(Branching, self).forward(x)),
            "without bias": lambda: F.linear(x, self.weight),
            "other bias": lambda: F.linear(x, self.weight, 2 * self.bias),
            "other weight": lambda: F.linear(x, self.other, self.bias),
            "normed": lambda: F.linear(x, self.weight, self.bias) / self.weight.norm(),
            "cast": lambda: F.linear(x, self.weight.to(x.dtype).contiguous(), self.bias),
            "row": lambda: F.linear(x, self.weight, self.bias) + self.weight[0],
            "in place": lambda: F.linear(x, self.weight.clone().mul_(2), self.bias),
        }[self.way]()

    def __init__(self, n: int, way: str) -> None:
        super().__init__(n, n)
        self.way, self.other = way, nn.Parameter(torch.randn(n, n))


WAYS = [
    "plain",
    "scaled",
    "nested",
    "transposed",
    "twice",
    "without bias",
    "other bias",
    "other weight",
    "normed",
    "cast",
]


@pytest.mark.parametrize("config", [QConfig(), QConfig(QSpec(4)), QConfig(QSpec(4), None), QConfig(QSpec(8), None)])
@pytest.mark.parametrize("way", [*WAYS, "row", "in place"])
def test_a_forward_that_branches_on_the_shape_computes_the_same_converted(way, config):
    torch.manual_seed(0)
    model, many, few = Branching(32, way), torch.randn(6, 32), torch.randn(2, 32)
    prepared = prepare(model, config).eval()
    calibrate(prepared, [2 * many, few])
    assert isinstance(prepared, QATLinear)
    converted = convert(prepared)
    assert isinstance(converted, Int4Linear | Int8Linear)
    for x in (many, few):
        with torch.no_grad():
            y, expected, plain = converted(x), prepared(x), model(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert (y - plain).abs().max() < 0.5 * plain.abs().max() + 1e-6
        if x is many and way not in ("other weight",):
            assert not torch.equal(y, plain)
    prepared.train()(many).square().mean().backward()
    if way != "other weight":
        assert prepared.weight.grad.abs().max() > 0
    assert converted.weight.isfinite().all()
    assert torch.equal(pickle.loads(pickle.dumps(converted))(many), converted(many))


def test_a_batch_norm_is_not_folded_into_what_a_forward_does_not_return():
    """Which shows only for inputs of another size than the trial's."""

    class Growing(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            return y if x.shape[-1] > 8 else 2 * y

    torch.manual_seed(0)
    model, large, small = (
        nn.Sequential(Growing(3, 4, 3), nn.BatchNorm2d(4)),
        torch.randn(2, 3, 9, 9),
        torch.randn(2, 3, 8, 8),
    )
    prepared = prepare_and_calibrate(model, large)
    converted = assert_converts(prepared, large, tolerance=1e-2)
    assert isinstance(converted[1], nn.Identity)
    with pytest.raises(RuntimeError, match="Growing: its forward does more than convolve for this input"):
        converted(small)


def test_a_weight_that_a_forward_computes_is_computed_for_every_input():
    class Sometimes(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight - self.weight.mean() if x.shape[0] < 3 else self.weight, self.bias)

    torch.manual_seed(0)
    prepared = prepare(Sometimes(32, 8), QConfig(rules=[(Sometimes, {"weight": {}})]))
    calibrate(prepared, [torch.randn(2, 32)])
    converted = assert_converts(prepared, torch.randn(2, 32))
    for model in (prepared, converted):
        with pytest.raises(RuntimeError, match=r"Sometimes: got an input of shape \[5, 32\], for which its forward"):
            model(torch.randn(5, 32))


def test_threads_may_call_a_subclass_at_the_same_time():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    converted = convert(prepare_and_calibrate(nn.Sequential(SameConv(4, 8, 3), nn.ReLU(), SameConv(8, 8, 3)), x))
    expected = converted(x)
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)  # seconds: between any two lines
        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            assert all(torch.equal(y, expected) for y in threads.map(lambda _: converted(x), range(1000)))
    finally:
        sys.setswitchinterval(before)


def test_subclasses_trace_and_export_for_other_batches():
    torch.manual_seed(0)
    x, other = torch.randn(2, 4, 9, 9), torch.randn(5, 4, 9, 9)
    model = nn.Sequential(SameConv(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), ScaledLinear(100, 3))
    converted = convert(prepare_and_calibrate(model, x))
    expected = converted(other)
    exported = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(other), expected)
    torch.testing.assert_close(torch.jit.trace(converted, (x,))(other), expected)
    assert torch.equal(torch.fx.symbolic_trace(converted)(other), expected)
    assert torch.equal(torch.fx.symbolic_trace(converted[0])(other), converted[0](other))
    assert torch.equal(converted(other), expected)  # nothing of a trace is left behind
