"""Int8Linear and Int8Conv2d: what ``convert`` makes of QAT layers; they run on the int8 kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.int8_conv2d import PackedInt8Conv2d, int8_conv2d
from ..ops.int8_gemm import PackedInt8, int8_linear
from ..ops.quantize import choose_qparams
from .fake_quantize import FakeQuantize, apply_keeping_dtype
from .granularity import PerTensor, PerToken


class _Int8Layer(nn.Module):
    """What both layers share: packed codes in memory, logical ones in the state_dict, and the input's scale.

    state_dict: ``weight`` (int8, the float layer's shape), ``scale`` [N], ``bias`` [N], and where the input's scale is
    fixed ``input_scale`` [1] and ``input_zero_point`` [1]. The packed layout never leaves the process.
    """

    data: Tensor
    colsum: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, weight_shape: Sequence[int], bias: bool, weight_bits: int, input: FakeQuantize) -> None:
        super().__init__()
        n = weight_shape[0]
        static = input.quantizer != "dynamic"
        self.weight_shape = tuple(weight_shape)
        self.weight_bits = weight_bits
        self.input_bits = input.bits
        self.input_granularity = input.granularity
        self.input_symmetric = input.symmetric
        self.quant_min, self.quant_max = input.quant_min, input.quant_max
        self.register_buffer("scale", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n) if bias else None)
        self.register_buffer("input_scale", torch.ones(1) if static else None)
        asymmetric = static and not input.symmetric
        self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int32) if asymmetric else None)
        data, colsum = self._pack(torch.zeros(self.weight_shape, dtype=torch.int8))
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("colsum", colsum, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The integer codes in the float layer's shape, unpacked."""
        return self._unpack()

    def set_weight(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Packs codes (int8, the float layer's shape) with one scale per output channel."""
        self.data, self.colsum = self._pack(codes)
        self.scale = scale.detach().float().reshape(-1).expand(self.weight_shape[0]).clone()
        self.bias = None if bias is None else bias.detach().float().clone()

    def _input_qparams(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.input_scale is not None or isinstance(self.input_granularity, PerToken):
            return self.input_scale, self.input_zero_point
        low, high = torch.aminmax(x.detach()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        scale, zero_point = choose_qparams(
            low.float(),
            high.float(),
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.input_symmetric,
        )
        return scale, None if self.input_symmetric else zero_point

    def _pack(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _unpack(self) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Int8Layer:
        # Scales and bias stay fp32 when the model is cast: the epilogue computes in fp32 whatever x is.
        return super()._apply(lambda t: apply_keeping_dtype(fn, t), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._unpack()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        codes = state_dict.get(key)
        if codes is None:
            missing_keys.append(key)
        elif codes.dtype != torch.int8 or tuple(codes.shape) != self.weight_shape:
            error_msgs.append(
                f"{key}: got {codes.dtype} of shape {list(codes.shape)}; accepted: the torch.int8 codes of shape "
                f"{list(self.weight_shape)}"
            )
        else:
            self.data, self.colsum = self._pack(codes.to(self.scale.device))

    def _repr_of_codes(self) -> str:
        fixed = "static" if self.input_scale is not None else "dynamic"
        return f"weight_bits={self.weight_bits}, input_bits={self.input_bits} ({fixed}, {self.input_granularity})"


class Int8Linear(_Int8Layer):
    """A linear layer on int8 codes: quantizes its input, multiplies in exact integers, scales (see ``int8_linear``).

    Args:
        in_features, out_features, bias: as nn.Linear.
        weight_bits: what the codes hold, 2 to 8; they are stored as int8.
        input: how the input is quantized; by default per token from its own range, 8 bits.

    x [..., in_features] fp32, bf16 or fp16 → [..., out_features] of x's dtype. Not differentiable.
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
        codes, scale = PackedInt8.from_float(_finite(linear.weight)).unpack()
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight.device)
        layer.set_weight(codes, scale, linear.bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        input_scale, input_zero_point = self._input_qparams(x)
        packed = PackedInt8(self.data, self.colsum, self.scale, self.weight_shape)  # type: ignore[arg-type]
        return int8_linear(
            x,
            packed,
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
            self.data, self.colsum = self._pack(self._unpack())
        return self

    def _pack(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        packed = PackedInt8.from_quantized(codes, torch.ones(1))
        return packed.data, packed.colsum

    def _unpack(self) -> Tensor:
        return PackedInt8(self.data, self.colsum, self.scale, self.weight_shape).unpack()[0]  # type: ignore[arg-type]


class Int8Conv2d(_Int8Layer):
    """A 2-D convolution on int8 codes, with nn.Conv2d's arguments; padding adds the code of zero.

    x [B, C, H, W] or [C, H, W], fp32, bf16 or fp16 → x's dtype. By default the input is quantized per tensor from its
    own range; ``convert`` fixes the range that was trained. Not differentiable.
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
        codes, scale = PackedInt8.from_float(_finite(conv.weight).flatten(1)).unpack()
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
            PackedInt8Conv2d(self.data, self.colsum, self.scale, self.weight_shape, self.groups),  # type: ignore[arg-type]
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

    def _pack(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        packed = PackedInt8Conv2d.from_quantized(codes, torch.ones(1), self.groups)
        return packed.data, packed.colsum

    def _unpack(self) -> Tensor:
        return PackedInt8Conv2d(self.data, self.colsum, self.scale, self.weight_shape, self.groups).unpack()[0]  # type: ignore[arg-type]


def _finite(weight: Tensor) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: got NaN or infinite values; accepted: finite weights")
    return weight
