"""Int8Conv3d: a 3-D convolution on int8 codes, and what it shares with the transposed convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.int8_convolution import Geometry, int8_convolution, pack, unpack
from .int8 import FORMATS, Int8Convolution, each, suggests_channels_last


class Int8ProgramConvolution(Int8Convolution):
    """A convolution that runs as an int8_program of one step; its geometry is that of torch.convolution."""

    @property
    def codes(self) -> Tensor:
        """The integers in the float layer's shape, int8."""
        return self.data if self.act_bits == 16 else unpack(self.data, self._geometry(self.stride, 0, self.dilation))

    def _geometry(self, stride: Any, padding: Any, dilation: Any, output_padding: Any = 0) -> Geometry:
        dims = len(self.kernel_size)
        return Geometry(
            self.weight_shape,
            each(stride, dims),
            each(padding, dims),
            each(dilation, dims),
            self.groups,
            self.transposed,
            each(output_padding, dims) if self.transposed else (),
        )

    def _pack_for_kernels(self, codes: Tensor) -> dict[str, Tensor | None]:
        data, colsum = pack(codes, self._geometry(self.stride, 0, self.dilation))
        return {"data": data, "colsum": colsum}

    def _run(self, input: Tensor, geometry: Geometry, sides: list[int] | None = None, mode: str = "zeros") -> Tensor:
        """sides: how F.pad pads the values of the input first, which is exact before they are quantized."""
        out_dtype, dims = self._out_dtype(input), len(self.kernel_size)
        in_float = self.act_bits == 16 or input.dtype == torch.float64
        if in_float:
            x = self._input_values(input)
        else:
            x, (input_scale, input_zero_point) = input, self._input_qparams(input)
        if sides is not None:
            x = F.pad(x, sides, "constant" if mode == "zeros" else mode)
        batch = x if x.dim() != dims + 1 else x.unsqueeze(0)
        if in_float:
            weight, bias = self._weight_in(x.dtype), self._bias_in(x.dtype)
            y = self._in_float(batch, weight, bias, geometry)
        else:
            assert self.colsum is not None
            assert input_scale is not None
            qparams = input_scale, input_zero_point, self.quant_min, self.quant_max
            weights = self.data, self.colsum, self._scale_of("scale"), self.bias
            y = int8_convolution(batch, *weights, *qparams, geometry).to(out_dtype)
            if batch.dim() in FORMATS and batch.shape[0] and (self.channels_last or suggests_channels_last(batch)):
                y = y.contiguous(memory_format=FORMATS[batch.dim()])
        return y if batch is x else y.squeeze(0)

    def _in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        raise NotImplementedError


class Int8Conv3d(Int8ProgramConvolution):
    """A 3-D convolution on int8 codes, with nn.Conv3d's arguments; padding adds the code of zero.

    weight_bits, act_bits, group_size, symmetric, input, dtype: as ``Int8Conv2d``.

    x [B, C, D, H, W] or [C, D, H, W], fp32, bf16, fp16 or fp64 → x's dtype; the result is in channels_last_3d memory
    when nn.Conv3d's is: when x or the weight is. An image that holds a NaN gives NaN in all its outputs.
    Differentiable in x and bias; the weight is frozen.
    """

    float_class = nn.Conv3d

    def convolve(self, input: Tensor, stride: Any, padding: Any, dilation: Any, mode: str = "zeros") -> Tensor:
        sides = self._sides(padding, dilation)
        even = sides[::2] == sides[1::2] and mode == "zeros"
        geometry = self._geometry(stride, sides[::-2] if even else 0, dilation)
        return self._run(input, geometry, None if even else sides, mode)

    def _in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        return F.conv3d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
