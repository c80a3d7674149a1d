"""A MobileNetV2-like network for small images and its quantization-aware training with torch.ao, as users write it."""

from __future__ import annotations

import warnings

import torch
import torch.ao.quantization as tq
from torch import Tensor, nn

# expansion, channels, blocks, stride: MobileNetV2 (arXiv 1801.04381, table 2) with the strides of 32×32 images.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [*conv(inputs, hidden, 1), nn.ReLU()] if expansion > 1 else []
        layers += [*conv(hidden, hidden, 3, stride, hidden), nn.ReLU(), *conv(hidden, outputs, 1)]
        self.layers = nn.Sequential(*layers)
        self.skip = nn.quantized.FloatFunctional() if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if self.skip is None else self.skip.add(x, y)


class MobileNet(nn.Module):
    def __init__(self, width: float = 1.0, classes: int = 10, stages: tuple[tuple[int, ...], ...] = STAGES) -> None:
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [*conv(3, channels, 3), nn.ReLU()]
        for expansion, outputs, blocks, stride in stages:
            for block in range(blocks):
                layers.append(Inverted(channels, int(outputs * width), stride if block == 0 else 1, expansion))
                channels = int(outputs * width)
        last = int(1280 * width)
        layers += [*conv(channels, last, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)]
        self.quant, self.layers, self.dequant = tq.QuantStub(), nn.Sequential(*layers), tq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.layers(self.quant(x)))


def fuse(module: nn.Module) -> None:
    """Conv + batch norm (+ ReLU) in every Sequential, as the tutorials of torch.ao do by hand."""
    for child in [child for child in module.modules() if isinstance(child, nn.Sequential)]:
        names = list(child._modules)
        groups, at = [], 0
        while at + 1 < len(names):
            kinds = [type(child[i]) for i in range(at, min(at + 3, len(names)))]
            if kinds[:2] == [nn.Conv2d, nn.BatchNorm2d]:
                length = 3 if kinds[2:] == [nn.ReLU] else 2
                groups.append(names[at : at + length])
                at += length
            else:
                at += 1
        tq.fuse_modules_qat(child, groups, inplace=True)


def plain_qconfig() -> tq.QConfig:
    """FakeQuantize and its moving-average observers, as torch.ao gave by default before it fused them."""
    return tq.get_default_qat_qconfig("fbgemm", version=0)


QCONFIGS = {
    "x86": lambda: tq.get_default_qat_qconfig("x86"),
    "fbgemm": lambda: tq.get_default_qat_qconfig("fbgemm"),
    "qnnpack": lambda: tq.get_default_qat_qconfig("qnnpack"),
    "fbgemm, version 0": plain_qconfig,
}


def prepared(qconfig: tq.QConfig, width: float = 1.0, stages: tuple[tuple[int, ...], ...] = STAGES) -> nn.Module:
    torch.manual_seed(0)
    model = MobileNet(width, stages=stages).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        fuse(model)
        model.qconfig = qconfig
        return tq.prepare_qat(model)


def images(batch: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator), torch.randint(10, (batch,), generator=generator)


class Training:
    """One training loop; each call is a step and gives its loss."""

    def __init__(self, model: nn.Module, batch: int, size: int) -> None:
        self.model, (self.x, self.labels) = model, images(batch, size)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def __call__(self) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(self.x), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def quantizers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, tq.FakeQuantizeBase)]


def recorded_calls(model: nn.Module, step: Training) -> list[tuple[nn.Module, Tensor]]:
    """Every quantizer of the model with the input that it gets in one step."""
    calls: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: calls.append((module, args[0].detach().clone().requires_grad_(args[0].requires_grad)))
        )
        for module in quantizers(model)
    ]
    step()
    for hook in hooks:
        hook.remove()
    return calls


class Quantizers:
    """The quantizers of a step alone, forward and backward, on the inputs that they get in it."""

    def __init__(self, calls: list[tuple[nn.Module, Tensor]]) -> None:
        self.calls = calls
        self.grads = [torch.randn_like(x) for _, x in calls]

    def __call__(self) -> None:
        for (module, x), dy in zip(self.calls, self.grads, strict=True):
            y = module(x)
            if x.requires_grad:
                torch.autograd.grad(y, x, dy)
