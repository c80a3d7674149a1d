"""Int8Linear and Int8Conv2d, which run on the int8 kernels; ``convert`` makes them from QAT layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, gemm_checks, layouts
from ..ops.int8_conv2d import PackedInt8Conv2d, int8_conv2d
from ..ops.int8_gemm import PackedInt8, int8_linear
from ..ops.packing import pack_bits, unpack_bits
from ..ops.quantize import dequantize
from .fake_quantize import FakeQuantize
from .granularity import Granularity, PerTensor, PerToken
from .quantized import Logical, QuantizedInputLayer, check_finite, frozen
from .replacing import take_over

Convolution = TypeVar("Convolution", bound="Int8Convolution")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dims of a weight or an input
GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "transposed", "output_padding",
)  # fmt: skip


class Int8Layer(QuantizedInputLayer):
    """What the int8 layers share: they keep the weight as codes, in memory and in the state_dict, and its scales.

    With act_bits 8 the codes are packed for the int8 kernels and each output channel has one scale. With act_bits 16
    the input stays in float, and each call dequantizes the weight from its codes, which may have any group_size and
    zero points: the float weight takes space neither in memory nor in the file.

    state_dict: ``codes``, int8 in the float layer's shape, or at 2 to 4 bits uint8 [⌈numel·bits/8⌉], as ``pack_bits``
    packs the flattened codes; ``scale`` [N], or [N, K/group_size] if groups are shorter than an output channel; if
    there are zero points, ``zero_point`` of scale's shape, int8; and what ``QuantizedInputLayer`` adds. The layers also
    load files of version 0.1.0, which call the codes ``weight`` and have a byte for each.
    """

    data: Tensor
    colsum: Tensor | None
    scale: nn.Parameter
    zero_point: Tensor | None
    private_buffers = ("data", "colsum")
    is_for_steps = False  # of a linear layer: see ``take_steps``

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        weight_bits: int,
        act_bits: int,
        group_size: int,
        symmetric: bool,
        input: FakeQuantize | None,
        input_granularity: Granularity,
        dtype: torch.dtype,
    ) -> None:
        checks.require(2 <= weight_bits <= 8, f"weight_bits: got {weight_bits}; accepted: 2 to 8")
        gemm_checks.activation_bits(act_bits)
        checks.require(act_bits == 8 or input is None, "input: got a quantizer with act_bits=16; accepted: None")
        n = self._outputs(weight_shape)
        k = math.prod(weight_shape) // max(n, 1)
        whole = group_size in (-1, k)
        checks.require(
            whole or (group_size > 0 and k % group_size == 0),
            f"group_size: got {group_size}; accepted: -1, or a divisor of {k}",
        )
        checks.require(act_bits == 16 or whole, f"group_size: got {group_size} with act_bits=8; accepted: -1")
        checks.require(act_bits == 16 or symmetric, "symmetric: got False with act_bits=8; accepted: True")
        if act_bits == 8 and input is None:
            input = FakeQuantize(granularity=input_granularity, quantizer="dynamic")
        super().__init__(weight_shape, bias, weight_bits, input, dtype)
        self.act_bits, self.group_size = act_bits, k if whole else group_size
        scales = (n,) if whole else (n, k // group_size)
        self.scale = frozen(torch.ones(scales, dtype=torch.float32))
        self.register_buffer("zero_point", None if symmetric else torch.zeros(scales, dtype=torch.int8))
        self._register_private()

    @property
    def is_packed(self) -> bool:
        """Whether the codes are packed for the int8 kernels."""
        return self.act_bits == 8 or self.is_for_steps

    @property
    def codes(self) -> Tensor:
        """The integers in the float layer's shape, int8."""
        return self._packed().unpack()[0] if self.is_packed else self.data

    def set_weight(self, codes: Tensor, scale: Tensor, bias: Tensor | None, zero_point: Tensor | None = None) -> None:
        """Takes codes (int8, the float layer's shape) with one scale per output channel, or per group.

        Raises:
            RuntimeError: codes have another shape, or zero_point is given and the layer has none, or the reverse.
        """
        checks.require(
            tuple(codes.shape) == self.weight_shape and codes.dtype == torch.int8,
            f"codes: got {codes.dtype} of shape {list(codes.shape)}; accepted: torch.int8 of shape "
            f"{list(self.weight_shape)}",
        )
        got, accepted = ("None" if t is None else "a tensor" for t in (zero_point, self.zero_point))
        checks.require(got == accepted, f"zero_point: got {got}; accepted by this layer: {accepted}")
        self._hold(self._pack_codes(codes))
        shape = self.scale.shape

        def spread(t: Tensor) -> Tensor:
            return t.detach().reshape(-1, *shape[1:]).expand(shape).clone()

        self.scale = frozen(spread(scale.float()))
        if zero_point is not None:
            self.zero_point = spread(zero_point.to(torch.int8))
        self._set_bias(bias)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Gives the weight other scales of the same shape; its codes and the bias stay."""
        self.scale.copy_(scale)

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        scale, zero_point = self._scale_of("scale"), self.zero_point
        n, groups = scale.shape if scale.dim() == 2 else (scale.shape[0], 1)
        codes, by_group = self._rows_of(self.codes).reshape(n, groups, self.group_size), (n, groups, 1)
        z = None if zero_point is None else zero_point.view(by_group)
        return self._weight_of(dequantize(codes, scale.view(by_group), z, dtype=dtype))

    def _rows_of(self, weight: Tensor) -> Tensor:
        """The weight, or its codes, with the outputs in the first dim."""
        return weight

    def _weight_of(self, rows: Tensor) -> Tensor:
        """Elements in the order of ``_rows_of`` as the float layer has them."""
        return rows.view(self.weight_shape)

    def _pack_codes(self, codes: Tensor) -> dict[str, Tensor | None]:
        raise NotImplementedError

    def _packed(self) -> PackedInt8 | PackedInt8Conv2d:
        raise NotImplementedError

    def _logical(self) -> Logical:
        if self.weight_bits not in layouts.BITS:
            return {"codes": (torch.int8, self.weight_shape)}
        return {"codes": (torch.uint8, (layouts.packed_length(math.prod(self.weight_shape), self.weight_bits),))}

    def _pack(self, logical: dict[str, Tensor]) -> dict[str, Tensor | None]:
        codes = logical["codes"]
        if self.weight_bits in layouts.BITS:
            codes = unpack_bits(codes, self.weight_bits, math.prod(self.weight_shape)).view(self.weight_shape)
        return self._pack_codes(codes)

    def _unpack(self) -> dict[str, Tensor]:
        codes = self.codes
        return {"codes": pack_bits(codes.flatten(), self.weight_bits) if self.weight_bits in layouts.BITS else codes}

    def _modernize(self, codes: Tensor) -> Tensor:
        if self.weight_bits in layouts.BITS and codes.dtype == torch.int8 and tuple(codes.shape) == self.weight_shape:
            return pack_bits(codes.flatten(), self.weight_bits)
        return codes


class Int8Linear(Int8Layer):
    """A linear layer on int8 codes: quantizes its input, multiplies in exact integers, scales (see ``int8_linear``).

    Args:
        in_features, out_features, bias: as nn.Linear.
        weight_bits: width of a code, 2 to 8. The kernels take a byte for each code; files pack codes of 2 to 4 bits.
        act_bits: 8: the layer quantizes its input to int8 codes. 16: the input stays in float, and the layer computes
            the product in float with the dequantized weight.
        group_size: with act_bits 16: how many weights along in_features share a scale (−1: all).
        symmetric: with act_bits 16: False gives each scale a zero point.
        input: with act_bits 8: how the input is quantized; by default to 8 bits, per token from its own range.
        dtype: dtype of ``weight``, the dequantized weight.

    x [..., in_features] fp32, bf16, fp16 or fp64 → [..., out_features] of x's dtype. Differentiable in x and bias (see
    ``int8_linear``), so that adapters train through it; the weight is frozen.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int = 8,
        act_bits: int = 8,
        group_size: int = -1,
        symmetric: bool = True,
        input: FakeQuantize | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape, weight = (out_features, in_features), (weight_bits, act_bits, group_size, symmetric)
        super().__init__(shape, bias, *weight, input, PerToken(), dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_float(cls, linear: nn.Linear, *, act_bits: int = 8) -> Int8Linear:
        """Quantizes a trained layer: weights per output channel by amax/127, inputs per token at run time.

        The new layer takes over the hooks of ``linear`` and whatever else was set on it.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        weight = linear.weight
        codes, scale = PackedInt8.from_float(check_finite(weight)).unpack()
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, act_bits=act_bits, dtype=weight.dtype)
        layer.to(weight.device).set_weight(codes, scale, linear.bias)
        return take_over(layer, linear, ("weight", "bias")).train(linear.training)

    def compute(self, input: Tensor) -> Tensor:
        _check_input(input, -1, self.in_features)
        out_dtype = self._out_dtype(input)
        if self._computes_in_float(input.dtype):
            return self.for_steps(input.dtype)(input)
        input_scale, input_zero_point = self._input_qparams(input)
        return int8_linear(
            input,
            self._packed(),
            self._parameters["bias"],
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            out_dtype=out_dtype,
        )

    def for_steps(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """``compute`` for many inputs of a dtype: a weight that is multiplied in float is dequantized once."""
        if not self._computes_in_float(dtype):
            return self.compute
        weight, bias = self._weight_in(dtype), self._bias_in(dtype)
        return lambda x: F.linear(self._input_values(x), weight, bias)

    def take_steps(self) -> None:
        """Packs the weight for the steps of a recurrent layer, whose kernels take a state that stays in float too.

        Not a weight in groups or with zero points, and those are multiplied as floats.
        """
        if self.act_bits == 16 and self.zero_point is None and self.scale.dim() == 1:
            logical = self._unpack()
            self.is_for_steps = True
            self._hold(self._pack(logical))
            self._buffers = dict(sorted(self._buffers.items(), key=lambda item: item[1] is None))  # as at first

    def _computes_in_float(self, dtype: torch.dtype) -> bool:
        return self.act_bits == 16 or dtype == torch.float64

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._repr_of_codes()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)
        device = self.data.device
        stale = self.is_packed and layouts.int8_layout(self.data) != layouts.int8_layout_on(device)
        if stale and device.type != "meta":
            self._hold(self._pack(self._unpack()))  # the layer moved between the CPU and a GPU
        return self

    def _pack_codes(self, codes: Tensor) -> dict[str, Tensor | None]:
        if not self.is_packed:
            return {"data": codes.detach().clone(memory_format=torch.contiguous_format), "colsum": None}
        packed = PackedInt8.from_quantized(codes, torch.ones(1))
        return {"data": packed.data, "colsum": packed.colsum}

    def _packed(self) -> PackedInt8:
        held = self._buffers  # as an attribute each takes 0.4 µs more
        return PackedInt8(held["data"], held["colsum"], self._scale_of("scale"), self.weight_shape)  # type: ignore[arg-type]


class Int8Convolution(Int8Layer):
    """What the int8 convolutions share.

    Args:
        geometry, named: the arguments of torch's layer, ``float_class``, in its order and under its names.
        weight_bits, act_bits, group_size, symmetric, input, dtype: as ``Int8Linear``.

    channels_last: whether the weight is, in a layer of 2 or 3 dims; the result then is too, as that of torch's layer.
    """

    float_class: ClassVar[type[Any]]
    channels_last = False
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    transposed: bool
    output_padding: tuple[int, ...]

    def __init__(
        self,
        *geometry: Any,
        weight_bits: int = 8,
        act_bits: int = 8,
        group_size: int = -1,
        symmetric: bool = True,
        input: FakeQuantize | None = None,
        dtype: torch.dtype = torch.float32,
        **named: Any,
    ) -> None:
        conv = self.float_class(*geometry, **named, device="meta")  # checks the arguments and resolves ints
        for name in GEOMETRY:  # before the base class packs the weight
            setattr(self, name, getattr(conv, name))
        codes = weight_bits, act_bits, group_size, symmetric
        super().__init__(conv.weight.shape, conv.bias is not None, *codes, input, PerTensor(), dtype)

    @classmethod
    def from_float(cls: type[Convolution], conv: nn.Module, *, act_bits: int = 8) -> Convolution:
        """Quantizes a trained layer: weights per output channel by amax/127, the input per tensor at run time.

        The new layer takes over the hooks of ``conv`` and whatever else was set on it.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        weight: Any = conv.weight
        layer = cls.like(conv, act_bits=act_bits).to(weight.device)
        rows = layer._rows_of(check_finite(weight))
        codes, scale = PackedInt8.from_float(rows.flatten(1)).unpack()
        layer.set_weight(layer._weight_of(codes), scale, conv.bias)  # type: ignore[arg-type]
        return take_over(layer, conv, ("weight", "bias")).train(conv.training)

    @classmethod
    def like(cls: type[Convolution], conv: Any, **codes: Any) -> Convolution:
        """A layer with the geometry of ``conv``, without weights yet; ``codes``: bias and the keyword arguments."""
        codes.setdefault("bias", conv.bias is not None)
        if conv.transposed:
            codes["output_padding"] = conv.output_padding
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            dtype=conv.weight.dtype,
            **codes,
        )
        layer.channels_last = suggests_channels_last(conv.weight)
        return layer

    def compute(self, input: Tensor) -> Tensor:
        _check_input(input, -1 - len(self.kernel_size), self.in_channels)
        return self.convolve(input, self.stride, self.padding, self.dilation, self.padding_mode)

    def convolve(self, input: Tensor, stride: Any, padding: Any, dilation: Any, mode: str = "zeros") -> Tensor:
        """The convolution with the given geometry: a subclass may pass another one than the layer's to its function."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        added = f"output_padding={self.output_padding}, " if self.transposed else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, {added}dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, {self._repr_of_codes()}"
        )

    def _sides(self, padding: Any, dilation: Any) -> list[int]:
        """Turns a padding as in F.conv2d into that of F.pad: left, right, top, bottom."""
        dims = len(self.kernel_size)
        if padding == "valid":
            return [0] * (2 * dims)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(each(dilation, dims), self.kernel_size, strict=True)]
            return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        return [side for side in reversed(each(padding, dims)) for _ in range(2)]

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        weight = super()._weight_in(dtype)
        return weight.to(memory_format=FORMATS[weight.dim()]) if self.channels_last else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Convolution:
        if len(self.weight_shape) in FORMATS:
            # fn may change the memory format of the float layer's weight; a small tensor in its place shows the result.
            format = FORMATS[len(self.weight_shape)] if self.channels_last else torch.contiguous_format
            sizes = [min(size, 2) for size in self.weight_shape]
            small = torch.empty(sizes, device=self.data.device, memory_format=format)
            self.channels_last = suggests_channels_last(fn(small))
        super()._apply(fn, recurse)
        return self

    def _pack_codes(self, codes: Tensor) -> dict[str, Tensor | None]:
        if self.act_bits == 16:
            return {"data": codes.detach().clone(memory_format=torch.contiguous_format), "colsum": None}
        return self._pack_for_kernels(codes)

    def _pack_for_kernels(self, codes: Tensor) -> dict[str, Tensor | None]:
        codes = codes.reshape(self._as_kernels_take(self.weight_shape))
        packed = PackedInt8Conv2d.from_quantized(codes, torch.ones(1), self.groups)
        return {"data": packed.data, "colsum": packed.colsum}

    def _packed(self) -> PackedInt8Conv2d:
        shape = self._as_kernels_take(self.weight_shape)
        return PackedInt8Conv2d(self.data, self.colsum, self._scale_of("scale"), shape, self.groups)  # type: ignore[arg-type]

    def _as_kernels_take(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape [N, C, H, W] of a weight of the layer's shape."""
        return shape


class Int8Conv2d(Int8Convolution):
    """A 2-D convolution on int8 codes, with nn.Conv2d's arguments; padding adds the code of zero.

    weight_bits, act_bits, group_size, symmetric, dtype: as ``Int8Linear``; a group of weights runs along the flattened
    weight of an output channel. By default the layer quantizes its input per tensor from its own range; ``convert``
    fixes the range that was trained.

    x [B, C, H, W] or [C, H, W], fp32, bf16, fp16 or fp64 → x's dtype. The result is in channels_last memory when
    nn.Conv2d's is: when x or the weight is. ``channels_last``: whether the weight is.
    Differentiable in x and bias; the weight is frozen.
    """

    float_class = nn.Conv2d

    def convolve(self, input: Tensor, stride: Any, padding: Any, dilation: Any, mode: str = "zeros") -> Tensor:
        out_dtype = self._out_dtype(input)
        # The kernels pad evenly and with zeros. Any other padding happens before quantization, where it is exact.
        sides = self._sides(padding, dilation)
        even = sides[0] == sides[1] and sides[2] == sides[3] and mode == "zeros"
        padding = (sides[2], sides[0]) if even else (0, 0)
        in_float = self.act_bits == 16 or input.dtype == torch.float64
        if in_float:
            x = self._input_values(input)
        else:
            x, (input_scale, input_zero_point) = input, self._input_qparams(input)
        if not even:
            x = F.pad(x, sides, "constant" if mode == "zeros" else mode)
        if in_float:
            return F.conv2d(x, self._weight_in(x.dtype), self._bias_in(x.dtype), stride, padding, dilation, self.groups)
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        y = int8_conv2d(
            batch,
            self._packed(),
            self.bias,
            input_scale=input_scale,  # type: ignore[arg-type]
            input_zero_point=input_zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            stride=stride,
            padding=padding,
            dilation=dilation,
            channels_last=suggests_channels_last(batch) or (self.channels_last and bool(batch.shape[0])),
        )
        if y.dtype != out_dtype:
            y = y.to(out_dtype)
        return y if x.dim() == 4 else y.squeeze(0)


def _check_input(x: Tensor, dim: int, channels: int) -> None:
    """Refuses an input of a linear layer (dim −1) or a convolution with other channels in that dim, or other dims."""
    if isinstance(x, Tensor):
        checks.dense("input", x)
        if torch.jit.is_tracing():  # sizes are tensors then
            return
        dims = x.dim()
        if dims >= -dim and (dim == -1 or dims <= 1 - dim) and x.shape[dim] == channels:
            return
    accepted = f"[..., {channels}]"
    if dim < -1:
        sizes = f"{channels}, {('L', 'H, W', 'D, H, W')[-2 - dim]}]"
        accepted = f"[N, {sizes} or [{sizes}"
    if not isinstance(x, Tensor):
        raise TypeError(f"input: got {type(x).__name__}; accepted: a tensor {accepted}")
    raise RuntimeError(f"input: got shape {list(x.shape)}; accepted: {accepted}")


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch's layers take x [N, C, *size] for channels_last: its strides grow in the order C, W, H, (D,) N.

    If the strides of N and C are equal the answer is no: for 1×1 images with one channel both formats have the same
    strides. In one dim it is always no.
    """
    if x.dim() not in FORMATS:
        return False
    c, *size = x.shape[1:]
    of_n, of_c, *of_size = x.stride()
    least = last = of_c
    for side, above in zip((c, *reversed(size)), (*reversed(of_size), of_n), strict=True):
        least *= max(side, 1)
        if above < least:
            return False
        least, last = above, least
    return of_c > 0 and x.numel() > 0 and last != of_c


def each(value: Any, dims: int) -> tuple[int, ...]:
    """An entry for each dim, of one integer or a sequence of one or as many."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
