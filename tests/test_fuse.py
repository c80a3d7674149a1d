"""Programs of converted models: the same bits as layer by layer, and what the prepared model computes."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from wild_cnns import CNNS, conv_bn
from wild_models import WILD

import qkernels as qk
from qkernels.nn import FakeQuantize, QATLayer
from qkernels.nn.int8 import Int8Convolution
from qkernels.nn.quantized import QuantizedLayer
from qkernels.qat.fuse import FusedForward, fused_parts

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
# Models without two operations in a row that a program runs, and those whose layers in float are not counted on.
NONE = ("StyleTransfer",)
LEFT = ("ConvNeXt", "ASPP")  # parts of them cannot be traced, or stay apart


def own(model: nn.Module, *inputs: Any) -> list[torch.Tensor]:
    """The results of the module's own forward, layer by layer."""
    kept = [(module, vars(module).pop("forward")) for module in model.modules() if "forward" in vars(module)]
    try:
        return tensors(model(*inputs))
    finally:
        for module, forward in kept:
            module.__dict__["forward"] = forward


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def made(model: nn.Module, inputs: tuple[Any, ...], config: Any = None) -> tuple[nn.Module, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = qk.prepare(model.eval(), config)
        qk.calibrate(prepared, [inputs], fallback=4.0)
    prepared.eval()
    return prepared, qk.convert(prepared)


def assert_fused(converted: nn.Module, *inputs: Any) -> None:
    """Programs run, and their results have the bits of those layer by layer (up to the last ones of sums of pools)."""
    with torch.no_grad():
        fused, apart = tensors(converted(*inputs)), own(converted, *inputs)
    parts = fused_parts(converted)
    assert parts
    assert [(part.reason, part.refused) for part in parts.values()] == [(None, None)] * len(parts)
    for a, b in zip(fused, apart, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) if b.numel() else 0.0)


ONE_PROGRAM = ("C3D", "UNet", "ConvAutoencoder", "DCGANGenerator", "ResNetBasic", "MobileNetV2")


@pytest.mark.parametrize("name", ONE_PROGRAM)
def test_networks_that_are_one_program(name: str) -> None:
    case = CNNS[name]
    _, converted = made(case.make(), case.inputs(), case.config(8))
    assert [len(part.plans) for part in fused_parts(converted).values()] == [1]
    assert not any(isinstance(module, QATLayer) for module in converted.modules())


@pytest.mark.parametrize("name", [name for name in CNNS if name not in NONE])
def test_networks(name: str) -> None:
    case = CNNS[name]
    prepared, converted = made(case.make(), case.inputs(), case.config(8))
    assert_fused(converted, *case.inputs())
    assert_layers(prepared, converted, case.inputs())


def assert_layers(prepared: nn.Module, converted: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Each integer layer, on the prepared layer's input, gives its result; and the codes of it, up to near ties."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = dict(converted.named_modules())
    handles = [
        module.register_forward_hook(lambda m, args, y, name=name: seen.__setitem__(name, (args[0], y)))
        for name, module in prepared.named_modules()
        if isinstance(layers.get(name), QuantizedLayer) and isinstance(module, CONVOLUTIONS | nn.Linear)
    ]
    with torch.no_grad():
        prepared(*inputs)
        for handle in handles:
            handle.remove()
        flipped = total = 0
        for name, (x, expected) in seen.items():
            layer = layers[name]
            folded = (
                isinstance(layer, Int8Convolution)
                and layer.bias is not None
                and prepared.get_submodule(name).bias is None
            )
            if folded:
                continue  # its BatchNorm's result is compared by the models' results
            y = layer(x)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
            scale = expected.abs().max().clamp(min=1e-12) / 127
            a, b = (y / scale).round(), (expected / scale).round()
            assert (a - b).abs().max() <= 1
            tie = ((expected / scale) % 1 - 0.5).abs()
            assert (tie[a != b] < 1e-3).all()
            flipped, total = flipped + int((a != b).sum()), total + a.numel()
    assert flipped <= max(1, 2e-4 * total)


class Views(nn.Module):
    """Shuffles and flattens by sizes, as torchvision does; overwrites; adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.size()
        y = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        y = F.relu(self.b(y), inplace=True)
        y += x
        z = self.c(y)
        F.relu_(y)
        z = torch.cat([*z.chunk(2, 1), y.split(4, 1)[1]], 1)[:, :8] + y
        z = F.max_pool2d(z, 2, ceil_mode=True)
        return self.fc(z.view(z.size(0), -1))


class Twice(nn.Module):
    """A layer called twice, and results that are also the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x, scale=None):
        y = F.hardswish(self.conv(x))
        z = F.leaky_relu(self.conv(y), 0.2)
        if scale is not None:
            z = z * scale
        return {"y": y, "z": (z, self.head(z.mean((2, 3))))}


def images(*shape: int) -> tuple[torch.Tensor]:
    return (torch.randn(*(shape or (3, 3, 8, 8))),)


@pytest.mark.parametrize("residual", [False, True])
def test_a_residual_network(residual: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8, act=nn.Identity)
            self.add, self.pool, self.fc = qk.nn.Add(), nn.AvgPool2d(2), nn.Linear(8 * 16, 5)

        def forward(self, x):
            x = self.stem(x)
            y = F.relu(self.add(self.two(self.one(x)), x))
            return self.fc(self.pool(y).flatten(1)), y

    config = qk.QConfig(residual=qk.QSpec(8)) if residual else None
    _, converted = made(Net(), images(), config)
    assert_fused(converted, *images())
    (plan,) = vars(converted)["forward"].plans
    assert ("residual=" in plan) == (not residual)


@pytest.mark.parametrize("kind", [Views, Twice])
def test_what_forwards_do(kind: type[nn.Module]) -> None:
    inputs = images(3, 4 if kind is Twice else 3, 8, 8)
    _, converted = made(kind(), inputs)
    assert_fused(converted, *inputs)
    if kind is Twice:
        with torch.no_grad():
            assert torch.equal(converted(*inputs, torch.ones(1))["y"], converted(*inputs)["y"])


class Scores(nn.Module):
    """Additive attention: sums of each query with each key, as many of the one as of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.value(torch.tanh(self.query(x).unsqueeze(2) + self.key(x).unsqueeze(1)))


class OneByOne(nn.Module):
    """Its body gets images without a batch, whose first and second dims are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, x):
        return self.body(torch.sin(x))


class OverwritesItsArgument(nn.Module):
    """The block's ReLU changes what is added to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        x = -x if x.sum() > 1e9 else x * 1
        return self.block(x) + x


class OverwritesLater(nn.Module):
    """What is read before it is overwritten is read with a result of the program, which waits for the overwriting."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = torch.sin(x)
        z = F.relu(self.a(x))
        angle = torch.atan2(z, y)
        y.clamp_(-0.1, 0.1)
        return angle, self.b(z + torch.cos(y))


class WritesToGiven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = F.relu(self.a(x))
        twice = torch.empty_like(y)
        torch.mul(y, 2, out=twice)
        return self.b(F.elu(y, 1.0, True)) + twice


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Scores, (2, 5, 8)),
        (OneByOne, (3, 3, 8)),
        (OverwritesItsArgument, (3, 3, 8, 8)),
        (OverwritesLater, (3, 3, 8, 8)),
        (WritesToGiven, (3, 3, 8, 8)),
    ],
)
def test_what_programs_cannot_do_is_left_to_the_layers(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    prepared, converted = made(kind(), (x,))
    with torch.no_grad():
        for got, expected in zip(tensors(converted(x)), tensors(prepared(x)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=0.02 * float(expected.abs().max()))


def shuffled(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(dim=1, sizes=(2, -1)).transpose(1, 2).flatten(1, 2)


def above_mean(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > x.mean(dim=None), x, -x)


@pytest.mark.parametrize("change", [shuffled, above_mean])
def test_calls_that_no_step_stands_for(change: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = conv_bn(3, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.head(change(self.body(x)))

    assert_fused(made(Net(), images())[1], *images())


def fused_net() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(conv_bn(3, 6), conv_bn(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return made(net, images())[1], images()[0]


def test_other_sizes_formats_and_batches() -> None:
    converted, _ = fused_net()
    for shape in ((1, 3, 9, 5), (5, 3, 8, 8), (0, 3, 8, 8), (2, 3, 40, 1)):
        x = torch.randn(shape)
        for given in (x, x.to(memory_format=torch.channels_last), torch.randn(*shape[:3], 2 * shape[3])[..., ::2]):
            assert_fused(converted, given)
    with pytest.raises(RuntimeError, match=r"accepted: \[N, 3, H, W\]"):
        converted(torch.randn(1, 4, 8, 8))


def test_hooks_and_new_modules_are_regarded() -> None:
    converted, x = fused_net()
    with torch.no_grad():
        expected, calls = converted(x), []
        handle = converted[1][0].register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(converted(x), expected)
        assert calls == [1]
        handle.remove()
        converted[4].register_forward_pre_hook(lambda m, args: (2 * args[0],))
        assert torch.equal(converted(x), torch.cat(own(converted, x)))
        converted[4] = nn.Identity()
        assert converted(x).shape == (3, 6)
        converted[1] = nn.Identity()
        torch.testing.assert_close(converted(x), torch.cat(own(converted, x)))


def test_modes_and_switches_of_modules_inside_are_regarded() -> None:
    net = nn.Sequential(conv_bn(3, 6), nn.Dropout(0.5), conv_bn(6, 6))
    _, converted = made(net, images(), qk.QConfig(output=qk.QSpec(8)))
    (x,) = images()
    with torch.no_grad():
        expected = converted(x)
        converted[1].train()
        assert not torch.equal(converted(x), expected)
        converted[1].eval()
        assert torch.equal(converted(x), expected)
        for quantizer in quantizers_of(converted):
            quantizer.disable_fake_quant()
        assert not torch.equal(converted(x), expected)
        torch.testing.assert_close(converted(x), torch.cat(own(converted, x)))


def test_values_may_change() -> None:
    """In place, by loading, and those of quantizers that were equal."""
    block = lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))  # noqa: E731
    (converted, x), (other, _) = ((made(block(), images())[1], images()[0]) for _ in range(2))
    with torch.no_grad():
        before = converted(x)
        converted[2].bias.add_(1)
        torch.testing.assert_close(converted(x), before + 1)
        converted.load_state_dict(other.state_dict())
        assert torch.equal(converted(x), other(x))

        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.a, self.b = (nn.Conv2d(3, 3, 1) for _ in range(3))

            def forward(self, x):
                x = self.stem(x)
                return self.a(x) + self.b(x)

        _, converted = made(Branches(), images())
        assert "equal" in vars(converted)["forward"].plans[0]
        converted(x)
        converted.b.input_scale.mul_(2)
        assert_fused(converted, x)
        assert "equal" not in vars(converted)["forward"].plans[0]


def test_copies_files_dtypes_and_gradients() -> None:
    converted, x = fused_net()
    with torch.no_grad():
        expected = converted(x)
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for model in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), loaded):
            assert torch.equal(model(x), expected)
            assert vars(model)["forward"].module is model
            assert vars(model)["forward"].plans
        half = copy.deepcopy(converted).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(half.float()(x), torch.cat(own(half, x)))
        assert converted(x.double()).dtype == torch.float64
    leaf = x.clone().requires_grad_()
    converted(leaf).square().sum().backward()
    twin = x.clone().requires_grad_()
    bias, converted[4].bias.grad = converted[4].bias.grad, None
    torch.cat(own(converted, twin)).square().sum().backward()
    assert torch.equal(leaf.grad, twin.grad)
    assert torch.equal(bias, converted[4].bias.grad)


def test_nan_and_infinity() -> None:
    converted, x = fused_net()
    x[1, 0, 0, 0] = torch.nan
    x[2, 0, 0, 0] = torch.inf
    with torch.no_grad():
        y = converted(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
        converted[1][0].bias[0] = torch.nan
        assert converted(x).isnan().all()


def test_threads_call_one_model() -> None:
    converted, _ = fused_net()
    xs = [torch.randn(2, 3, 8 + i, 8) for i in range(4)]
    with torch.no_grad():
        expected, found = [converted(x) for x in xs], [[] for _ in xs]
    threads = [threading.Thread(target=_call, args=(converted, x, into)) for x, into in zip(xs, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, want) for want, got in zip(expected, found, strict=True) for y in got)
    assert all(len(got) == 20 for got in found)


def _call(model: nn.Module, x: torch.Tensor, into: list[torch.Tensor]) -> None:
    with torch.no_grad():
        into += [model(x) for _ in range(20)]


def test_what_cannot_be_traced_is_fused_in_parts() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(conv_bn(3, 4), conv_bn(4, 4)), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            return self.head(self.body(x) if x.sum() > 0 else self.body(-x))

    _, converted = made(Branching(), images())
    assert list(fused_parts(converted)) == ["body"]
    assert "hand floats to each other" in qk.report(converted).notes[""]
    assert "control flow" in qk.report(converted).notes[""]
    assert_fused(converted, *images())


def quantizers_of(model: nn.Module) -> Iterator[FakeQuantize]:
    return (module for module in model.modules() if isinstance(module, FakeQuantize))


@pytest.mark.parametrize("name", ["MLPMixer", "GPT", "BERT", "M5", "TCN", "DLRM", "Siamese", "DuelingDQN"])
def test_other_models(name: str) -> None:
    case = WILD[name]
    _, converted = made(case.make(), case.inputs(), case.config(8))
    assert_fused(converted, *case.inputs())


def test_dropout_between_layers_that_take_any_dims() -> None:
    inputs = images(2, 5, 8)
    net = nn.Sequential(nn.Dropout(), nn.Linear(8, 6), nn.GELU(), nn.Dropout(), nn.Linear(6, 4))
    _, converted = made(net, inputs)
    assert_fused(converted, *inputs)
    (plan,) = vars(converted)["forward"].plans
    assert plan.count("linear ") == 2


def test_layers_alone_stay_as_they_are() -> None:
    _, converted = made(nn.Sequential(nn.Linear(4, 4)), images(2, 4))
    assert not fused_parts(converted)
    assert FusedForward(converted).plans == []


def test_report_says_that_a_program_refused_a_call() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x, y):
            return self.b(torch.relu(self.a(x)) + y)

    _, converted = made(Sum(), (*images(), *images()))
    assert "" not in qk.report(converted).notes
    with torch.no_grad():
        converted(*images(), torch.randn(3, 3, 8, 1))
    assert "a program refused a call" in qk.report(converted).notes[""]
