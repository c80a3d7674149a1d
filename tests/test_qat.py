"""prepare, calibrate and report: rules, ranges and errors; the model that was given stays as it was."""

import copy
import json
import math

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, snapshot
from torch import nn
from torch.nn import functional as F

from qkernels.nn import (
    Int4Embedding,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConv2d,
    QATLinear,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report


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
    with pytest.raises(ValueError, match=r"'1\.O' matches no module and no parameter.*did you mean '1\.[01]'"):
        prepare(model, QConfig(rules=[("1.O", None)]))
    with pytest.warns(UserWarning, match="Conv3d matches no module"):
        prepare(model, QConfig(rules=[(nn.Conv3d, None)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QSpec(1), "bits: got 1"),
        (lambda: QSpec(quantizer="dorefer"), "quantizer: got 'dorefer'; .*; did you mean 'dorefa'"),
        (lambda: QConfig(rules=[("fc", {"bias": 8})]), r"rules\[0\]: got the key 'bias'"),
        (
            lambda: prepare(nn.Linear(2, 2), QConfig(rules=[("", {"weight": {"bit": 4}})])),
            r"rules\[0\], weight: got the key 'bit'.*did you mean 'bits'",
        ),
        (lambda: prepare(nn.ReLU()), "holds no layer"),
        (lambda: prepare(nn.Linear(2, 2), QConfig(None, None)), "holds no layer"),
        (lambda: prepare(prepare(nn.Linear(2, 2))), "prepared already"),
        (
            lambda: prepare(nn.Linear(2, 2), QConfig(input=QSpec(8, PerToken()))),
            'PerToken.*="lsq".*="dynamic"',
        ),
        (
            lambda: prepare(nn.Linear(2, 2), QConfig(input=QSpec(8, PerChannel()))),
            r"layer '' \(Linear\): input granularity: got PerChannel",
        ),
        (
            lambda: prepare(nn.Conv2d(2, 2, 1), QConfig(input=QSpec(8, PerToken(), quantizer="dynamic"))),
            r"layer '' \(Conv2d\): input granularity: got PerToken",
        ),
        (lambda: prepare(nn.Linear(2, 2), QConfig(QSpec(8, PerToken()))), "weight granularity"),
        (lambda: prepare(nn.Linear(2, 2), QConfig(QSpec(8, PerChannel(2)))), "an axis of the tensor"),
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
    with pytest.raises(ValueError, match=r"batches\[1\]: the input of layer 'conv1' holds NaN"):
        calibrate(prepared, [2 * x, poisoned])
    with pytest.raises(ValueError, match="method: got 'kl'"):
        calibrate(prepared, [x], method="kl")
    with pytest.raises(TypeError, match=r"batches\[0\]: got a str"):
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


def test_layers_that_a_float_attention_reads_stay_in_float():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"attention.out_proj \(MultiheadAttention.forward reads its weight"):
        prepared = prepare(model, QConfig(rules=[("attention", None)]))
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
