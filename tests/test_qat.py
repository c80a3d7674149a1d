"""prepare, calibrate, convert, report: converted models compute what the prepared ones do, and nothing else moves."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qkernels.nn import (
    Int4Embedding,
    Int4Linear,
    Int8Conv2d,
    Int8Linear,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConv2d,
    QATLinear,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report
from qkernels.qat.fold import find_folds

KINDS = ("lsq", "minmax", "ema", "dynamic")


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=4)
        self.norm2 = nn.BatchNorm2d(12, affine=False)
        self.fc = nn.Linear(12 * 4 * 4, 5)
        randomize(self)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(x.flatten(1))


def randomize(model: nn.Module) -> None:
    """BatchNorm statistics of a trained model, with gammas of both signs."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                with torch.no_grad():
                    norm.weight.normal_()
                    norm.bias.normal_()


def images(n: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8) + 0.3


def snapshot(model: nn.Module):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, [(name, type(module), module.training) for name, module in model.named_modules()]


def assert_unchanged(model: nn.Module, before) -> None:
    state, modules = snapshot(model)
    assert modules == before[1]
    assert list(state) == list(before[0])
    for key, value in state.items():
        assert torch.equal(value.nan_to_num(7), before[0][key].nan_to_num(7)), key


def assert_same_numbers(
    converted: nn.Module, prepared: nn.Module, x: torch.Tensor, tolerance: float = 1e-5, flips: float = 0.0
) -> None:
    """Equal to ``tolerance`` of the largest output; where layers follow each other, the share ``flips`` of the outputs
    may see a code of a later layer fall on the other side of a tie, a step of 1/255 of its input's range."""
    prepared.eval()
    with torch.no_grad():
        expected, y = prepared(x), converted(x)
    assert y.dtype == expected.dtype
    largest = max(1.0, float(expected.abs().max()))
    error = (y.double() - expected.double()).abs() / largest
    assert error.isfinite().all()
    assert (error > tolerance).double().mean() <= flips
    assert error.max() <= max(tolerance, 0.01 * bool(flips))


def one_layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    return {
        "linear": lambda: (nn.Linear(33, 7), torch.randn(4, 5, 33)),
        "linear without bias": lambda: (nn.Linear(16, 8, bias=False), torch.randn(9, 16)),
        "conv": lambda: (nn.Conv2d(3, 5, 3), images()),
        "conv groups": lambda: (nn.Conv2d(6, 9, (3, 2), (2, 1), (1, 2), groups=3), torch.randn(4, 6, 9, 7)),
        "conv depthwise dilated": lambda: (
            nn.Conv2d(4, 8, 3, dilation=2, padding=2, groups=4),
            torch.randn(3, 4, 9, 9),
        ),
        "conv same": lambda: (nn.Conv2d(3, 4, 5, padding="same"), images()),
        "conv reflect": lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), images()),
        "conv unbatched": lambda: (nn.Conv2d(3, 4, 3), images()[0]),
    }[kind]()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("quantizer", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layer", ["linear", "conv", "conv groups"])
def test_convert_equals_prepared_in_every_mode(layer, symmetric, quantizer, bits):
    torch.manual_seed(bits)
    model, x = one_layer(layer)
    for granularity in (PerChannel(), PerTensor()):
        spec = QSpec(bits, granularity, quantizer=quantizer)
        prepared = prepare(model, QConfig(spec, QSpec(bits, symmetric=symmetric, quantizer=quantizer)))
        calibrate(prepared, [x, 0.5 * x])
        converted = convert(prepared)
        assert type(converted) is (Int8Conv2d if "conv" in layer else Int8Linear if bits > 4 else Int4Linear)
        assert_same_numbers(converted, prepared, 1.5 * x)


@pytest.mark.parametrize(
    "layer", ["linear without bias", "conv depthwise dilated", "conv same", "conv reflect", "conv unbatched"]
)
def test_convert_equals_prepared_for_every_geometry(layer):
    torch.manual_seed(0)
    model, x = one_layer(layer)
    prepared = prepare(model)
    calibrate(prepared, [x])
    assert_same_numbers(convert(prepared), prepared, x)


def test_convert_per_token():
    torch.manual_seed(0)
    config = QConfig(QSpec(4), QSpec(8, PerToken(), quantizer="dynamic"))
    prepared = prepare(nn.Linear(24, 6), config)  # nothing to calibrate
    x = torch.randn(3, 5, 24) * torch.tensor([1e-3, 1.0, 100.0]).reshape(3, 1, 1)
    assert_same_numbers(convert(prepared), prepared, x)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()])
def test_convert_after_training_folds_batch_norm(granularity, bits):
    torch.manual_seed(bits)
    model = ConvNet()
    x, target = images(), torch.arange(16) % 5
    prepared = prepare(model, QConfig(QSpec(bits, granularity), QSpec(8, symmetric=False)))
    calibrate(prepared, [x[:8], x[8:]])
    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (prepared.norm1.weight < 0).any()
    before = snapshot(prepared)
    converted = convert(prepared)
    assert_unchanged(prepared, before)
    assert isinstance(converted.norm1, nn.Identity)
    assert isinstance(converted.norm2, nn.Identity)
    assert not converted.training
    # Codes are those of the unfolded weight, mirrored where gamma is negative.
    codes, _, _ = prepared.conv1.weight_fake_quant.quantize(prepared.conv1.weight)
    assert torch.equal(
        converted.conv1.codes, torch.where(prepared.norm1.weight.reshape(-1, 1, 1, 1) < 0, -codes, codes)
    )
    assert_same_numbers(converted, prepared, x, flips=0.1)
    assert_same_numbers(converted, prepared, x.to(memory_format=torch.channels_last), flips=0.1)


def test_convert_bf16_model():
    torch.manual_seed(0)
    prepared = prepare(ConvNet().bfloat16())
    x = images().bfloat16()
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert converted.conv1.scale.dtype == torch.float32
    assert_same_numbers(converted, prepared, x, tolerance=0.03)


def test_converted_state_dict_loads_into_another_conversion():
    torch.manual_seed(0)
    x = images()
    made = []
    for _ in range(2):
        prepared = prepare(ConvNet())
        calibrate(prepared, [x])
        made.append(convert(prepared))
    assert not torch.equal(made[0](x), made[1](x))
    made[1].load_state_dict(made[0].state_dict(), strict=True)
    assert torch.equal(made[0](x), made[1](x))


def test_prepared_state_dict_loads_into_a_fresh_prepared_model():
    torch.manual_seed(0)
    x = images()
    prepared = prepare(ConvNet())
    calibrate(prepared, [x])
    fresh = prepare(ConvNet())
    fresh.load_state_dict(prepared.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), prepared.eval()(x))
    assert_same_numbers(convert(fresh), prepared, x, flips=0.1)


def test_batch_norm_that_cannot_be_folded_stays_and_the_report_says_why():
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.shared, self.branch, self.alone = (nn.BatchNorm2d(3) for _ in range(3))
            self.folded = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            randomize(self)

        def forward(self, x):
            x = self.shared(self.a(x))
            y = self.b(x)
            x = self.shared(self.branch(y) + y)
            return self.folded(self.alone(F.relu(self.c(x))))

    torch.manual_seed(0)
    x = images()
    prepared = prepare(Awkward())
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert isinstance(converted.folded[1], nn.Identity)
    for model in (prepared, converted):
        notes = report(model).notes
        assert "called 2 times" in notes["shared"]
        assert "output of b is used elsewhere" in notes["branch"]
        assert "straight from a Conv2d" in notes["alone"]
        assert "folded.1" not in notes
    assert_same_numbers(converted, prepared, x, flips=0.1)


def test_model_that_cannot_be_traced_converts_without_folding():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            randomize(self)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y if y.sum() > 0 else 2 * y

    torch.manual_seed(0)
    x = images()
    prepared = prepare(Branches())
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert isinstance(converted.norm, nn.BatchNorm2d)
    assert "cannot trace" in report(converted).notes["norm"]
    assert_same_numbers(converted, prepared, x)


def test_shared_layer_and_tied_weight():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.again = self.first
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.first.weight

        def forward(self, x):
            return self.tied(self.again(self.first(x)))

    torch.manual_seed(0)
    x = torch.randn(8, 6)
    prepared = prepare(Shared())
    assert prepared.first is prepared.again
    assert prepared.tied.weight is prepared.first.weight
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert converted.first is converted.again
    assert_same_numbers(converted, prepared, x, flips=0.1)
    weight_only = prepare(Shared(), QConfig(rules=[("tied", {"input": None, "weight": {"bits": 2}})]))
    calibrate(weight_only, [x])
    assert_same_numbers(convert(weight_only), weight_only, x, flips=0.1)


def test_weight_only_above_4_bits_holds_codes_and_computes_in_float():
    torch.manual_seed(0)
    for granularity in (PerChannel(), PerGroup(8)):
        model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        prepared = prepare(model, QConfig(QSpec(5, granularity, symmetric=False), None))
        x = torch.randn(5, 16)
        converted = convert(prepared)
        assert type(converted[0]) is Int8Linear
        assert torch.equal(converted[0].weight, prepared[0].weight_fake_quant(prepared[0].weight))
        assert torch.equal(converted(x), prepared(x))
        made = report(converted)
        assert made.layers[0].weight_bits == 5
        size = sum(t.numel() * t.element_size() for t in converted.state_dict().values())
        assert made.quantized_bytes == report(prepared).quantized_bytes == size


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QSpec(5, PerGroup(16)), r"'0'.*PerGroup.*accepted by the int8 layers"),
        (QSpec(8, symmetric=False), "'0'.*zero point"),
        (
            QSpec(4, PerGroup(8)),
            r"'0' has PerGroup\(size=8\); group_size: got 8; accepted: .* K = 48, or a multiple of 8",
        ),
        (QSpec(2, PerGroup(12), symmetric=False), r"'0' has PerGroup\(size=12\); group_size: got 12; accepted"),
    ],
)
@pytest.mark.parametrize("input", [QSpec(quantizer="dynamic"), None])
def test_prepare_and_convert_refuse_weights_that_the_kernels_do_not_take(spec, message, input):
    if input is None and spec.bits > 4:
        pytest.skip("becomes a float layer")
    model = nn.Sequential(nn.Linear(48, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prepare(model, QConfig(spec, input))
    assert_unchanged(model, before)
    changed = prepare(model, QConfig(QSpec(8), input or QSpec()))  # by hand, after prepare
    changed[0] = QATLinear.from_float(model[0], weight=spec.for_weight(model[0]), input=changed[0].input_fake_quant)
    calibrate(changed, [torch.randn(2, 48)])
    with pytest.raises(ValueError, match=message):
        convert(changed)


INPUTS = {
    "float": None,
    "static": QSpec(8),
    "static, zero point": QSpec(8, symmetric=False),
    "static, 4 bits": QSpec(4, symmetric=False, quantizer="minmax"),
    "averages": QSpec(8, symmetric=False, quantizer="ema"),
    "dynamic": QSpec(8, quantizer="dynamic"),
    "dynamic, zero point": QSpec(8, symmetric=False, quantizer="dynamic"),
    "per token": QSpec(8, PerToken(), quantizer="dynamic"),
}


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize(
    ("granularity", "k"),
    [
        (PerChannel(), 33),
        (PerChannel(), 1),
        (PerTensor(), 47),
        (PerGroup(16), 80),
        (PerGroup(24), 72),
        (PerGroup(21), 21),
    ],
)
def test_int4_convert_equals_prepared(granularity, k, input, symmetric, bits):
    torch.manual_seed(bits)
    for quantizer in KINDS:
        model, x = nn.Linear(k, 35, bias=quantizer != "minmax"), torch.randn(2, 3, k) + 0.2
        prepared = prepare(model, QConfig(QSpec(bits, granularity, symmetric, quantizer), INPUTS[input]))
        calibrate(prepared, [x, 0.5 * x])
        converted = convert(prepared)
        assert type(converted) is Int4Linear
        assert (converted.weight_bits, converted.act_bits) == (bits, 16 if input == "float" else 8)
        codes, scale, zero_point = prepared.weight_fake_quant.quantize(prepared.weight)
        assert torch.equal(converted.codes, codes)
        assert torch.equal(converted.scale, scale.expand(35, converted.scale.shape[1]))  # bit for bit
        if symmetric:
            assert converted.zero_point is None
        else:
            assert torch.equal(converted.zero_point.int(), zero_point.expand_as(converted.zero_point))
        assert_same_numbers(converted, prepared, 1.5 * x)
        assert report(prepared).quantized_bytes == report(converted).quantized_bytes


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("input", [None, QSpec(8, symmetric=False), QSpec(8, PerToken(), quantizer="dynamic")])
def test_int4_model_after_training(input, symmetric, bits):
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 5))
    x, target = torch.randn(32, 48), torch.arange(32) % 5
    last = {"weight": QSpec(8), "input": QSpec(8)}
    prepared = prepare(model, QConfig(QSpec(bits, PerGroup(16), symmetric), input, rules=[("4", last)]))
    calibrate(prepared, [x])
    untrained = convert(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    before = snapshot(prepared)
    converted = convert(prepared)
    assert_unchanged(prepared, before)
    assert [type(layer) for layer in converted[::2]] == [Int4Linear, Int4Linear, Int8Linear]
    assert_same_numbers(converted, prepared, x, flips=0.1)
    assert_same_numbers(converted[0], prepared[0], x)
    assert not torch.equal(untrained(x), converted(x))
    untrained.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(untrained(x), converted(x))


@pytest.mark.parametrize("input", [None, QSpec(8, symmetric=False)])
def test_int4_convert_bf16_model(input):
    torch.manual_seed(0)
    x = torch.randn(9, 64).bfloat16()
    prepared = prepare(nn.Linear(64, 16).bfloat16(), QConfig(QSpec(4, PerGroup(32)), input))
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert converted.scale.dtype == torch.float32
    assert_same_numbers(converted, prepared, x, tolerance=0.03)


def test_batch_norm_folds_beside_an_int4_layer():
    """torch.fx must not look into the layer when a converted model is reported."""
    torch.manual_seed(0)
    x = images()
    prepared = prepare(ConvNet(), QConfig(QSpec(4), QSpec(8, symmetric=False)))
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert [type(m) for m in (converted.conv1, converted.norm1, converted.fc)] == [Int8Conv2d, nn.Identity, Int4Linear]
    assert_same_numbers(converted, prepared, x, flips=0.1)
    converted.norm1 = nn.BatchNorm2d(8)
    assert find_folds(converted).batch_norm_of == {"conv1": "norm1"}


def test_report_of_int4_layers():
    torch.manual_seed(0)
    x = torch.randn(8, 48)
    model = nn.Sequential(nn.Linear(48, 10), nn.Linear(10, 7, bias=False))
    last = {"weight": QSpec(4), "input": QSpec(8)}
    prepared = prepare(model, QConfig(QSpec(3, PerGroup(16), symmetric=False), None, rules=[("1", last)]))
    calibrate(prepared, [x])
    converted = convert(prepared)
    made, before = report(converted, 2 * x, float_model=model), report(prepared, 2 * x, float_model=model)
    assert made.notes == before.notes == {}
    # 10 rows of 18 bytes with 3 scales and int8 zero points each; 7 rows of 5 bytes, 7 scales, the input's scale; and
    # what the codes stand for, of the second layer with the input's range.
    assert [row.quantized_bytes for row in made.layers] == [180 + 4 * 30 + 30 + 4 * 10 + 4 * 3, 35 + 4 * 7 + 4 + 4 * 5]
    assert [(row.weight_bits, row.input_bits) for row in made.layers] == [(3, None), (4, 8)]
    assert [row.kind for row in made.layers] == ["Int4Linear", "Int4Linear"]
    assert made.quantized_bytes == sum(t.numel() * t.element_size() for t in converted.state_dict().values())
    assert made.float_bytes == 4 * sum(p.numel() for p in model.parameters())
    for row, old in zip(made.layers, before.layers, strict=True):
        assert row.weight_sqnr == pytest.approx(old.weight_sqnr, abs=1e-3)
        assert row.output_sqnr == pytest.approx(old.output_sqnr, abs=1e-2)
        assert row.quantized_bytes == old.quantized_bytes
    assert made.layers[0].input_clipped is None
    assert made.layers[1].input_clipped == pytest.approx(before.layers[1].input_clipped, abs=0.02)
    assert made.layers[1].input_clipped > 0


def test_report_counts_an_int4_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 32), nn.Linear(32, 3))
    quantized = copy.deepcopy(model)
    quantized[0] = Int4Embedding.from_float(model[0], 16, symmetric=False)
    made = report(quantized, torch.arange(5), float_model=model)
    row = made.layers[0]
    assert (row.kind, row.weight_bits, row.input_bits) == ("Int4Embedding", 4, None)
    assert (row.float_bytes, row.quantized_bytes) == (4 * 11 * 32, 11 * (16 + 2 * 4 + 2) + 4 * 3)
    weight = model[0].weight.detach()
    error = weight - quantized[0].dequantize()
    assert row.weight_sqnr == pytest.approx(10 * math.log10(weight.square().sum() / error.square().sum()))
    assert made.quantized_bytes == row.quantized_bytes + 4 * 33 * 3
    assert made.float_bytes == report(quantized).float_bytes == 4 * (11 * 32 + 33 * 3)


def test_rules():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 1, 1)), nn.Linear(8, 2))
    config = QConfig(
        QSpec(4),
        QSpec(8, symmetric=False),
        rules=[
            ("1.*", {"weight": {"bits": 2}}),
            (nn.Conv2d, {"weight": QSpec(8, PerTensor()), "input": None}),
            ("2", None),
            ("0", None),
            ("0", {"input": {"bits": 3, "symmetric": True}}),
        ],
    )
    prepared = prepare(model, config)
    assert prepared[0].weight_fake_quant.bits == 4
    assert (prepared[0].input_fake_quant.bits, prepared[0].input_fake_quant.symmetric) == (3, True)
    assert prepared[1][0].weight_fake_quant.bits == 2
    assert not prepared[1][0].input_fake_quant.symmetric
    assert (prepared[1][1].weight_fake_quant.bits, prepared[1][1].input_fake_quant) == (8, None)
    assert type(prepared[2]) is nn.Linear
    default = prepare(model)
    assert default[0].weight_fake_quant.granularity == PerChannel(0)
    assert not default[0].input_fake_quant.symmetric
    with pytest.warns(UserWarning, match="'head' matches no Linear"):
        prepare(model, QConfig(rules=[("head", None)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QSpec(1), "bits: got 1"),
        (lambda: QSpec(quantizer="dorefa"), "quantizer: got 'dorefa'"),
        (lambda: QConfig(rules=[("fc", {"bias": 8})]), r"rules\[0\]: got the key 'bias'"),
        (
            lambda: prepare(nn.Linear(2, 2), QConfig(rules=[("", {"weight": {"bit": 4}})])),
            r"rules\[0\], weight: got the key 'bit'.*did you mean 'bits'",
        ),
        (lambda: prepare(nn.ReLU()), "holds no layer"),
        (lambda: prepare(nn.Linear(2, 2), QConfig(None, None)), "holds no layer"),
        (lambda: prepare(prepare(nn.Linear(2, 2))), "prepared already"),
        (lambda: prepare(nn.Linear(2, 2), QConfig(input=QSpec(8, PerToken()))), 'PerToken.*"dynamic"'),
        (lambda: prepare(nn.Linear(2, 2), QConfig(input=QSpec(8, PerChannel()))), "input granularity of Linear"),
        (
            lambda: prepare(nn.Conv2d(2, 2, 1), QConfig(input=QSpec(8, PerToken(), quantizer="dynamic"))),
            "input granularity of Conv2d",
        ),
        (lambda: prepare(nn.Linear(2, 2), QConfig(QSpec(8, PerChannel(1)))), "weight granularity"),
        (lambda: prepare(nn.Linear(6, 2), QConfig(QSpec(8, PerGroup(4)))), "divides the last dim, 6"),
        (lambda: calibrate(nn.Linear(2, 2), [torch.ones(2)]), "without quantizers"),
        (lambda: convert(nn.Linear(2, 2)), "without quantizers"),
        (lambda: report(nn.Linear(2, 2)), "got a float model"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_prepare_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = ConvNet().eval()
    model.conv1.train()
    before = snapshot(model)
    prepared = prepare(model)
    assert_unchanged(model, before)
    assert isinstance(prepared.conv1, QATConv2d)
    assert isinstance(prepared.fc, QATLinear)
    assert not {id(p) for p in prepared.parameters()} & {id(p) for p in model.parameters()}
    assert prepared.load_state_dict(model.state_dict(), strict=False).unexpected_keys == []
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match="weight of 'fc' holds NaN"):
        prepare(model)
    assert_unchanged(model, before)


def test_calibrate_by_hand():
    batches = [torch.tensor([[-1.0, 3.0]]), torch.tensor([[-2.0, 1.0]])]
    config = QConfig(input=QSpec(8, symmetric=False, quantizer="minmax"))
    prepared = prepare(nn.Linear(2, 1), config)
    calibrate(prepared, batches)
    assert prepared.input_fake_quant.scale.item() == pytest.approx(5 / 255)
    assert prepared.input_fake_quant.zero_point.item() == -128 + 102
    calibrate(prepared, [(batch, "label") for batch in batches], method="moving_average")
    low, high = -1 + 0.1 * -1, 3 + 0.1 * -2
    assert prepared.input_fake_quant.scale.item() == pytest.approx((high - low) / 255)
    calibrate(prepared, [{"input": batch} for batch in batches])
    assert prepared.input_fake_quant.scale.item() == pytest.approx(5 / 255)
    ema = prepare(nn.Linear(2, 1), QConfig(input=QSpec(8, symmetric=False, quantizer="ema")))
    calibrate(ema, batches)
    assert (ema.input_fake_quant.running_min.item(), ema.input_fake_quant.running_max.item()) == (-2, 3)


def test_calibrate_sees_what_the_float_model_sees_and_restores_modes():
    torch.manual_seed(0)
    model, x = ConvNet(), images()
    prepared = prepare(model, QConfig(QSpec(2), QSpec(2, symmetric=False, quantizer="minmax")))
    prepared.norm1.eval()
    modes = [module.training for module in prepared.modules()]
    running = prepared.norm2.running_mean.clone()
    calibrate(prepared, [x])
    assert [module.training for module in prepared.modules()] == modes
    assert torch.equal(prepared.norm2.running_mean, running)
    model.eval()
    hidden = F.relu(model.norm1(model.conv1(x)))
    assert prepared.conv2.input_fake_quant.scale.item() == pytest.approx(hidden.max().item() / 3)


def test_calibrate_takes_weights_that_were_loaded_after_prepare():
    torch.manual_seed(0)
    prepared, trained = prepare(nn.Linear(4, 3)), nn.Linear(4, 3)
    prepared.load_state_dict(trained.state_dict(), strict=False)
    calibrate(prepared, [torch.randn(2, 4)])
    expected = trained.weight.detach().abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(prepared.weight_fake_quant.scale.detach(), expected)


def test_calibrate_errors_leave_the_scales_as_they_were():
    torch.manual_seed(0)
    prepared, x = prepare(ConvNet()), images()
    calibrate(prepared, [x])
    before = snapshot(prepared)
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="batches: got none"):
        calibrate(prepared, [])
    with pytest.raises(ValueError, match="batches: the input of layer 'conv1' holds NaN"):
        calibrate(prepared, [2 * x, poisoned])
    with pytest.raises(ValueError, match="method: got 'entropy'"):
        calibrate(prepared, [x], method="entropy")
    with pytest.raises(TypeError, match="batches: got a str"):
        calibrate(prepared, ["x"])
    assert_unchanged(prepared, before)
    with torch.no_grad():
        assert torch.isfinite(prepared(x)).all()  # quantizers run their own forward again


def test_convert_before_calibrate():
    prepared = prepare(ConvNet())
    before = snapshot(prepared)
    with pytest.raises(ValueError, match=r"'conv1.input_fake_quant' is not calibrated.*qk\.calibrate"):
        convert(prepared)
    assert_unchanged(prepared, before)
    with pytest.raises(RuntimeError, match=r"conv1\.input_fake_quant: .* has no scale yet; .*qk\.calibrate"):
        prepared.eval()(images())
    observing = prepare(ConvNet(), QConfig(input=QSpec(symmetric=False, quantizer="ema")))
    with pytest.raises(ValueError, match="not calibrated"):
        convert(observing)
    observing(images())  # one training step is calibration enough
    convert(observing)


def test_layer_that_no_batch_reached_is_named():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    prepared = prepare(Unused())
    with pytest.warns(UserWarning, match=r"no batch reached unused\.weight_fake_quant, unused\.input_fake_quant"):
        calibrate(prepared, [torch.ones(1, 2)])
    with pytest.raises(ValueError, match=r"'unused\.input_fake_quant' is not calibrated"):
        convert(prepared)


def test_layers_that_attention_reads_stay_in_float():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"attention.out_proj \(MultiheadAttention.forward reads its weight"):
        prepared = prepare(model)
    assert type(prepared["attention"].out_proj) is type(attention.out_proj)
    assert "stays float" in report(prepared).notes["attention.out_proj"]


def test_report_by_hand():
    torch.manual_seed(0)
    model, x = ConvNet().eval(), images()
    prepared = prepare(model, QConfig(QSpec(4), QSpec(8, symmetric=False, quantizer="minmax"), rules=[("fc", None)]))
    calibrate(prepared, [x])
    made = report(prepared, 2 * x, float_model=model, accuracy=0.5)
    rows = {row.name: row for row in made.layers}
    conv = prepared.conv1
    weight, quantized = conv.weight.detach(), conv.weight_fake_quant(conv.weight).detach()
    expected = 10 * math.log10(weight.square().sum() / (weight - quantized).square().sum())
    assert rows["conv1"].weight_sqnr == pytest.approx(expected, abs=1e-3)
    scale, zero_point = conv.input_fake_quant.qparams()
    codes = (2 * x / scale).round() + zero_point
    assert rows["conv1"].input_clipped == pytest.approx(((codes < -128) | (codes > 127)).float().mean().item())
    assert rows["conv1"].input_clipped > 0
    with torch.no_grad():
        y, reference = prepared.conv1.eval()(2 * x), model.conv1(2 * x)
        norm = model.norm1(reference)
    expected = 10 * math.log10(reference.square().sum() / (y - reference).square().sum())
    assert rows["conv1"].output_sqnr == pytest.approx(expected, abs=1e-3)
    assert (rows["fc"].weight_bits, rows["fc"].input_bits) == (None, None)
    assert made.float_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # conv1: 216 4-bit codes, 8 scales, 8 biases (folded), scale and zero point of the input; conv2: 216 and 12; and of
    # both what the codes stand for: bits, four dims and the input's range.
    fc, form = 4 * (12 * 16 * 5 + 5), 4 * 7
    assert made.quantized_bytes == (108 + 4 * 8 + 4 * 8 + 8 + form) + (108 + 4 * 12 + 4 * 12 + 8 + form) + fc
    converted = convert(prepared)
    again = report(converted, 2 * x, float_model=model)
    assert again.quantized_bytes == made.quantized_bytes
    assert again.float_bytes == made.float_bytes
    rows = {row.name: row for row in again.layers}
    factor = (model.norm1.weight / (model.norm1.running_var + 1e-5).sqrt()).detach().reshape(-1, 1, 1, 1)
    expected = 10 * math.log10((factor * weight).square().sum() / (factor * (weight - quantized)).square().sum())
    assert rows["conv1"].weight_sqnr == pytest.approx(expected, abs=1e-2)
    expected = 10 * math.log10(norm.square().sum() / (converted.conv1(2 * x) - norm).square().sum())
    assert rows["conv1"].output_sqnr == pytest.approx(expected, abs=1e-2)
    parsed = json.loads(json.dumps(made.to_dict()))
    assert parsed["accuracy"] == 0.5
    assert parsed["ratio"] == pytest.approx(made.float_bytes / made.quantized_bytes)
    lines = str(made).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert "50.00%" in str(made)


def test_report_counts_the_bytes_of_an_8_bit_state_dict():
    torch.manual_seed(0)
    prepared = prepare(ConvNet())
    calibrate(prepared, [images()])
    converted = convert(prepared)
    size = sum(t.numel() * t.element_size() for t in converted.state_dict().values())
    assert report(converted).quantized_bytes == size
    assert report(prepared).quantized_bytes == size


def test_report_leaves_the_model_as_it_was_and_compares_it_with_itself():
    torch.manual_seed(0)
    prepared, x = prepare(ConvNet()), images()
    calibrate(prepared, [x])
    prepared.train()
    prepared.norm1.eval()
    before = snapshot(prepared)
    made = report(prepared, x)
    assert_unchanged(prepared, before)
    assert all(25 < row.output_sqnr < 60 for row in made.layers)
    low = prepare(ConvNet(), QConfig(QSpec(2), QSpec(2, symmetric=False)))
    calibrate(low, [x])
    assert all(row.output_sqnr < 20 for row in report(low, x).layers)


def test_prepared_model_compiles_and_copies():
    torch._dynamo.reset()
    torch.manual_seed(0)
    prepared, x = prepare(ConvNet()), images()
    calibrate(prepared, [x])
    prepared.eval()
    compiled = torch.compile(copy.deepcopy(prepared), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), prepared(x), rtol=1e-4, atol=1e-4)
