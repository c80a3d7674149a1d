"""Convolutions, transposed convolutions and Bilinear: values and gradients by hand, training, converting, saving."""

import copy
import pickle

import pytest
import torch
from qat_models import assert_same_numbers
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import Int8Conv1d, PerChannel, QATBilinear, QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report

MINMAX = QConfig(QSpec(8, quantizer="minmax"), QSpec(8, symmetric=False, quantizer="minmax"))
FOUR_BITS = QConfig(QSpec(4), QSpec(8, symmetric=False), QSpec(8))

LAYERS = {
    "conv1d": lambda: (nn.Conv1d(3, 5, 4, 2, 3), (4, 3, 13)),
    "conv1d depthwise dilated": lambda: (nn.Conv1d(6, 12, 3, dilation=2, groups=6, bias=False), (2, 6, 9)),
    "conv1d circular": lambda: (nn.Conv1d(4, 6, 3, padding=2, groups=2, padding_mode="circular"), (3, 4, 7)),
    "conv1d reflect": lambda: (nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect"), (3, 4, 7)),
    "conv1d replicate": lambda: (nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (3, 4, 7)),
    "conv1d unbatched": lambda: (nn.Conv1d(3, 5, 3, padding="same"), (3, 13)),
    "conv2d reflect": lambda: (nn.Conv2d(4, 6, 3, padding=(1, 2), groups=2, padding_mode="reflect"), (2, 4, 6, 5)),
    "conv2d unbatched": lambda: (nn.Conv2d(3, 4, 2, dilation=(1, 2)), (3, 6, 7)),
    "conv3d": lambda: (nn.Conv3d(2, 4, (1, 2, 3), (1, 2, 1), (0, 1, 2), groups=2), (2, 2, 3, 5, 4)),
    "conv3d circular": lambda: (nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 3, 4, 5)),
    "conv3d unbatched": lambda: (nn.Conv3d(2, 3, 2, dilation=2), (2, 4, 5, 3)),
    "up1d": lambda: (nn.ConvTranspose1d(3, 5, 4, 2, 1, output_padding=1), (4, 3, 7)),
    "up1d unbatched": lambda: (nn.ConvTranspose1d(3, 5, 3, bias=False), (3, 7)),
    "up2d groups": lambda: (nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 0), groups=2), (2, 4, 5, 4)),
    "up2d depthwise dilated": lambda: (nn.ConvTranspose2d(4, 4, 3, 2, 1, groups=4, dilation=2), (3, 4, 5, 5)),
    "up3d": lambda: (nn.ConvTranspose3d(2, 3, 2, (1, 2, 1)), (2, 2, 3, 4, 2)),
    "bilinear": lambda: (nn.Bilinear(6, 5, 4), (7, 6), (7, 5)),
    "bilinear 3-d": lambda: (nn.Bilinear(3, 5, 4, bias=False), (2, 4, 3), (2, 4, 5)),
}


def made(kind: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    layer, *shapes = LAYERS[kind]()
    return layer, [torch.randn(shape) + 0.3 for shape in shapes]


def channels_of(layer: nn.Module) -> tuple[int, ...]:
    """The dims of the weight whose indices have a scale each."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return (0,)
    return (0, 1) if layer.groups == layer.in_channels > 1 else (1,)


def quantized_by_hand(layer: nn.Module, inputs: list[torch.Tensor]) -> tuple[nn.Module, list[torch.Tensor]]:
    """A float layer and its inputs with the 8-bit values of their range, gradients passing straight through."""
    layer = copy.deepcopy(layer)
    w = layer.weight
    rest = tuple(dim for dim in range(w.dim()) if dim not in channels_of(layer))
    scale = w.detach().abs().amax(rest, keepdim=True) / 127
    values = (w.detach() / scale).round() * scale
    with torch.no_grad():
        w.copy_(values)
    made = []
    for x in inputs:
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        step = torch.tensor(high - low) / 255
        zero = (-128 - torch.tensor(low) / step).round()
        made.append((((x / step).round() + zero).clamp(-128, 127) - zero) * step)
    return layer, made


@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_by_hand(kind):
    layer, inputs = made(kind)
    prepared = prepare(layer, MINMAX)
    calibrate(prepared, [tuple(inputs)])
    hand, values = quantized_by_hand(layer, inputs)
    for mode in (True, False):
        prepared.train(mode).zero_grad()
        hand.zero_grad()
        xs, vs = [x.clone().requires_grad_() for x in inputs], [v.clone().requires_grad_() for v in values]
        y, expected = prepared(*xs), hand(*vs)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        for x, v in zip(xs, vs, strict=True):  # the extremes may round to a code beyond the range
            inside = (x != x.min()) & (x != x.max())
            torch.testing.assert_close(x.grad[inside], v.grad[inside], rtol=1e-4, atol=1e-5)
        for name, parameter in layer.named_parameters():
            ours, theirs = prepared.get_parameter(name).grad, hand.get_parameter(name).grad
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4), name
            assert parameter.grad is None


@pytest.mark.parametrize("config", [MINMAX, FOUR_BITS, QConfig(), QConfig(QSpec(3), None)], ids=repr)
@pytest.mark.parametrize("kind", LAYERS)
def test_trains_converts_and_loads(kind, config):
    layer, inputs = made(kind)
    prepared = prepare(layer, config)
    calibrate(prepared, [tuple(inputs)])
    goal = layer(*inputs).detach() * 0.5
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(prepared(*inputs), goal)
        loss.backward()
        for name, parameter in prepared.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    converted = convert(prepared)
    with torch.no_grad():
        expected = prepared.eval()(*inputs)
        y = converted(*inputs)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        other = prepare(layer, config)
        other.load_state_dict(prepared.state_dict())
        assert torch.equal(other.eval()(*inputs), expected)
        blank = convert(other)
        blank.load_state_dict(converted.state_dict())
        assert torch.equal(blank(*inputs), y)
        assert torch.equal(pickle.loads(pickle.dumps(prepared))(*inputs), expected)
        assert torch.equal(qk.exact(prepared)(*inputs), y)


@pytest.mark.parametrize("kind", ["up2d groups", "bilinear", "conv3d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(kind, dtype):
    layer, inputs = made(kind)
    layer, inputs = layer.to(dtype), [x.to(dtype) for x in inputs]
    prepared = prepare(layer)
    calibrate(prepared, [tuple(inputs)])
    y = prepared(*inputs)
    assert y.dtype == dtype
    y.sum().backward()
    hand, values = quantized_by_hand(layer, inputs)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y, hand(*values), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        y, expected = convert(prepared)(*inputs), prepared.eval()(*inputs)
        if kind == "bilinear":
            assert torch.equal(y, expected)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_output_size_and_an_empty_or_strided_input():
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 5, 6)
    prepared = prepare(layer, MINMAX)
    calibrate(prepared, [x])
    hand, (values,) = quantized_by_hand(layer, [x])
    for size in (None, [9, 11], [10, 12], (2, 4, 9, 12)):
        torch.testing.assert_close(prepared(x, size), hand(values, size), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prepared(x, output_size=[10, 11]), hand(values, [10, 11]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="requested an output size"):
        prepared(x, [13, 12])
    strided = torch.randn(3, 6, 5, 2).permute(3, 0, 2, 1)
    assert torch.equal(prepared(strided), prepared(strided.contiguous()))
    assert prepared(x[:0]).shape == (0, 4, 9, 11)
    for size in ([10, 12], (2, 4, 9, 12), None):
        y, expected = convert(prepared)(x, size), prepared.eval()(x, size)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(convert(prepared)(x, output_size=size), y)
    with pytest.raises(ValueError, match="requested an output size"):
        convert(prepared)(x, [13, 12])


def test_the_output_channels_of_a_transposed_convolution_have_the_scales():
    plain = prepare(nn.ConvTranspose2d(4, 6, 3))
    grouped = prepare(nn.ConvTranspose3d(4, 6, 3, groups=2))
    depthwise = prepare(nn.ConvTranspose1d(4, 8, 3, groups=4))
    assert (type(plain), type(grouped), type(depthwise)) == (
        QATConvTranspose2d,
        QATConvTranspose3d,
        QATConvTranspose1d,
    )
    assert plain.weight_fake_quant.scale.shape == (1, 6, 1, 1)
    assert grouped.weight_fake_quant.scale.shape == (1, 3, 1, 1, 1)
    assert depthwise.weight_fake_quant.scale.shape == (4, 2, 1)
    asked = prepare(nn.ConvTranspose2d(4, 6, 3), QConfig(QSpec(8, PerChannel(0))))
    assert asked.weight_fake_quant.scale.shape == (4, 1, 1, 1)
    assert plain.input_fake_quant.feature_dims == 3


def test_bilinear_quantizes_each_of_its_inputs():
    torch.manual_seed(0)
    model, first, second = nn.Bilinear(4, 3, 2), torch.randn(8, 4), 5 * torch.rand(8, 3)
    prepared = prepare(model, QConfig(rules=[(nn.Bilinear, {"input": {"bits": 5}, "output": QSpec(8)})]))
    assert type(prepared) is QATBilinear
    calibrate(prepared, [(first, second)])
    scales = [getattr(prepared, f"{role}_fake_quant").scale.item() for role in ("input", "input2")]
    spans = [float(x.max().clamp(min=0) - x.min().clamp(max=0)) for x in (first, second)]
    assert scales == pytest.approx([span / 31 for span in spans])
    assert prepared.output_fake_quant.is_calibrated
    text = str(report(prepared, (first, second)))
    assert "there is no integer kernel for Bilinear" in text
    back = prepared.to_float()
    assert (type(back), back.weight) == (nn.Bilinear, prepared.weight)
    assert not any("fake_quant" in key for key in back.state_dict())


class Doubled(nn.ConvTranspose2d):
    def forward(self, input, output_size=None):
        return 2 * super().forward(input, output_size)


class Other(nn.ConvTranspose2d):
    def forward(self, input, output_size=None):
        return F.conv_transpose2d(input, self.weight)


class Pair(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


def test_subclasses_that_call_their_parent():
    torch.manual_seed(0)
    model, x = nn.Sequential(Doubled(3, 4, 3), nn.Flatten(2), Pair(9, 9, 2)), torch.randn(2, 3, 1, 1)
    prepared = prepare(model, MINMAX)
    assert isinstance(prepared[0], Doubled)
    assert isinstance(prepared[0], QATConvTranspose2d)
    calibrate(prepared, [x])
    with torch.no_grad():
        first, hand = 2 * QATConvTranspose2d.forward(prepared[0], x), prepared[2]
        last = QATBilinear.forward(hand, first.flatten(2), first.flatten(2))
        assert torch.equal(prepared(x), last)
    converted = convert(copy.deepcopy(prepared))
    assert_same_numbers(converted, prepared, x)
    assert converted[0].weight.unique().numel() < model[0].weight.numel()
    with pytest.warns(UserWarning, match="the forward of Other does not call that of ConvTranspose2d"):
        kept = prepare(nn.Sequential(Other(3, 4, 3), nn.Conv2d(4, 4, 1)))
    assert type(kept[0]) is Other


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1))) + 1


OUTPUTS = {
    "int8 linear": lambda: (nn.Linear(9, 5), (6, 9), QConfig(), "Int8Linear"),
    "weight only": lambda: (nn.Linear(9, 5), (6, 9), QConfig(input=None), "Int8Linear"),
    "int4 linear": lambda: (nn.Linear(16, 5), (2, 3, 16), QConfig(QSpec(4)), "Int4Linear"),
    "int8 convolution": lambda: (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5), QConfig(), "Int8Conv2d"),
    "own forward": lambda: (Padded(3, 4, 3), (2, 3, 5, 5), QConfig(), "Int8Padded"),
}


@pytest.mark.parametrize("spec", [QSpec(5), QSpec(8, symmetric=False, quantizer="dynamic"), QSpec(6, quantizer="ema")])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_integer_layers_keep_the_quantizer_of_their_output(kind, spec):
    torch.manual_seed(0)
    model, shape, config, name = OUTPUTS[kind]()
    x = torch.randn(shape)
    prepared = prepare(model, QConfig(config.weight, config.input, spec))
    calibrate(prepared, [x])
    for _ in range(2):
        prepared(x).square().sum().backward()
    converted = convert(prepared)
    assert type(converted).__name__ == name
    with torch.no_grad():
        expected, y = prepared.eval()(x), converted(x)
        step = float(expected.diff(dim=-1).abs()[expected.diff(dim=-1) != 0].min())
        error = (y - expected).abs()
        assert (error > 1e-5).float().mean() <= 0.05, "more than near ties"
        assert error.max() <= 1.01 * step
        values = converted.output_fake_quant(y)
        torch.testing.assert_close(values, y, rtol=1e-6, atol=1e-6), "its result is on the grid"
        assert prepared(2 * x).unique().numel() <= 2**spec.bits
        again = pickle.loads(pickle.dumps(converted))
        assert torch.equal(again(x), y)
        before = {key: t.clone() for key, t in converted.state_dict().items()}
        assert converted.train()(3 * x).isfinite().all()
        assert all(torch.equal(t, before[key]) for key, t in converted.state_dict().items()), "ranges are fixed"
        assert converted.bfloat16().eval()(x.bfloat16()).dtype == torch.bfloat16


def test_a_batch_norm_behind_a_quantized_output_is_not_folded():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 5, 5)
    prepared = prepare(model, QConfig(output=QSpec(8)))
    calibrate(prepared, [x])
    prepared(x)
    converted = convert(prepared)
    assert type(converted[1]) is nn.BatchNorm2d
    assert_same_numbers(converted, prepared, x, flips=0.05)
    for model in (prepared, converted):
        assert "the output of 0 is quantized" in report(model).notes["1"]


class Causal(nn.Conv1d):
    """Pads on the left alone, as models of speech and text do."""

    def forward(self, x):
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind.startswith("conv1d")])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_int8_conv1d_computes_on_the_integers(kind, act_bits):
    layer, (x,) = made(kind)
    config = QConfig(QSpec(8), QSpec(8, symmetric=False) if act_bits == 8 else None)
    prepared = prepare(layer, config)
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert type(converted) is Int8Conv1d
    assert (converted.act_bits, converted.codes.dtype, converted.codes.shape) == (
        act_bits,
        torch.int8,
        layer.weight.shape,
    )
    codes, scale, _ = prepared.weight_fake_quant.quantize(layer.weight)
    assert torch.equal(converted.codes, codes)
    hand = copy.deepcopy(layer).double()
    with torch.no_grad():
        hand.weight.copy_(codes.double() * scale.double())
        values = x.double()
        if act_bits == 8:
            q, s, z = prepared.input_fake_quant.quantize(x)
            values = (q.double() - z.double()) * s.double()
        y, expected = converted(x), hand(values)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert y.is_contiguous()
        assert converted(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(converted(x.double()), expected, rtol=1e-6, atol=1e-6)
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert torch.equal(converted(strided), y)
        if x.dim() == 3:
            assert converted(x[:0]).shape == layer(x[:0]).shape
    inside, of = x.clone().requires_grad_(), x.clone().requires_grad_()
    dy = torch.randn_like(y)
    converted(inside).backward(dy)
    prepared.eval()(of).backward(dy)
    within = (x != x.min()) & (x != x.max())  # LSQ counts its bounds as clipped
    torch.testing.assert_close(inside.grad[within], of.grad[within], rtol=1e-4, atol=1e-5)


def test_causal_convolutions_keep_their_forward_on_the_integers():
    torch.manual_seed(0)
    model, x = nn.Sequential(Causal(3, 6, 3, dilation=2), nn.BatchNorm1d(6)), torch.randn(2, 3, 11)
    prepared = prepare(model, QConfig(output=None))
    calibrate(prepared, [x])
    prepared(x)
    converted = convert(prepared)
    assert type(converted[0]).__name__ == "Int8Causal"
    assert type(converted[1]) is nn.Identity
    assert_same_numbers(converted, prepared, x)
    late = x.clone()
    late[..., 6:] += 1
    with torch.no_grad():
        assert torch.equal(converted(late)[..., :6], converted(x)[..., :6])
        assert not torch.equal(converted(late), converted(x))
        assert torch.equal(pickle.loads(pickle.dumps(converted))(x), converted(x))
