"""Int4Linear: a layer on weights of 2, 3 or 4 bits, with a scale for each group of a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, gemm_checks, layouts
from ..ops.int4_gemm import PackedInt, int4_linear
from ..ops.packing import pack_bits, unpack_bits
from ..ops.weight_groups import quantize_groups, resolved_group_size
from .fake_quantize import FakeQuantize
from .granularity import PerToken
from .quantized import Logical, QuantizedInputLayer, check_finite
from .replacing import take_over


def _logical_weight(
    shape: tuple[int, ...], bits: int, group_size: int, scale_dtype: torch.dtype, offset: str | None
) -> Logical:
    """The tensors that store a weight [N, K]; ``offset``: what a group has besides its scale."""
    n, k = shape
    groups = (n, layouts.groups_of(k, group_size))
    return {
        "codes": (torch.uint8, (n, layouts.packed_length(k, bits))),
        "scale": (scale_dtype, groups),
        "zero_point": (torch.int8, groups) if offset == "zero_point" else None,
        "minimum": (scale_dtype, groups) if offset == "minimum" else None,
    }


class Int4Linear(QuantizedInputLayer):
    """A linear layer on weights of 2 to 4 bits; its input is int8 codes or float (see ``int4_linear``).

    Args:
        in_features, out_features, bias: as nn.Linear.
        weight_bits: width of a code: 2, 3 or 4.
        group_size: how many weights along in_features share a scale: −1 for all, or a multiple of 8, at least 16, that
            divides in_features.
        symmetric: True: a weight is code·scale. False: a weight is (code − zero_point)·scale.
        minimum: with symmetric=False and 4 bits: a weight is (code + 8)·scale + minimum, without a zero point.
        scale_dtype: dtype of scales and minima: torch.float32, torch.bfloat16 or torch.float16.
        act_bits: 8: the layer quantizes its input to int8 codes. 16: the input stays in float.
        input: with act_bits 8: how the input is quantized; by default to 8 bits, per token from its own range.
        dtype: dtype of ``weight``, the dequantized weight.

    state_dict: ``codes`` (uint8, as ``pack_bits`` packs them; version 0.1.0 calls them ``weight``), ``scale``
    [N, K/group_size], ``zero_point`` (int8) or ``minimum`` of scale's shape, and what ``QuantizedInputLayer`` adds. The
    packed layout depends on the device: the layer packs its weight anew when it moves to a GPU.

    x [..., in_features] fp32, bf16, fp16 or fp64 → [..., out_features] of x's dtype. Differentiable in x and bias (see
    ``int8_linear``), so that adapters train through it; the weight is frozen.
    """

    data: Tensor
    packed_scale: nn.Parameter
    packed_zero_point: Tensor | None
    packed_minimum: Tensor | None
    weight_sum: Tensor
    private_buffers = ("data", "packed_zero_point", "packed_minimum", "weight_sum")
    private_parameters = ("packed_scale",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int = 4,
        group_size: int = 32,
        symmetric: bool = True,
        minimum: bool = False,
        scale_dtype: torch.dtype = torch.float32,
        act_bits: int = 8,
        input: FakeQuantize | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        group_size = resolved_group_size(weight_bits, group_size, in_features, scale_dtype)
        checks.require(
            not (minimum and (symmetric or weight_bits != 4)),
            f"minimum: got True with symmetric={symmetric}, weight_bits={weight_bits}; accepted: with symmetric=False, "
            "weight_bits=4",
        )
        gemm_checks.activation_bits(act_bits)
        checks.require(act_bits == 8 or input is None, "input: got a quantizer with act_bits=16; accepted: None")
        if act_bits == 8 and input is None:
            input = FakeQuantize(granularity=PerToken(), quantizer="dynamic")
        super().__init__((out_features, in_features), bias, weight_bits, input, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.scale_dtype, self.act_bits = group_size, scale_dtype, act_bits
        self.offset = None if symmetric else "minimum" if minimum else "zero_point"
        self._register_private()

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        group_size: int = 32,
        symmetric: bool = True,
        act_bits: int = 8,
        *,
        weight_bits: int = 4,
        scale_dtype: torch.dtype = torch.float32,
    ) -> Int4Linear:
        """Quantizes a trained layer by the range of each group (see ``PackedInt.from_float``), inputs per token.

        The new layer takes over the hooks of ``linear`` and whatever else was set on it.

        Raises:
            ValueError: the weight holds NaN or infinity.
            RuntimeError: a group_size, act_bits, weight_bits or scale_dtype that the layer does not accept.
        """
        weight = check_finite(linear.weight)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            weight_bits=weight_bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            act_bits=act_bits,
            dtype=weight.dtype,
        ).to(weight.device)
        codes, scale, zero_point = quantize_groups(weight, weight_bits, group_size, symmetric, scale_dtype)
        layer.set_weight(codes, scale, linear.bias, zero_point)
        return take_over(layer, linear, ("weight", "bias")).train(linear.training)

    @property
    def codes(self) -> Tensor:
        """The integers [N, K] in int8, unpacked."""
        return self._packed().unpack()[0]

    @property
    def scale(self) -> Tensor:
        """[N, K/group_size]."""
        return self._by_group(self._scale_of("packed_scale"))

    @property
    def zero_point(self) -> Tensor | None:
        """[N, K/group_size] in int8; None: the layer has no zero points."""
        return None if self.packed_zero_point is None else self._by_group(self.packed_zero_point)

    @property
    def minimum(self) -> Tensor | None:
        """[N, K/group_size] in scale's dtype, the value of code −8; None: the layer has no minima."""
        return None if self.packed_minimum is None else self._by_group(self.packed_minimum)

    def set_weight(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        zero_point: Tensor | None = None,
        *,
        minimum: Tensor | None = None,
    ) -> None:
        """Packs codes [N, K] int8 with their scales, and zero points or minima if the layer was made with them.

        Raises:
            RuntimeError: another shape, dtype or value (see ``PackedInt.from_quantized``).
        """
        given = {"zero_point": zero_point, "minimum": minimum}
        for name, t in given.items():
            got, accepted = ("None" if t is None else "a tensor"), ("a tensor" if self.offset == name else "None")
            checks.require(got == accepted, f"{name}: got {got}; accepted by this layer: {accepted}")
        checks.require(
            tuple(codes.shape) == self.weight_shape,
            f"codes: got shape {list(codes.shape)}; accepted: {list(self.weight_shape)}",
        )
        checks.require(
            scale.dtype == self.scale_dtype, f"scale: got {scale.dtype}; accepted by this layer: {self.scale_dtype}"
        )
        packed = PackedInt.from_quantized(codes, scale, zero_point, minimum=minimum, bits=self.weight_bits)
        checks.require(
            packed.group_size == self.group_size,
            f"scale: got shape {list(scale.shape)}, groups of {packed.group_size}; accepted by this layer: groups of "
            f"{self.group_size}",
        )
        self._hold(_private_of(packed))
        self._set_bias(bias)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Gives the weight other scales of the same shape, rounded to ``scale_dtype``; its codes and the bias stay."""
        self._hold(self._pack({**self._unpack(), "scale": scale.to(self.scale_dtype)}), in_place=True)

    def compute(self, input: Tensor) -> Tensor:
        out_dtype = self._out_dtype(input)
        if input.dtype == torch.float64:
            x = self._input_values(input)
            return F.linear(x, self._weight_in(x.dtype), self._bias_in(x.dtype))
        input_scale, input_zero_point = self._input_qparams(input)
        return int4_linear(
            input,
            self._packed(),
            self.bias,
            self.act_bits,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            out_dtype=out_dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, group_size={self.group_size}, "
            f"{'symmetric' if self.offset is None else self.offset}, {self._repr_of_codes()}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        super()._apply(fn, recurse)
        if not self.data.is_meta:
            packed = self._packed()
            if (moved := packed.to(self.data.device)) is not packed:
                self._hold(_private_of(moved))
        return self

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        codes, scale, zero_point, minimum = self._packed().unpack()
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scale = scale.to(compute)[..., None]
        values = codes.view(
            self.out_features, layouts.groups_of(self.in_features, self.group_size), self.group_size
        ).to(compute)
        if zero_point is not None:
            values = values - zero_point[..., None]
        values = values * scale if minimum is None else (values + 8) * scale + minimum.to(compute)[..., None]
        return values.view(codes.shape).to(dtype)

    def _packed(self) -> PackedInt:
        return PackedInt(
            self.data,
            self._scale_of("packed_scale"),
            self.packed_zero_point,
            self.packed_minimum,
            self.weight_sum,
            self.weight_shape,  # type: ignore[arg-type]
            self.group_size,
            self.weight_bits,
        )

    def _by_group(self, packed: Tensor) -> Tensor:
        # This copies, because a view of the padded panels would save all of them.
        return layouts.by_group(packed.detach(), self.out_features, layouts.int4_layout(self.data)).clone(
            memory_format=torch.contiguous_format
        )

    def _logical(self) -> Logical:
        return _logical_weight(self.weight_shape, self.weight_bits, self.group_size, self.scale_dtype, self.offset)

    def _pack(self, logical: dict[str, Tensor]) -> dict[str, Tensor | None]:
        codes = unpack_bits(logical["codes"], self.weight_bits, self.in_features)
        zero_point, minimum = logical.get("zero_point"), logical.get("minimum")
        packed = PackedInt.from_quantized(
            codes, logical["scale"], zero_point, minimum=minimum, bits=self.weight_bits
        )  # fmt: skip
        return _private_of(packed)

    def _unpack(self) -> dict[str, Tensor]:
        codes = pack_bits(self.codes, self.weight_bits)
        tensors = {"codes": codes, "scale": self.scale, "zero_point": self.zero_point, "minimum": self.minimum}
        return {name: t for name, t in tensors.items() if t is not None}


def _private_of(packed: PackedInt) -> dict[str, Tensor | None]:
    return {
        "data": packed.data,
        "packed_scale": packed.scale,
        "packed_zero_point": packed.zero_point,
        "packed_minimum": packed.minimum,
        "weight_sum": packed.weight_sum,
    }
