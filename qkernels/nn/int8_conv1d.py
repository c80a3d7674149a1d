"""Int8Conv1d: a 1-D convolution on the int8 kernels of Int8Conv2d, as one of height 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.int8_conv2d import int8_conv2d
from .int8 import Int8Convolution, each


class Int8Conv1d(Int8Convolution):
    """A 1-D convolution on int8 codes, with nn.Conv1d's arguments; padding adds the code of zero.

    weight_bits, act_bits, group_size, symmetric, input, dtype: as ``Int8Conv2d``.

    x [B, C, L] or [C, L], fp32, bf16, fp16 or fp64 → x's dtype, contiguous. Differentiable in x and bias; the weight is
    frozen.
    """

    float_class = nn.Conv1d

    @property
    def codes(self) -> Tensor:
        """The integers in the float layer's shape, int8."""
        return self.data if self.act_bits == 16 else self._packed().unpack()[0].squeeze(2)

    def convolve(self, input: Tensor, stride: Any, padding: Any, dilation: Any, mode: str = "zeros") -> Tensor:
        out_dtype = self._out_dtype(input)
        (stride,), (dilation,) = each(stride, 1), each(dilation, 1)
        left, right = self._sides(padding, dilation)
        # The kernels pad evenly and with zeros. Any other padding happens before quantization, where it is exact.
        even = left == right and mode == "zeros"
        in_float = self.act_bits == 16 or input.dtype == torch.float64
        if in_float:
            x = self._input_values(input)
        else:
            x, (input_scale, input_zero_point) = input, self._input_qparams(input)
        if not even:
            x = F.pad(x, (left, right), "constant" if mode == "zeros" else mode)
            left = 0
        if in_float:
            return F.conv1d(x, self._weight_in(x.dtype), self._bias_in(x.dtype), stride, left, dilation, self.groups)
        y = int8_conv2d(
            (x if x.dim() == 3 else x.unsqueeze(0)).unsqueeze(2),
            self._packed(),
            self.bias,
            input_scale=input_scale,  # type: ignore[arg-type]
            input_zero_point=input_zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            stride=(1, stride),
            padding=(0, left),
            dilation=(1, dilation),
            channels_last=False,
        )
        y = y.squeeze(2).to(out_dtype)
        return y if x.dim() == 3 else y.squeeze(0)

    def _as_kernels_take(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        n, c, k = shape
        return n, c, 1, k
