"""Convolutional models, from LeNet to a diffusion U-Net, at a few channels each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from wild_case import Models

CNNS = Models()


def images(channels: int = 3, size: int = 8, n: int = 4) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(n, channels, size, size),)


def conv_bn(c: int, out: int, k: int = 3, act: type[nn.Module] = nn.ReLU, **options) -> nn.Sequential:
    """The block of most convolutional nets; ``act=nn.Identity``: a linear one."""
    conv = nn.Conv2d(c, out, k, padding=k // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act())


def classifier(c: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


@CNNS.add(images(1, 16), narrow=True)
def LeNet() -> nn.Module:
    features = [nn.Conv2d(1, 4, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AvgPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 5))


class Residual(nn.Module):
    """A body beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))


def basic(c: int, out: int, stride: int) -> nn.Module:
    body = nn.Sequential(conv_bn(c, out, stride=stride), conv_bn(out, out, act=nn.Identity))
    same = c == out and stride == 1
    return Residual(body, nn.Identity() if same else conv_bn(c, out, 1, nn.Identity, stride=stride), nn.ReLU())


@CNNS.add(images(), narrow=True)
def ResNetBasic() -> nn.Module:
    return nn.Sequential(conv_bn(3, 4), nn.MaxPool2d(2), basic(4, 4, 1), basic(4, 8, 2), classifier(8))


@CNNS.add(images())
def ResNetBottleneck() -> nn.Module:
    def block(c, width, out, stride):
        body = [conv_bn(c, width, 1), conv_bn(width, width, stride=stride), conv_bn(width, out, 1, nn.Identity)]
        return Residual(nn.Sequential(*body), conv_bn(c, out, 1, nn.Identity, stride=stride), nn.ReLU())

    return nn.Sequential(conv_bn(3, 4), block(4, 3, 8, 1), block(8, 4, 8, 2), classifier(8))


def inverted(c: int, out: int, act: type[nn.Module], gate: nn.Module, k: int = 3, stride: int = 1) -> nn.Module:
    wide = 3 * c
    layers = [conv_bn(c, wide, 1, act), conv_bn(wide, wide, k, act, groups=wide, stride=stride), gate]
    body = nn.Sequential(*layers, conv_bn(wide, out, 1, nn.Identity))
    return Residual(body, nn.Identity(), nn.Identity()) if c == out and stride == 1 else body


@CNNS.add(images(), narrow=True)
def MobileNetV2() -> nn.Module:
    blocks = [inverted(c, out, nn.ReLU6, nn.Identity(), stride=s) for c, out, s in ((4, 4, 1), (4, 6, 2))]
    return nn.Sequential(conv_bn(3, 4, act=nn.ReLU6), *blocks, classifier(6))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)
        self.act, self.gate = act, gate

    def forward(self, x):
        return x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


@CNNS.add(images())
def MobileNetV3() -> nn.Module:
    gate = partial(SqueezeExcite, 12, nn.ReLU(), nn.Hardsigmoid())
    blocks = [inverted(4, 4, nn.Hardswish, gate(), 5), inverted(4, 6, nn.Hardswish, gate(), stride=2)]
    return nn.Sequential(conv_bn(3, 4, act=nn.Hardswish), *blocks, classifier(6))


@CNNS.add(images())
def EfficientNet() -> nn.Module:
    gate = partial(SqueezeExcite, 12, nn.SiLU(), nn.Sigmoid())
    blocks = [inverted(4, 4, nn.SiLU, gate()), inverted(4, 6, nn.SiLU, gate(), 5, 2)]
    return nn.Sequential(conv_bn(3, 4, act=nn.SiLU), *blocks, conv_bn(6, 12, 1, nn.SiLU), classifier(12))


@CNNS.add(images())
class ShuffleNet(nn.Module):
    """Half of the channels pass, the other half are convolved; then both are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.branch = nn.Sequential(conv_bn(4, 4, 1), conv_bn(4, 4, act=nn.Identity, groups=4), conv_bn(4, 4, 1))
        self.head = classifier(8)

    def forward(self, x):
        kept, moved = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, self.branch(moved)], 1)
        return self.head(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2))


@CNNS.add(images())
class DenseNet(nn.Module):
    """BatchNorm in front of each convolution, and all earlier features as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1, bias=False) for i in range(3))
        self.head = classifier(13)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1))


@CNNS.add(images())
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = conv_bn(3, 2, 1)
        self.three = nn.Sequential(conv_bn(3, 3, 1), conv_bn(3, 4, 3))
        self.five = nn.Sequential(conv_bn(3, 2, 1), conv_bn(2, 2, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(3, 2, 1))
        self.head = classifier(10)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1))


class Fire(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(c, 4, 1)
        self.expand1, self.expand3 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


@CNNS.add(images())
def SqueezeNet() -> nn.Module:
    head = [nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), Fire(6), Fire(8), *head)


class ConvNeXtBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm = nn.LayerNorm(c)
        self.wide, self.narrow = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.scale = nn.Parameter(torch.full((c,), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


@CNNS.add(images(), narrow=True)
def ConvNeXt() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), ConvNeXtBlock(6), ConvNeXtBlock(6), classifier(6))


@CNNS.add(images(), narrow=True)
def VGG() -> nn.Module:
    layers = [conv_bn(3, 4), conv_bn(4, 4), nn.MaxPool2d(2), conv_bn(4, 8), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 5))


class RepVGGBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.three, self.one = conv_bn(c, c, 3, nn.Identity), conv_bn(c, c, 1, nn.Identity)
        self.none = nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.three(x) + self.one(x) + self.none(x))


@CNNS.add(images())
def RepVGG() -> nn.Module:
    return nn.Sequential(conv_bn(3, 4), RepVGGBlock(4), RepVGGBlock(4), classifier(4))


@CNNS.add(images())
class UNet(nn.Module):
    """Up once by a transposed convolution and once by interpolation, each beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 4), conv_bn(4, 6), conv_bn(6, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.d, self.e, self.head = conv_bn(12, 6), conv_bn(10, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up(c), b], 1))
        d = F.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.e(torch.cat([d, a], 1)))


@CNNS.add(images(1), narrow=True)
def ConvAutoencoder() -> nn.Module:
    encoder = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()]
    decoder = [nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3, 2, 1, 1), nn.Sigmoid()]
    return nn.Sequential(*encoder, *decoder)


@CNNS.add(lambda: (torch.randn(4, 6, 1, 1),), narrow=True)
def DCGANGenerator() -> nn.Module:
    first = [nn.ConvTranspose2d(6, 6, 4, 1, 0, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    second = [nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh())


@CNNS.add(images())
def SpectralDiscriminator() -> nn.Module:
    norm = parametrizations.spectral_norm
    convs = [norm(nn.Conv2d(3, 4, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(4, 6, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*convs, nn.Flatten(), norm(nn.Linear(24, 1)))


@CNNS.add(images(), narrow=True)
class FPNDetector(nn.Module):
    """One head for two levels of a pyramid; the result is a dict of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3 = conv_bn(3, 4, stride=2), conv_bn(4, 8, stride=2)
        self.lateral2, self.lateral3 = nn.Conv2d(4, 6, 1), nn.Conv2d(8, 6, 1)
        self.smooth = nn.Conv2d(6, 6, 3, padding=1)
        self.classes, self.boxes = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        c2 = self.c2(x)
        p3 = self.lateral3(self.c3(c2))
        p2 = self.smooth(self.lateral2(c2) + F.interpolate(p3, scale_factor=2))
        return {"classes": (self.classes(p2), self.classes(p3)), "boxes": (self.boxes(p2).exp(), self.boxes(p3).exp())}


@CNNS.add(images())
class ASPP(nn.Module):
    """Dilated convolutions with every kind of padding, and a pooled branch."""

    def __init__(self) -> None:
        super().__init__()
        modes = ((1, 1, "zeros"), (2, 2, "reflect"), (3, 3, "circular"), (2, "same", "replicate"))
        self.stem = conv_bn(3, 4)
        self.branches = nn.ModuleList(
            nn.Conv2d(4, 3, 3, padding=padding, dilation=dilation, padding_mode=mode)
            for dilation, padding, mode in modes
        )
        self.pooled, self.head = nn.Conv2d(4, 3, 1), nn.Conv2d(15, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.head(F.relu(torch.cat([*(branch(x) for branch in self.branches), pooled], 1)))


@CNNS.add(lambda: (torch.randn(3, 2, 4, 8, 8),))
def C3D() -> nn.Module:
    first = [nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d((1, 2, 2))]
    second = [nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(4, 3))


@CNNS.add(images(1))
def ESPCN() -> nn.Module:
    """Super-resolution: the last convolution gives the pixels of each 2×2 block as channels."""
    layers = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1)]
    return nn.Sequential(*layers, nn.PixelShuffle(2))


@CNNS.add(images())
def StyleTransfer() -> nn.Module:
    def block(c, out):
        return [nn.Conv2d(c, out, 3, padding=1, padding_mode="reflect"), nn.InstanceNorm2d(out, affine=True), nn.ReLU()]

    return nn.Sequential(*block(3, 4), *block(4, 4), nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"))


@CNNS.add(lambda: (torch.randn(2, 4, 8, 8), torch.tensor([3, 70])), narrow=True)
class DiffusionBlock(nn.Module):
    """A step of a diffusion U-Net: GroupNorm, and the time as a sinusoid that shifts the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 6))
        self.norm1, self.conv1 = nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3, padding=1)
        self.skip, self.down = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(6, 6, 4, 2, 1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x, steps):
        angles = steps[:, None] * torch.exp(-math.log(1000) * torch.arange(4) / 4)
        shift = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.conv1(F.silu(self.norm1(x))) + shift[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h))) + self.skip(x)
        return self.out(torch.cat([self.up(F.silu(self.down(h))), h], 1))
