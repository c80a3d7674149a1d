"""QATConvTranspose1d, 2d and 3d: transposed convolutions that fake-quantize their weight, input and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .qat_layer import QATLayer, Role
from .tracing import call_as_leaf


class QATConvTranspose(QATLayer):
    """What the three transposed convolutions share.

    The weight is [in, out/groups, …]: by default each index of dim 1 has a scale, which is an output channel, or with
    groups the output channels at one place of every group. In a depthwise layer each row of dim 0 belongs to one group,
    so there each output channel has its own. A subclass keeps its class as a base and has to call ``super().forward``.
    ``convert`` folds a BatchNorm behind it into the quantized values.
    """

    product: ClassVar[Callable[..., Tensor]]
    __call__ = call_as_leaf

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        kernel_size: tuple[int, ...] = layer.kernel_size  # type: ignore[assignment]
        sample = 1 + len(kernel_size)
        depthwise = layer.groups == layer.in_channels and layer.groups != 1
        return {
            "weight": Role("weight", "weight", (0, 1) if depthwise else 1),
            "input": Role("input", feature_dims=sample),
            "output": Role("output", feature_dims=sample),
        }

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        layer: Any = self
        x = (
            input
            if layer.input_fake_quant is not None and layer.input_fake_quant.at_source
            else self.passed("input", input)
        )
        weight = self.passed("weight", layer.weight)
        stride, padding, dilation, size = layer.stride, layer.padding, layer.dilation, layer.kernel_size
        added = layer._output_padding(x, output_size, stride, padding, size, len(size), dilation)
        y = type(self).product(x, weight, layer.bias, stride, padding, added, layer.groups, dilation)
        return self.passed("output", y)


class QATConvTranspose1d(QATConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with fake quantization (see ``QATLayer`` and ``QATConvTranspose``)."""

    float_class = nn.ConvTranspose1d
    product = F.conv_transpose1d


class QATConvTranspose2d(QATConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with fake quantization (see ``QATLayer`` and ``QATConvTranspose``)."""

    float_class = nn.ConvTranspose2d
    product = F.conv_transpose2d


class QATConvTranspose3d(QATConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with fake quantization (see ``QATLayer`` and ``QATConvTranspose``)."""

    float_class = nn.ConvTranspose3d
    product = F.conv_transpose3d
