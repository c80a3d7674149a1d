"""Int8Conv3d and the transposed convolutions: values by hand, gradients, memory, what they refuse, their programs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import qkernels as qk
from qkernels.nn import (
    Int8Conv3d,
    Int8ConvTranspose1d,
    Int8ConvTranspose2d,
    Int8ConvTranspose3d,
    PerChannel,
    PerGroup,
    PerTensor,
    QATConvTranspose2d,
)
from qkernels.ops import int8_convolution
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report
from qkernels.qat.fuse import fused_parts

KINDS = {kind.float_class: kind for kind in (Int8Conv3d, Int8ConvTranspose1d, Int8ConvTranspose2d, Int8ConvTranspose3d)}
UP = nn.ConvTranspose2d
# Names of layers: each with the shape of an input.
LAYERS: dict[str, Any] = {
    "3d": lambda: (nn.Conv3d(3, 5, 3, padding=1), (2, 3, 4, 5, 6)),
    "3d strided": lambda: (nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), (0, 1, 2), (1, 2, 1), groups=2), (2, 4, 3, 7, 5)),
    "3d depthwise": lambda: (nn.Conv3d(17, 17, 3, padding=(2, 0, 1), groups=17, bias=False), (1, 17, 3, 4, 5)),
    "3d one side more": lambda: (nn.Conv3d(3, 4, (2, 3, 4), padding="same"), (2, 3, 3, 5, 4)),
    "3d circular": lambda: (nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 3, 4, 5)),
    "3d reflect": lambda: (nn.Conv3d(2, 3, 3, padding=(1, 0, 2), padding_mode="reflect"), (2, 2, 3, 4, 5)),
    "3d replicate": lambda: (nn.Conv3d(2, 3, 2, padding="same", padding_mode="replicate"), (2, 2, 3, 4, 5)),
    "3d unbatched": lambda: (nn.Conv3d(2, 3, 2, dilation=2), (2, 4, 5, 3)),
    "up1d": lambda: (nn.ConvTranspose1d(3, 5, 4, 2, 1, output_padding=1), (4, 3, 7)),
    "up1d unbatched": lambda: (nn.ConvTranspose1d(3, 5, 3, bias=False), (3, 7)),
    "up2d": lambda: (UP(8, 40, 3, 2, 1, 1), (2, 8, 5, 6)),
    "up2d gaps": lambda: (UP(4, 5, (1, 2), (3, 4)), (2, 4, 3, 5)),
    "up2d groups": lambda: (UP(6, 9, (3, 2), (2, 1), (1, 0), (1, 0), groups=3), (2, 6, 5, 4)),
    "up2d depthwise": lambda: (UP(4, 4, 3, 2, 1, groups=4, dilation=2, bias=False), (3, 4, 5, 5)),
    "up2d multiplied": lambda: (UP(3, 12, 4, 2, 1, groups=3), (3, 3, 5, 5)),
    "up2d dilated": lambda: (UP(4, 3, 3, (2, 1), (3, 0), (1, 2), dilation=(2, 3)), (2, 4, 5, 3)),
    "up2d unbatched": lambda: (UP(2, 3, 2, 2), (2, 5, 3)),
    "up3d": lambda: (nn.ConvTranspose3d(2, 3, 2, (1, 2, 1)), (2, 2, 3, 4, 2)),
}


def made(kind: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    return layer, torch.randn(shape) + 0.3


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_computes_on_the_integers(kind: str, act_bits: int) -> None:
    layer, x = made(kind)
    config = QConfig(QSpec(8), QSpec(8, symmetric=False) if act_bits == 8 else None)
    prepared = prepare(layer, config)
    calibrate(prepared, [x])
    converted: Any = convert(prepared)
    assert type(converted) is KINDS[type(layer)]
    assert converted.act_bits == act_bits
    codes, scale, _ = prepared.weight_fake_quant.quantize(layer.weight)
    assert torch.equal(converted.codes, codes)
    hand = copy.deepcopy(layer).double()
    hand.weight.data = codes.double() * scale.double()
    values = x.double()
    if act_bits == 8:
        q, s, z = prepared.input_fake_quant.quantize(x)
        values = (q.double() - z.double()) * s.double()
    with torch.no_grad():
        y, expected = converted(x), hand(values)
        assert y.stride() == layer(x).stride()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(converted(x.double()), expected, rtol=1e-6, atol=1e-6)
        for dtype in (torch.bfloat16, torch.float16):
            half = converted(x.to(dtype))
            assert half.dtype == dtype
            if act_bits == 8:
                assert torch.equal(half, converted(x.to(dtype).float()).to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert converted(x).dtype == layer(x).dtype == torch.bfloat16
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        torch.testing.assert_close(converted(strided), y, rtol=0, atol=0 if act_bits == 8 else 1e-5)
        if x.dim() == layer.weight.dim():
            assert converted(x[:0]).shape == layer(x[:0]).shape
        for again in (pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
            assert torch.equal(again(x), y)
        fresh = KINDS[type(layer)].like(layer, act_bits=act_bits, input=copy.deepcopy(prepared.input_fake_quant))
        fresh.load_state_dict(converted.state_dict())
        assert torch.equal(fresh(x), y)
        assert str(fresh) == str(converted)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_float_layer(kind: str) -> None:
    layer, x = made(kind)
    converted = KINDS[type(layer)].from_float(layer)
    twin = copy.deepcopy(layer)
    twin.weight.data = converted.weight
    a, b = (x.clone().requires_grad_() for _ in range(2))
    y, expected = converted(a), twin(converted._input_values(b))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    if layer.bias is not None:
        torch.testing.assert_close(converted.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)
    assert {name for name, p in converted.named_parameters() if p.grad is not None} <= {"bias"}
    fixed: Any = convert(ready(layer, x))
    tangent = torch.randn_like(x)
    value, slope = torch.func.jvp(fixed, (x,), (tangent,))
    assert torch.equal(value, fixed(x))
    probe = x.clone().requires_grad_()
    fixed(probe).backward(dy)
    torch.testing.assert_close((slope * dy).sum(), (probe.grad * tangent).sum(), rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.func.vmap(fixed)(torch.stack([x, -x]))[1], fixed(-x))


def ready(layer: nn.Module, *inputs: torch.Tensor, config: QConfig | None = None) -> Any:
    prepared = prepare(layer, config)
    calibrate(prepared, [inputs])
    return prepared.eval()


@pytest.mark.parametrize("kind", ["3d", "3d strided", "up2d", "up2d gaps", "up3d"])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_memory_formats_are_those_of_the_float_layer(kind: str, act_bits: int) -> None:
    layer, x = made(kind)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
    y = None
    for weight in (torch.contiguous_format, last):
        for input in (torch.contiguous_format, last):
            own, given = copy.deepcopy(layer).to(memory_format=weight), x.contiguous(memory_format=input)
            for converted in (
                KINDS[type(layer)].from_float(own, act_bits=act_bits),
                KINDS[type(layer)].from_float(layer, act_bits=act_bits).to(memory_format=weight),
            ):
                found = converted(given)
                assert found.stride() == own(given).stride()
                y = found if y is None else y
                torch.testing.assert_close(found, y, rtol=0, atol=0 if act_bits == 8 else 1e-5)


@pytest.mark.parametrize("kind", ["3d strided", "up2d groups"])
def test_nan_and_infinity(kind: str) -> None:
    layer, x = made(kind)
    converted: Any = convert(ready(layer, x))
    with torch.no_grad():
        y = converted(x)
        x[0, 0, 0, 0] = torch.nan
        assert converted(x)[0].isnan().all()
        assert torch.equal(converted(x)[1], y[1])
        x[0, 0, 0, 0] = torch.inf
        large = x.nan_to_num(posinf=1e4)
        assert torch.equal(converted(x), converted(large))
        converted.bias[0] = torch.nan
        assert converted(large).isnan().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_plain_torch_gives_the_programs_bits(kind: str) -> None:
    """What torch.func and a GPU get."""
    layer, x = made(kind)
    if x.dim() < layer.weight.dim() or layer.padding_mode != "zeros" or layer.padding == "same":
        return
    converted: Any = convert(ready(layer, x))
    geometry = converted._geometry(layer.stride, layer.padding, layer.dilation, layer.output_padding)
    arguments = [converted.data, converted.colsum, converted.scale.detach(), converted.bias, converted.input_scale]
    arguments += [converted.input_zero_point, converted.quant_min, converted.quant_max, geometry]
    broken = x.clone()
    broken[-1] = torch.nan
    with torch.no_grad():
        for given in (x, broken, x.bfloat16()):
            own, program = (f(given, *arguments) for f in (int8_convolution._on_integers, int8_convolution._convolved))
            torch.testing.assert_close(own, program, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [pytest.param("3d", marks=pytest.mark.nightly), "up2d groups"])
def test_it_is_traced_compiled_and_exported(kind: str) -> None:
    layer, x = made(kind)
    converted: Any = convert(ready(layer, x))
    torch._dynamo.reset()
    with torch.no_grad():
        y, two = converted(x), torch.cat([x, x])
        free = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
        assert torch.equal(free(two)[2:], y)
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(converted))(x), y)
    leaf, own = (x.clone().requires_grad_() for _ in range(2))
    torch.compile(converted, fullgraph=True, backend="aot_eager")(leaf).square().sum().backward()
    converted(own).square().sum().backward()
    torch.testing.assert_close(leaf.grad, own.grad)


def test_output_size() -> None:
    layer, x = UP(3, 4, 3, 2, 1), torch.randn(2, 3, 5, 6)
    prepared = ready(layer, x)
    converted: Any = convert(prepared)
    with torch.no_grad():
        for size in ([9, 11], [10, 12], (2, 4, 9, 12), None):
            for y in (converted(x, size), converted(x, output_size=size)):
                torch.testing.assert_close(y, prepared(x, size), rtol=1e-5, atol=1e-5)
        traced = torch.fx.symbolic_trace(Sized(converted))
        assert torch.equal(traced(x), converted(x, [10, 11]))
    with pytest.raises(ValueError, match="requested an output size"):
        converted(x, [13, 12])


class Sized(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x, [10, 11])


def test_bad_input() -> None:
    up, conv = Int8ConvTranspose2d.from_float(UP(3, 4, 3)), Int8Conv3d.from_float(nn.Conv3d(3, 4, 2))
    for layer, shape, accepted in ((up, (2, 4, 5, 5), "[N, 3, H, W]"), (conv, (1, 2, 5, 5, 5), "[N, 3, D, H, W]")):
        with pytest.raises(RuntimeError, match=r"got shape .*; accepted: ") as error:
            layer(torch.randn(shape))
        assert accepted in str(error.value)
    with pytest.raises(RuntimeError, match="accepted: at least the dilated kernel's, 2"):
        conv(torch.randn(1, 3, 1, 4, 4))
    with pytest.raises(RuntimeError, match="output_padding: got 2; accepted: less than the stride or the dilation, 2"):
        Int8ConvTranspose2d(3, 4, 3, 2, output_padding=2)(torch.randn(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="accepted: a floating dtype"):
        up(torch.zeros(1, 3, 4, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="Only"):
        Int8ConvTranspose2d(3, 4, 3, padding_mode="reflect")
    with pytest.raises(RuntimeError, match=r"codes: got .*; accepted: torch.int8 of shape \[3, 4, 3, 3\]"):
        up.set_weight(torch.zeros(4, 3, 3, 3, dtype=torch.int8), torch.ones(4), None)


# The layer, the weight's spec, and why it stays in float (None: it does not).
SCALES = {
    "one": (UP(4, 6, 3, groups=2), QSpec(8, PerTensor()), None),
    "outputs": (UP(4, 6, 3, groups=2), QSpec(8, PerChannel(1)), None),
    "outputs, counted from the end": (UP(4, 6, 3), QSpec(8, PerChannel(-3)), None),
    "inputs": (UP(4, 6, 3), QSpec(8, PerChannel(0)), "one scale for each output channel"),
    "rows of a depthwise one": (UP(4, 8, 3, groups=4), QSpec(8, PerChannel(0)), None),
    "both of a depthwise one": (UP(4, 8, 3, groups=4), QSpec(8, PerChannel((0, 1))), None),
    "both": (UP(4, 8, 3, groups=2), QSpec(8, PerChannel((0, 1))), "one scale for each output channel"),
    "taps": (UP(4, 8, 3), QSpec(8, PerChannel((1, 2))), "one scale for each output channel"),
    "groups of taps": (UP(4, 6, 4), QSpec(8, PerGroup(2)), "one scale for each output channel"),
    "zero points": (UP(4, 6, 3), QSpec(8, symmetric=False), "symmetric=True"),
    "no integers": (UP(4, 6, 3), QSpec(4, quantizer="nf4"), "no integers times a scale"),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", SCALES)
def test_scales_of_output_channels(kind: str, norm: bool) -> None:
    torch.manual_seed(0)
    layer, spec, reason = SCALES[kind]
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(2, 4, 5, 4)
    if norm:
        model.append(nn.BatchNorm2d(layer.out_channels))
        for t in (model[1].weight, model[1].running_mean):
            t.data.normal_()
    for input in (QSpec(8, symmetric=False), None):
        prepared = ready(model, x, config=QConfig(spec, input))
        converted: Any = convert(prepared)
        without_input = reason == "symmetric=True" and input is None
        note = report(prepared).notes.get("0", "")
        assert isinstance(converted[0], Int8ConvTranspose2d) == (reason is None or without_input)
        assert (reason is None or without_input) or reason in note
        if norm:
            in_float = isinstance(converted[0], Int8ConvTranspose2d) and input is None
            assert isinstance(converted[1], nn.Identity) is not in_float
        with torch.no_grad():
            torch.testing.assert_close(converted(x), prepared(x), rtol=1e-5, atol=2e-5)
            if isinstance(converted[0], Int8ConvTranspose2d) and not isinstance(converted[-1], nn.Identity):
                weight = prepared[0].weight_fake_quant(prepared[0].weight)
                torch.testing.assert_close(converted[0].weight, weight, rtol=1e-6, atol=0)


class Doubled(UP):
    def forward(self, input, output_size=None):
        return 2 * super().forward(input, output_size)


class Named(UP):
    """A subclass without a forward of its own."""


class Padded(nn.Conv3d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0, 1, 0))) + 1


def test_subclasses_and_parametrizations() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4)
    prepared = ready(nn.Sequential(Doubled(3, 4, 3), Named(4, 3, 2)), x)
    converted: Any = convert(prepared)
    assert [type(layer).__name__ for layer in converted] == ["QATDoubled", "Int8ConvTranspose2d"]
    assert isinstance(converted[0], QATConvTranspose2d)
    assert "its forward is its own" in report(converted).notes["0"]
    torch.testing.assert_close(converted(x), prepared(x), rtol=1e-5, atol=1e-5)
    video = torch.randn(2, 3, 3, 4, 5)
    prepared = ready(Padded(3, 4, 3), video)
    converted = convert(prepared)
    assert type(converted).__name__ == "Int8Padded"
    torch.testing.assert_close(converted(video), prepared(video), rtol=1e-5, atol=1e-5)
    prepared = ready(parametrizations.weight_norm(UP(3, 4, 3), dim=1), x)
    converted = convert(prepared)
    assert type(converted) is Int8ConvTranspose2d
    torch.testing.assert_close(converted(x), prepared(x), rtol=1e-5, atol=1e-5)


def test_outputs_stay_quantized() -> None:
    for kind in ("3d", "up1d"):
        layer, x = made(kind)
        prepared = ready(layer, x, config=QConfig(output=QSpec(5, symmetric=False)))
        converted: Any = convert(prepared)
        step = float(converted.output_fake_quant.qparams()[0])
        error = (converted(x) - prepared(x)).abs()
        assert converted(x).unique().numel() <= 32
        assert (error > step / 2).float().mean() <= 0.02, "more than near ties"
        assert error.max() <= 1.01 * step


class Decoder(nn.Module):
    """Sums and joins what comes up with what was kept, and interpolates in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.side = nn.Conv2d(3, 6, 2, 2), UP(6, 4, 3, 2, 1, 1), nn.Conv2d(3, 4, 1)
        self.last = UP(8, 3, 2, 2, groups=1)
        self.smooth = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x):
        y = F.relu(self.up(F.relu(self.down(x))) + self.side(x))
        z = self.last(torch.cat([y, self.side(x)], 1))
        z = z + self.smooth(x) + F.interpolate(x, scale_factor=(2, 2), mode="bilinear")
        return z, F.interpolate(z, size=(9, 9))


def test_programs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6)
    converted: Any = convert(ready(Decoder(), x))
    (part,) = fused_parts(converted).values()
    (plan,) = part.plans
    steps = [line.split(" ")[0] for line in plan.splitlines()]
    assert (steps.count("conv_transpose"), steps.count("resize"), steps.count("conv")) == (2, 2, 3)
    assert "residual=" in plan
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:0], torch.randn(1, 3, 2, 2)):
        with torch.no_grad():
            fused = converted(given)
            assert part.refused is None
            apart = Decoder.forward(converted, given)
            for a, b in zip(fused, apart, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_video_model_is_one_program_in_every_memory_format() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv3d(2, 6, 3, 2, 1, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.ConvTranspose3d(6, 3, 2, 2)]
    model, x = nn.Sequential(*layers, nn.Hardswish()), torch.randn(2, 2, 4, 6, 5)
    model(x)
    prepared = ready(model, x)
    converted: Any = convert(prepared)
    (part,) = fused_parts(converted).values()
    assert [len(part.plans), part.plans[0].count("conv")] == [1, 2]
    with torch.no_grad():
        y = converted(x)
        torch.testing.assert_close(y, prepared(x), rtol=1e-4, atol=1e-4)
        last = x.contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(converted(last), y)
        assert converted(last).is_contiguous(memory_format=torch.channels_last_3d)
    assert qk.exact(prepared)(x).equal(y)
