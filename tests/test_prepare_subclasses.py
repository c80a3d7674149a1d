"""prepare on subclasses of nn.Linear and nn.Conv2d: which it takes, and forwards that branch on their input."""

import concurrent.futures
import copy
import pickle
import sys
import warnings

import pytest
import torch
from converting import SameConv, assert_converts, by_hand, prepare_and_calibrate
from torch import nn
from torch.nn import functional as F

from qkernels.nn import (
    Int4Linear,
    Int8Conv2d,
    Int8Linear,
    Int8TrainingLinear,
    PerToken,
    QATConv2d,
    QATLinear,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report

pytestmark = pytest.mark.filterwarnings("ignore:prepare. ", "ignore:enable_nested_tensor", "ignore:.*weight_norm")


class PlainConv(nn.Conv2d):
    def __init__(self, *args, note: str = "", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.note = note

    def describe(self) -> str:
        return f"{self.note} of {self.out_channels}"


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
        (lambda: Doubled(8, 8), "does not use its weight in one product, such as F.linear"),
        (lambda: Penalized(8, 8), "the forward of Penalized uses its weight elsewhere too, in norm"),
        (lambda: LateBias(8, 8), "another bias or groups"),
        (lambda: Taken(8, 8), "its attribute 'scale' is also one of"),
        (lambda: Int8TrainingLinear(8, 8), "the forward of Int8TrainingLinear"),
        (lambda: type("Own", (nn.LazyLinear,), {})(8), "its shape is not known before the first batch"),
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


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.offset = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return x + self.table.sum(0) + self.offset


def test_warns_of_weights_that_stay_in_float():
    model = nn.Sequential(Table(), nn.Linear(8, 8), Table())
    with pytest.warns(
        UserWarning, match="^prepare: 2 layers that config does not select stay in float: 0, 2 "
    ) as caught:
        prepare(model)
    (text,) = [str(w.message) for w in caught]
    assert "(Table is no layer that prepare knows; a rule can name its parameter 'table')" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(8, 8)), QConfig(rules=[("0", None)]))  # left out on purpose
        prepare(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
        prepare(model, QConfig(rules=[("*.table", {"weight": {}})]))


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
