"""Int8ConvTranspose1d, 2d and 3d: transposed convolutions on int8 codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from .. import layouts
from ..ops.int8_convolution import Geometry
from .int8_conv3d import Int8ProgramConvolution
from .tracing import node_of


class Int8ConvTranspose(Int8ProgramConvolution):
    """What the three transposed convolutions share.

    Codes, in memory and in the state_dict, have the float weight's shape [in, out/groups, *kernel], and there is one
    scale for each output channel; a group of weights (group_size) runs along the weights of an output channel,
    [in/groups, *kernel].
    """

    product: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """output_size: as in torch's layer, with or without the dims of the batch and the channels."""
        if isinstance(input, Proxy):  # see ``root_as_leaf``
            return node_of(self, input) if output_size is None else node_of(self, input, output_size)  # type: ignore[return-value]
        dims = len(self.kernel_size)
        sizes = self.stride, self.padding, self.kernel_size, dims, self.dilation
        added = _ConvTransposeNd._output_padding(self, input, output_size, *sizes)  # type: ignore[arg-type]
        geometry = self._geometry(self.stride, self.padding, self.dilation, tuple(added))
        return self._output(self._run(input, geometry))

    forward.__annotations__ = {}  # noqa: RUF012 (code of a graph that was traced from the layer would repeat them)

    def compute(self, input: Tensor) -> Tensor:
        return self._run(input, self._geometry(self.stride, self.padding, self.dilation, self.output_padding))

    def _in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        added = geometry.output_padding
        return type(self).product(
            x, weight, bias, geometry.stride, geometry.padding, added, self.groups, geometry.dilation
        )  # fmt: skip

    def _outputs(self, weight_shape: Sequence[int]) -> int:
        return weight_shape[1] * self.groups

    def _rows_of(self, weight: Tensor) -> Tensor:
        return layouts.outputs_first(weight, self.groups)

    def _weight_of(self, rows: Tensor) -> Tensor:
        group_in = self.weight_shape[0] // self.groups
        return layouts.inputs_first(rows.view(self.out_channels, group_in, *self.kernel_size), self.groups)


class Int8ConvTranspose1d(Int8ConvTranspose):
    """A transposed 1-D convolution on int8 codes, with nn.ConvTranspose1d's arguments (see ``Int8ConvTranspose``).

    weight_bits, act_bits, group_size, symmetric, input, dtype: as ``Int8Conv2d``.

    x [B, C, L] or [C, L], fp32, bf16, fp16 or fp64 → x's dtype. An image that holds a NaN gives NaN in all its outputs.
    Differentiable in x and bias; the weight is frozen.
    """

    float_class = nn.ConvTranspose1d
    product = F.conv_transpose1d


class Int8ConvTranspose2d(Int8ConvTranspose):
    """A transposed 2-D convolution on int8 codes, with nn.ConvTranspose2d's arguments (see ``Int8ConvTranspose``).

    As ``Int8ConvTranspose1d``, with x [B, C, H, W] or [C, H, W]; the result is in channels_last memory when torch's is:
    when x or the weight is.
    """

    float_class = nn.ConvTranspose2d
    product = F.conv_transpose2d


class Int8ConvTranspose3d(Int8ConvTranspose):
    """A transposed 3-D convolution on int8 codes, with nn.ConvTranspose3d's arguments (see ``Int8ConvTranspose``).

    As ``Int8ConvTranspose2d``, with x [B, C, D, H, W] or [C, D, H, W] and channels_last_3d memory.
    """

    float_class = nn.ConvTranspose3d
    product = F.conv_transpose3d
