"""How tests of prepare go on: calibrated, converted, and both against the float layer's own product."""

import torch
from torch import nn
from torch.nn import functional as F

from qkernels.qat import QConfig, calibrate, convert, prepare


def assert_converts(prepared: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5, **kwargs) -> nn.Module:
    """The converted model, after a check that it computes what the prepared one does."""
    converted = convert(prepared)
    with torch.no_grad():
        expected, y = prepared.eval()(*inputs, **kwargs), converted(*inputs, **kwargs)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    return converted


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does, more at the end than at the start."""

    def forward(self, x):
        pads = []
        for i in (1, 0):
            size, k, s, d = x.shape[i - 2], self.weight.shape[i - 2], self.stride[i], self.dilation[i]
            pad = max((-(size // -s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads += [pad // 2, pad - pad // 2]
        x = F.pad(x, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def by_hand(model: nn.Module, prepared: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The prepared layer's output from the float layer, with quantized operands put into its product."""
    original = {"linear": F.linear, "conv2d": F.conv2d}

    def replaced(name):
        def product(input, weight, *args, **kwargs):
            if weight is not model.weight:  # another product
                return original[name](input, weight, *args, **kwargs)
            operands = prepared.input_fake_quant(input), prepared.weight_fake_quant(prepared.weight)
            return original[name](*operands, *args, **kwargs)

        return product

    try:
        F.linear, F.conv2d, torch.conv2d = replaced("linear"), replaced("conv2d"), replaced("conv2d")
        with torch.no_grad():
            return model.eval()(x)
    finally:
        F.linear, F.conv2d, torch.conv2d = original["linear"], original["conv2d"], original["conv2d"]


def prepare_and_calibrate(model: nn.Module, x: torch.Tensor, config: QConfig | None = None) -> nn.Module:
    prepared = prepare(model, config)
    calibrate(prepared, [x])
    return prepared
