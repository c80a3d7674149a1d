"""A part of a network as one program, against its layers one by one and against fp32: what codes in between save."""

from __future__ import annotations

import warnings

import pytest
import torch
from operands import Compare
from torch import nn

import qkernels as qk
from qkernels.qat.fuse import fused_parts


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


class Inverted(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 6 * channels
        self.expand, self.project = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, channels, 1)
        self.depthwise, self.act = nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.ReLU6()

    def forward(self, x):
        return x + self.project(self.act(self.depthwise(self.act(self.expand(x)))))


# The block, its channels and the side of the image.
BLOCKS = {
    "residual, 64": (Residual, 64, 56),
    "residual, 512": (Residual, 512, 7),
    "inverted, 24": (Inverted, 24, 56),
    "inverted, 96": (Inverted, 96, 14),
}


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("block", BLOCKS)
def test_four_blocks(compare: Compare, block: str, batch: int) -> None:
    kind, channels, side = BLOCKS[block]
    model = nn.Sequential(*(kind(channels) for _ in range(4))).eval()
    x = torch.randn(batch, channels, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = qk.prepare(model, "w8a8")
    qk.calibrate(prepared, [x])
    fused, apart = qk.convert(prepared), qk.convert(prepared)
    for name in fused_parts(apart):
        del apart.get_submodule(name).__dict__["forward"]
    last = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        compare(
            lambda: fused(x),
            {"layer by layer": lambda: apart(x), "fp32": lambda: model(x), "fp32, channels_last": lambda: model(last)},
            apart(x),
            tolerance=1e-5,
            peer_tolerance=0.1,
        )
