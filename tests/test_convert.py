"""convert: converted models compute what the prepared ones do, with batch norms folded, on int8 and int4."""

import re

import pytest
import torch
from qat_models import ConvNet, assert_same_numbers, assert_unchanged, images, one_layer, randomize, snapshot
from torch import nn
from torch.nn import functional as F

from qkernels.nn import (
    Int4Linear,
    Int8Conv2d,
    Int8Linear,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATLinear,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report
from qkernels.qat.fold import find_folds

KINDS = ("lsq", "minmax", "ema", "dynamic")


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
        assert "straight from a convolution" in notes["alone"]
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
    ("spec", "reason"),
    [
        (QSpec(5, PerGroup(16)), r"its weight has PerGroup\(size=16\); the int8 kernels take PerChannel\(0\)"),
        (QSpec(8, symmetric=False), "its weight is quantized with a zero point"),
        (
            QSpec(4, PerGroup(8)),
            r"has PerGroup\(size=8\); group_size: got 8; accepted: .* K = 48, or a multiple of 8",
        ),
        (QSpec(2, PerGroup(12), symmetric=False), r"has PerGroup\(size=12\); group_size: got 12; accepted"),
        (QSpec(8, PerChannel(1)), r"its weight has PerChannel\(axis=1\)"),
    ],
)
@pytest.mark.parametrize("input", [QSpec(quantizer="dynamic"), None])
def test_weights_that_the_kernels_do_not_take_are_burnt_in(spec, reason, input):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 8))
    prepared = prepare(model, QConfig(spec, input))
    x = torch.randn(4, 48)
    converted = convert(prepared)
    if input is None and spec.bits > 4 and spec.granularity != PerChannel(1):
        assert type(converted[0]) is Int8Linear
        return
    quantizer = prepared[0].weight_fake_quant.eval()
    assert torch.equal(converted[0].weight, quantizer(model[0].weight))
    assert torch.equal(converted(x), prepared.eval()(x))
    assert type(converted[0]) is (nn.Linear if input is None else QATLinear)
    for made in (report(prepared), report(converted)):
        assert re.search(reason, made.notes["0"])
    converted.load_state_dict(converted.state_dict())
    assert report(prepared).quantized_bytes == report(converted).quantized_bytes


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
