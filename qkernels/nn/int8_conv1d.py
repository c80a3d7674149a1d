"""Int8Conv1d: a 1-D convolution on the int8 kernels of Int8Conv2d, as one of height 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.int8_conv2d import PackedInt8Conv2d, int8_conv2d
from ..ops.int8_gemm import PackedInt8
from .fake_quantize import FakeQuantize
from .granularity import PerTensor
from .int8 import Int8Layer
from .quantized import check_finite
from .replacing import take_over


class Int8Conv1d(Int8Layer):
    """A 1-D convolution on int8 codes, with nn.Conv1d's arguments; padding adds the code of zero.

    weight_bits, act_bits, group_size, symmetric, input, dtype: as ``Int8Conv2d``.

    x [B, C, L] or [C, L], fp32, bf16, fp16 or fp64 → x's dtype, contiguous. Differentiable in x and bias; the weight is
    frozen.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        weight_bits: int = 8,
        act_bits: int = 8,
        group_size: int = -1,
        symmetric: bool = True,
        input: FakeQuantize | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # nn.Conv1d checks the arguments and resolves ints.
        geometry = (kernel_size, stride, padding, dilation, groups)
        conv = nn.Conv1d(in_channels, out_channels, *geometry, bias, padding_mode, device="meta")  # type: ignore[arg-type]
        self.groups = groups  # before the base class packs the weight
        weight = (weight_bits, act_bits, group_size, symmetric)
        super().__init__(conv.weight.shape, bias, *weight, input, PerTensor(), dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.transposed, self.output_padding = conv.transposed, conv.output_padding

    @classmethod
    def from_float(cls, conv: nn.Conv1d, *, act_bits: int = 8) -> Int8Conv1d:
        """Quantizes a trained layer: weights per output channel by amax/127, the input per tensor at run time.

        The new layer takes over the hooks of ``conv`` and whatever else was set on it.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        codes, scale = PackedInt8.from_float(check_finite(conv.weight).flatten(1)).unpack()
        layer = cls.like(conv, act_bits=act_bits).to(conv.weight.device)
        layer.set_weight(codes.view(conv.weight.shape), scale, conv.bias)
        return take_over(layer, conv, ("weight", "bias")).train(conv.training)

    @classmethod
    def like(cls, conv: nn.Conv1d, **codes: Any) -> Int8Conv1d:
        """A layer with the geometry of ``conv``, without weights yet; ``codes``: bias and the keyword arguments."""
        codes.setdefault("bias", conv.bias is not None)
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            padding_mode=conv.padding_mode,
            dtype=conv.weight.dtype,
            **codes,
        )

    @property
    def codes(self) -> Tensor:
        """The integers in the float layer's shape, int8."""
        return self.data if self.act_bits == 16 else self._packed().unpack()[0].squeeze(2)

    def compute(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.stride, self.padding, self.dilation, self.padding_mode)

    def convolve(self, input: Tensor, stride: Any, padding: Any, dilation: Any, mode: str = "zeros") -> Tensor:
        """The convolution with the given geometry: a subclass may pass another one than the layer's to F.conv1d."""
        out_dtype = self._out_dtype(input)
        stride, dilation = _single(stride), _single(dilation)
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
        )
        y = y.squeeze(2).to(out_dtype).contiguous()
        return y if x.dim() == 3 else y.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            + self._repr_of_codes()
        )

    def _sides(self, padding: Any, dilation: int) -> tuple[int, int]:
        """How many elements to add on the left and on the right for a padding as in F.conv1d."""
        if padding == "valid":
            return 0, 0
        if padding == "same":
            total = dilation * (self.weight_shape[2] - 1)
            return total // 2, total - total // 2
        return _single(padding), _single(padding)

    def _pack_codes(self, codes: Tensor) -> dict[str, Tensor | None]:
        if self.act_bits == 16:
            return {"data": codes.detach().clone(memory_format=torch.contiguous_format), "colsum": None}
        packed = PackedInt8Conv2d.from_quantized(codes.unsqueeze(2), torch.ones(1), self.groups)
        return {"data": packed.data, "colsum": packed.colsum}

    def _packed(self) -> PackedInt8Conv2d:
        n, c, k = self.weight_shape
        return PackedInt8Conv2d(self.data, self.colsum, self._scale_of("scale"), (n, c, 1, k), self.groups)  # type: ignore[arg-type]


def _single(value: Any) -> int:
    return value if isinstance(value, int) else int(value[0])
