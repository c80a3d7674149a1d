"""Int8Linear and Int8Conv2d: what ``convert`` makes of QAT layers; they run on the int8 kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.int8_conv2d import PackedInt8Conv2d, int8_conv2d
from ..ops.int8_gemm import PackedInt8, int8_linear
from .fake_quantize import FakeQuantize
from .granularity import PerTensor, PerToken
from .quantized import Logical, QuantizedInputLayer, check_finite


class _Int8Layer(QuantizedInputLayer):
    """What both layers share: packed codes in memory, logical ones in the state_dict, and a scale per output channel.

    state_dict: ``weight`` (int8, the float layer's shape), ``scale`` [N], and what ``QuantizedInputLayer`` adds.
    """

    data: Tensor
    colsum: Tensor
    scale: Tensor

    def __init__(self, weight_shape: Sequence[int], bias: bool, weight_bits: int, input: FakeQuantize) -> None:
        super().__init__(weight_shape, bias, weight_bits, input)
        self.register_buffer("scale", torch.ones(weight_shape[0]))
        self._register_private()

    @property
    def weight(self) -> Tensor:
        """The integer codes in the float layer's shape, unpacked."""
        return self._packed().unpack()[0]

    def dequantize(self) -> Tensor:
        """The weight in fp32."""
        return self.weight.float() * self.scale.reshape(-1, *[1] * (len(self.weight_shape) - 1))

    def set_weight(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Packs codes (int8, the float layer's shape) with one scale per output channel."""
        self._buffers.update(self._pack({"weight": codes}))
        self.scale = scale.detach().float().reshape(-1).expand(self.weight_shape[0]).clone()
        self._set_bias(bias)

    def _pack_codes(self, codes: Tensor) -> PackedInt8 | PackedInt8Conv2d:
        raise NotImplementedError

    def _packed(self) -> PackedInt8 | PackedInt8Conv2d:
        raise NotImplementedError

    def _logical(self) -> Logical:
        return {"weight": (torch.int8, self.weight_shape)}

    def _pack(self, logical: dict[str, Tensor]) -> dict[str, Tensor | None]:
        packed = self._pack_codes(logical["weight"])
        return {"data": packed.data, "colsum": packed.colsum}

    def _unpack(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


class Int8Linear(_Int8Layer):
    """A linear layer on int8 codes: quantizes its input, multiplies in exact integers, scales (see ``int8_linear``).

    Args:
        in_features, out_features, bias: as nn.Linear.
        weight_bits: what the codes hold, 2 to 8; they are stored as int8.
        input: how the input is quantized; by default per token from its own range, 8 bits.

    x [..., in_features] fp32, bf16 or fp16 → [..., out_features] of x's dtype. Differentiable in x and bias (see
    ``int8_linear``); the weight is frozen.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int = 8,
        input: FakeQuantize | None = None,
    ) -> None:
        if input is None:
            input = FakeQuantize(granularity=PerToken(), quantizer="dynamic")
        super().__init__((out_features, in_features), bias, weight_bits, input)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Int8Linear:
        """Quantizes a trained layer: weights per output channel to amax/127, inputs per token at run time.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        codes, scale = PackedInt8.from_float(check_finite(linear.weight)).unpack()
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight.device)
        layer.set_weight(codes, scale, linear.bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        input_scale, input_zero_point = self._input_qparams(x)
        return int8_linear(
            x,
            self._packed(),
            self.bias,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._repr_of_codes()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)
        device = self.data.device.type
        if device != "meta" and (self.data.dim() == 2) != (device == "cuda"):  # moved between the CPU and a GPU
            self._buffers.update(self._pack(self._unpack()))
        return self

    def _pack_codes(self, codes: Tensor) -> PackedInt8:
        return PackedInt8.from_quantized(codes, torch.ones(1))

    def _packed(self) -> PackedInt8:
        return PackedInt8(self.data, self.colsum, self.scale, self.weight_shape)  # type: ignore[arg-type]


class Int8Conv2d(_Int8Layer):
    """A 2-D convolution on int8 codes, with nn.Conv2d's arguments; padding adds the code of zero.

    x [B, C, H, W] or [C, H, W], fp32, bf16 or fp16 → x's dtype. By default the input is quantized per tensor from its
    own range; ``convert`` fixes the range that was trained. Differentiable in x and bias; the weight is frozen.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        weight_bits: int = 8,
        input: FakeQuantize | None = None,
    ) -> None:
        # nn.Conv2d checks the arguments and resolves padding="same" and ints.
        geometry = (kernel_size, stride, padding, dilation, groups)
        conv = nn.Conv2d(in_channels, out_channels, *geometry, bias, padding_mode, device="meta")  # type: ignore[arg-type]
        if input is None:
            input = FakeQuantize(granularity=PerTensor(), quantizer="dynamic")
        self.groups = groups  # before the base class packs the weight
        super().__init__(conv.weight.shape, bias, weight_bits, input)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._pad: list[int] | None = None
        if isinstance(padding, str) or padding_mode != "zeros":  # an uneven or copying pad is exact before quantization
            self._pad = conv._reversed_padding_repeated_twice

    @classmethod
    def from_float(cls, conv: nn.Conv2d) -> Int8Conv2d:
        """Quantizes a trained layer: weights per output channel to amax/127, the input per tensor at run time.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        codes, scale = PackedInt8.from_float(check_finite(conv.weight).flatten(1)).unpack()
        layer = cls.like(conv).to(conv.weight.device)
        layer.set_weight(codes.view(conv.weight.shape), scale, conv.bias)
        return layer.train(conv.training)

    @classmethod
    def like(cls, conv: nn.Conv2d, **codes: Any) -> Int8Conv2d:
        """A layer with the geometry of ``conv`` and no weights yet; ``codes``: weight_bits, input, bias."""
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
            **codes,
        )

    def forward(self, x: Tensor) -> Tensor:
        input_scale, input_zero_point = self._input_qparams(x)
        # As nn.Conv2d, the output follows the input's memory format: what comes next may call .view(batch, -1).
        contiguous = x.is_contiguous()
        padding: Any = self.padding
        if self._pad is not None:
            x, padding = F.pad(x, self._pad, "constant" if self.padding_mode == "zeros" else self.padding_mode), (0, 0)
        y = int8_conv2d(
            x if x.dim() == 4 else x.unsqueeze(0),
            self._packed(),
            self.bias,
            input_scale=input_scale,  # type: ignore[arg-type]
            input_zero_point=input_zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
        )
        if x.dim() == 3:
            return y[0]
        return y.contiguous() if contiguous else y

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            + self._repr_of_codes()
        )

    def _pack_codes(self, codes: Tensor) -> PackedInt8Conv2d:
        return PackedInt8Conv2d.from_quantized(codes, torch.ones(1), self.groups)

    def _packed(self) -> PackedInt8Conv2d:
        return PackedInt8Conv2d(self.data, self.colsum, self.scale, self.weight_shape, self.groups)  # type: ignore[arg-type]
