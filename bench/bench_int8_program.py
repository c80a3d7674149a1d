"""A block of MobileNetV2 in one call of int8_program against the same layers one by one, in int8 and in fp32."""

from __future__ import annotations

import pytest
import torch
from operands import Compare
from torch import Tensor
from torch.nn.functional import conv2d

import qkernels as qk

# Channels outside and inside of the block, and the side of its image.
BLOCKS = {"24 channels at 56": (24, 144, 56), "96 channels at 14": (96, 576, 14)}


class Layer:
    """A convolution with ReLU6, whose input has a scale of its own."""

    def __init__(self, channels: int, out: int, kernel: int, groups: int, activation: bool) -> None:
        self.q = torch.randint(-127, 128, (out, channels // groups, kernel, kernel), dtype=torch.int8)
        self.channels, self.out, self.kernel, self.groups, self.activation = channels, out, kernel, groups, activation
        scale = torch.full((out,), self.q[0].numel() ** -0.5 / 64)  # results as wide as the input
        self.packed = qk.PackedInt8Conv2d.from_quantized(self.q, scale, groups)
        self.step = torch.tensor(0.05)

    def floats(self, x: Tensor, weight: Tensor) -> Tensor:
        y = conv2d(x, weight, padding=self.kernel // 2, groups=self.groups)
        return y.clamp(0, 6) if self.activation else y

    def integers(self, x: Tensor) -> Tensor:
        y = qk.int8_conv2d(x, self.packed, input_scale=self.step, padding=self.kernel // 2)
        return y.clamp(0, 6) if self.activation else y


def program_of(layers: list[Layer]) -> tuple[list[Tensor], str]:
    """Constants and plan. Each layer's results are at once the codes that the next one reads."""
    constants: list[Tensor] = []
    quantizers, steps = [], ["input out=f0 index=0", "quantize out=q0 x=f0 q=0"]
    for i, layer in enumerate(layers):
        at, kernel, padding = len(constants), layer.kernel, layer.kernel // 2
        constants += [layer.step, layer.packed.data, layer.packed.colsum, layer.packed.scale]
        quantizers.append(f"quantizer id={i} scale={at} low=-128 high=127")
        steps.append(
            f"conv x=q{i} data={at + 1} colsum={at + 2} scale={at + 3} in={layer.channels} out_channels={layer.out} "
            f"groups={layer.groups} kernel=1,{kernel},{kernel} stride=1,1,1 dilation=1,1,1 "
            f"padding=0,{padding},{padding} padding_after=0,{padding},{padding} "
            + ("out=f1" if layer is layers[-1] else f"codes=q{i + 1} q={i + 1}")
            + (" first=clamp:0.0:6.0" if layer.activation else "")
        )
    return constants, "\n".join([*quantizers, *steps, "output x=f1 index=0 channels_last=input"])


@pytest.mark.parametrize("block", BLOCKS)
def test_inverted_residual(compare: Compare, block: str) -> None:
    outside, inside, side = BLOCKS[block]
    layers = [
        Layer(outside, inside, 1, 1, True),
        Layer(inside, inside, 3, inside, True),
        Layer(inside, outside, 1, 1, False),
    ]
    x = torch.randn(1, outside, side, side).to(memory_format=torch.channels_last)
    constants, plan = program_of(layers)
    weights = [layer.q.float() * layer.packed.scale.reshape(-1, 1, 1, 1) for layer in layers]

    def by_layers() -> Tensor:
        y = x
        for layer in layers:
            y = layer.integers(y)
        return y

    def in_floats() -> Tensor:
        y = x
        for layer, weight in zip(layers, weights, strict=True):
            y = layer.floats(y, weight)
        return y

    with torch.no_grad():
        compare(
            lambda: torch.ops.qkernels.int8_program([x], constants, plan)[0],
            {"layers": by_layers, "fp32": in_floats},
            by_layers(),
            peer_tolerance=0.1,
        )


def test_fixed_cost(compare: Compare) -> None:
    """50 layers of one pixel with 16 channels: what a call and its steps cost beside the arithmetic."""
    layers = [Layer(16, 16, 1, 1, True) for _ in range(50)]
    constants, plan = program_of(layers)
    x = torch.randn(1, 16, 1, 1)

    def by_layers() -> Tensor:
        y = x
        for layer in layers:
            y = layer.integers(y)
        return y

    with torch.no_grad():
        compare(lambda: torch.ops.qkernels.int8_program([x], constants, plan)[0], {"layers": by_layers}, by_layers())
