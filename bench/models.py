"""Whole models for the benchmark, by the papers and with torchvision's names where it has them; weights are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions (arXiv 1512.03385, figure 5, left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 (the same figure, right), with the stride on the 3×3 as torchvision has it."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """ResNet for ImageNet (arXiv 1512.03385, table 1); depths are the numbers of blocks in its four stages."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, depth in enumerate(depths):
            width, blocks = 64 << stage, nn.Sequential()
            for at in range(depth):
                stride, outputs = (2 if stage and not at else 1), width * block.expansion
                downsample = None
                if stride > 1 or channels != outputs:
                    conv = nn.Conv2d(channels, outputs, 1, stride, bias=False)
                    downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
                blocks.append(block(channels, width, stride, downsample))
                channels = outputs
            setattr(self, f"layer{stage + 1}", blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (arXiv 1801.04381, figure 4)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            *([conv_bn_relu6(inputs, hidden, 1)] if expansion > 1 else []),
            conv_bn_relu6(hidden, hidden, kernel, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class InvertedResiduals(nn.Module):
    """A stem, stages of inverted residuals, a 1×1 convolution to 1280 channels, a classifier.

    stages: expansion, channels, blocks, stride, kernel of each.
    """

    def __init__(self, stages: tuple[tuple[int, int, int, int, int], ...], classes: int = 1000) -> None:
        super().__init__()
        self.features, channels = nn.Sequential(conv_bn_relu6(3, 32, 3, 2)), 32
        for expansion, outputs, blocks, stride, kernel in stages:
            for at in range(blocks):
                self.features.append(InvertedResidual(channels, outputs, kernel, 1 if at else stride, expansion))
                channels = outputs
        self.features.append(conv_bn_relu6(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


# MobileNetV2: arXiv 1801.04381, table 2. EfficientNet-Lite0: EfficientNet-B0 (arXiv 1905.11946, table 1) without
# squeeze-and-excitation and with ReLU6, as Google and timm publish it.
MOBILENET_V2 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)  # fmt: skip
EFFICIENTNET_LITE0 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """U-Net (arXiv 1505.04597) with padding and BatchNorm, at half of its width; gives a map per class."""

    def __init__(self, width: int = 32, depth: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(DoubleConv(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.merge = nn.ModuleList(DoubleConv(i, o) for i, o in pairs)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, down in enumerate(self.down):
            x = down(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.out(x)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, with every matmul of a weight in an nn.Linear."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT-S/16 (arXiv 2010.11929 in the size of arXiv 2012.12877) for 224×224."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, classes: int = 1000) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Lstm(nn.Module):
    """Two layers of 512 over a sequence, and a linear layer on every step."""

    def __init__(self, width: int = 512, classes: int = 10) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(width, width, 2, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@dataclass(frozen=True)
class Entry:
    """How to make a model, and the shape of its input without the batch: [3, H, W], or [length, width]."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tiny: bool = False  # for tests: not among the models that are timed by default

    @property
    def images(self) -> bool:
        return len(self.shape) == 3


MODELS = {
    "resnet18": Entry(lambda: ResNet(BasicBlock, (2, 2, 2, 2)), (3, 224, 224)),
    "resnet50": Entry(lambda: ResNet(Bottleneck, (3, 4, 6, 3)), (3, 224, 224)),
    "mobilenet_v2": Entry(lambda: InvertedResiduals(MOBILENET_V2), (3, 224, 224)),
    "efficientnet_lite0": Entry(lambda: InvertedResiduals(EFFICIENTNET_LITE0), (3, 224, 224)),
    "unet": Entry(UNet, (3, 256, 256)),
    "vit_s": Entry(VisionTransformer, (3, 224, 224)),
    "gpt": Entry(lambda: nn.Sequential(*[TransformerBlock(768, 12) for _ in range(4)]), (128, 768)),
    "lstm": Entry(Lstm, (128, 512)),
    "tiny": Entry(lambda: InvertedResiduals(((1, 16, 1, 1, 3), (2, 16, 2, 2, 5))), (3, 32, 32), tiny=True),
}


def inputs(entry: Entry, batch: int, count: int, seed: int) -> list[Tensor]:
    """Batches of inputs. Images are smooth, and differ in contrast and colour as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.randn(batch, *entry.shape, generator=generator)
        if entry.images:
            coarse = torch.randn(batch, 3, 14, 14, generator=generator)
            x = 0.3 * x + F.interpolate(coarse, size=entry.shape[1:], mode="bicubic")
            contrast = 0.3 + 1.2 * torch.rand(batch, 1, 1, 1, generator=generator)
            x = x * contrast + torch.randn(batch, 3, 1, 1, generator=generator)
        made.append(x)
    return made


def build(name: str, seed: int = 0) -> nn.Module:
    """The model in eval mode with drawn weights; each BatchNorm holds the statistics of what it gets."""
    entry = MODELS[name]
    torch.manual_seed(seed)
    model = entry.make()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(1, 0.3)  # with fewer zeros after ReLU, two inputs' outputs stay apart through 50 layers
            norm.momentum = None  # the mean over all batches
    if norms:
        model.train()
        with torch.no_grad():
            for x in inputs(entry, 8, 2, seed + 1):
                model(x)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()
