"""Convolutions with int8 weights against torch's quantized ones and the fp32 convolution."""

from __future__ import annotations

import peers
import pytest
import torch
from operands import Compare

import qkernels as qk

# Channels in and out, side of the image and of the kernel, groups: layers of ResNet-50 and of MobileNetV2.
LAYERS = {
    "3x3, 64 to 64": (64, 64, 56, 3, 1),
    "1x1, 256 to 64": (256, 64, 56, 1, 1),
    "3x3, 256 to 256": (256, 256, 14, 3, 1),
    "depthwise, 96": (96, 96, 56, 3, 96),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_conv2d(compare: Compare, layer: str) -> None:
    """fp32 in and out, channels_last, the input quantized on the way by a scale that is given."""
    channels, out, side, kernel, groups = LAYERS[layer]
    x = torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)
    w = torch.randn(out, channels // groups, kernel, kernel) / (channels // groups * kernel * kernel) ** 0.5
    scale = w.abs().amax((1, 2, 3)) / 127
    q = (w / scale.reshape(-1, 1, 1, 1)).round().to(torch.int8)
    packed = qk.PackedInt8Conv2d.from_quantized(q, scale, groups)
    step, padding = float(x.abs().max()) / 127, kernel // 2
    input_scale = torch.tensor(step)
    with torch.no_grad():
        compare(
            lambda: qk.int8_conv2d(x, packed, input_scale=input_scale, padding=padding),
            peers.int8_conv2d(x, q, scale, step, 128, padding, groups),
            torch.nn.functional.conv2d(x, w, padding=padding, groups=groups),
            tolerance=0.02,  # what 8 bits of weight and input cost
            peer_tolerance=0.06,  # and of the output
        )
