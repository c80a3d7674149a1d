"""2-D convolution on packed, frozen int8 weights, with a statically quantized input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from .. import checks, conv_checks, layouts, library, samples
from ..reference import int8_conv2d as reference
from ..reference.transforms import as_if
from .autograd import entered, transformed
from .frozen import as_torch_jit_takes_them, bias_gradient, constant, represented, wants_gradient


def _int8_conv2d_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 4 and x.dtype != torch.float64:
        packed = reference.int8_conv_pack(samples.codes(6, x.shape[1], 2, 2), 1)
        weight = *packed, torch.rand(6), torch.randn(6)
        zero_point = torch.tensor([5], dtype=torch.int32)
        yield x, *weight, torch.tensor([0.02]), zero_point, *samples.INT8, [2, 2], [1, 2], [1, 0], [1, 1], 1, True


def _pack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        yield samples.codes(6, *x.shape), 1
        yield samples.codes(66, 3, 2, 3), 3


def _unpack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for q, groups in _pack_samples(x):
        yield reference.int8_conv_pack(q, groups)[0], list(q.shape), groups


def _fake_pack(q: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    conv_checks.conv_weight("q", q.shape, groups)
    data = q.new_empty((layouts.conv_bytes(q.shape, groups),), dtype=torch.int8)
    return data, q.new_empty((q.shape[0],), dtype=torch.int32)


def _transpose_pack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        yield samples.codes(6, *x.shape), 1, [2], [1]
        yield samples.codes(6, 3, 3, 4), 3, [2, 3], [1, 2]


def _transpose_unpack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for q, *geometry in _transpose_pack_samples(x):
        yield reference.int8_conv_transpose_pack(q, *geometry)[0], list(q.shape), *geometry


def _fake_transpose_pack(
    q: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    conv_checks.conv_transpose_weight("q", q.shape, groups, stride, dilation)
    data = q.new_empty((layouts.conv_transpose_bytes(q.shape, groups, stride, dilation),), dtype=torch.int8)
    return data, q.new_empty((math.prod(stride) * q.shape[1] * groups,), dtype=torch.int32)


def _fake_conv2d(
    x: Tensor,
    data: Tensor,
    colsum: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = True,
) -> Tensor:
    n, c, h, w = conv_checks.conv2d_shape(x, colsum.shape[0], kernel_size, stride, padding, dilation, groups)
    return x.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c) if channels_last else (h * w * c, h * w, w, 1))


_int8_conv2d = library.define(
    "int8_conv2d",
    "(Tensor x, Tensor data, Tensor colsum, Tensor scale, Tensor? bias, Tensor input_scale, Tensor? input_zero_point, "
    "SymInt quant_min, SymInt quant_max, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, bool channels_last=True) -> Tensor",
    reference.int8_conv2d,
    _fake_conv2d,
    cpu=("amx", "avx512vnni", "avx2", "scalar"),
    samples=_int8_conv2d_samples,
)
int8_conv_pack = library.define(
    "int8_conv_pack",
    "(Tensor q, SymInt groups) -> (Tensor data, Tensor colsum)",
    reference.int8_conv_pack,
    _fake_pack,
    cpu=("scalar",),
    samples=_pack_samples,
)
int8_conv_unpack = library.define(
    "int8_conv_unpack",
    "(Tensor data, SymInt[] shape, SymInt groups) -> Tensor",
    reference.int8_conv_unpack,
    lambda data, shape, groups: data.new_empty(shape),
    cpu=("scalar",),
    samples=_unpack_samples,
)


int8_conv_transpose_pack = library.define(
    "int8_conv_transpose_pack",
    "(Tensor q, SymInt groups, SymInt[] stride, SymInt[] dilation) -> (Tensor data, Tensor colsum)",
    reference.int8_conv_transpose_pack,
    _fake_transpose_pack,
    cpu=("scalar",),
    samples=_transpose_pack_samples,
)
int8_conv_transpose_unpack = library.define(
    "int8_conv_transpose_unpack",
    "(Tensor data, SymInt[] shape, SymInt groups, SymInt[] stride, SymInt[] dilation) -> Tensor",
    reference.int8_conv_transpose_unpack,
    lambda data, shape, groups, stride, dilation: data.new_empty(shape),
    cpu=("scalar",),
    samples=_transpose_unpack_samples,
)


class PackedInt8Conv2d:
    """A convolution's weight [C_out, C_in/groups, kh, kw] as packed int8 codes with its scales.

    It is frozen: no gradient flows back to the tensors that it is packed from.

    Attributes:
        data: packed codes, int8 in one dim (``layouts.py`` draws them).
        colsum: [C_out] int32, the sum of each output channel's codes.
        scale: [C_out] fp32; weight ≈ code·scale.
        shape: (C_out, C_in/groups, kh, kw).
        groups: number of the convolution's groups.
    """

    def __init__(
        self, data: Tensor, colsum: Tensor, scale: Tensor, shape: tuple[int, int, int, int], groups: int
    ) -> None:
        self.data, self.colsum, self.scale, self.shape, self.groups = data, colsum, scale, shape, groups

    @classmethod
    def from_quantized(cls, q: Tensor, scale: Tensor, groups: int = 1) -> PackedInt8Conv2d:
        """Packs codes q [C_out, C_in/groups, kh, kw] int8 with scale: one element, [C_out] or [C_out, 1, 1, 1].

        Raises:
            ValueError: another dtype, rank or scale shape, or C_out is not divisible by groups.
        """
        if q.dtype != torch.int8 or q.dim() != 4:
            raise ValueError(
                f"q: got {q.dtype} of shape {list(q.shape)}; accepted: torch.int8 [C_out, C_in/groups, kh, kw]"
            )
        n, c, kh, kw = q.shape
        if groups < 1 or n % groups:
            raise ValueError(f"groups: got {groups}; accepted: a divisor of the output channels {n}")
        if scale.numel() != 1 and scale.shape not in ((n,), (n, 1, 1, 1)):
            raise ValueError(f"scale: got shape {list(scale.shape)}; accepted: one element, [{n}] or [{n}, 1, 1, 1]")
        data, colsum = int8_conv_pack(q, groups)
        return cls(data, colsum, scale.detach().float().reshape(-1).expand(n).contiguous(), (n, c, kh, kw), groups)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(q [C_out, C_in/groups, kh, kw] int8, scale [C_out] fp32), exactly what was packed."""
        return int8_conv_unpack(self.data, self.shape, self.groups), self.scale

    def __repr__(self) -> str:
        return f"PackedInt8Conv2d(shape={self.shape}, groups={self.groups})"


torch.serialization.add_safe_globals([PackedInt8Conv2d])  # torch.load(weights_only=True)


def _weight_of(data: Tensor, scale: Tensor, shape: Sequence[int], groups: int, dtype: torch.dtype) -> Tensor:
    return (int8_conv_unpack(data, shape, groups).float() * scale.reshape(-1, 1, 1, 1)).to(dtype)


class _Int8Conv2d(Function):
    """Sends x's gradient to ``values``, which ``represented(x)`` gives. Keeps the codes of the weight."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, x: Tensor, data: Tensor, colsum: Tensor, scale: Tensor,
        input_scale: Tensor, input_zero_point: Tensor | None, quant_min: int, quant_max: int, *geometry: Any,
    ) -> Tensor:  # fmt: skip
        kernel_size, *ctx.rest, _ = geometry
        groups = ctx.rest[-1]
        ctx.save_for_backward(data, scale)
        ctx.input = tuple(x.shape)
        ctx.shape = (colsum.shape[0], x.shape[1] // groups, *kernel_size)
        ctx.dtypes = values.dtype, None if bias is None else bias.dtype
        return _int8_conv2d(
            x, data, colsum, scale, bias, input_scale, input_zero_point, quant_min, quant_max, *geometry
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            data, scale = ctx.saved_tensors
            weight = _weight_of(data, scale, ctx.shape, ctx.rest[-1], grad.dtype)
            dx = conv2d_input(ctx.input, weight, grad, *ctx.rest).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dbias = bias_gradient(grad, (0, 2, 3), ctx.dtypes[1])
        return dx, dbias, *[None] * (len(ctx.needs_input_grad) - 2)


_convolution = entered(_Int8Conv2d)


def _differentiable_conv2d(
    x: Tensor,
    packed: PackedInt8Conv2d,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    channels_last: bool,
    *geometry: Any,
) -> Tensor:
    weight = packed.data, packed.colsum, packed.scale
    rest: Any = (
        input_scale.detach(),
        input_zero_point,
        quant_min,
        quant_max,
        list(packed.shape[2:]),
        *geometry,
        channels_last,
    )
    values = represented(x, input_scale, input_zero_point, quant_min, quant_max)
    if transformed():
        y = reference.int8_conv2d(x.detach(), *weight, constant(bias), *rest)
        w = _weight_of(packed.data, packed.scale, packed.shape, packed.groups, torch.float32)
        return as_if(y, F.conv2d(values.float(), w, None if bias is None else bias.float(), *geometry))
    return _convolution(values, bias, x.detach(), *weight, *rest)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def int8_conv2d(
    x: Tensor,
    packed: PackedInt8Conv2d,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor,
    input_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    channels_last: bool = True,
) -> Tensor:
    """conv2d(x, weight, bias) with x quantized to int8; sums are exact, the float epilogue is fp32.

    out = ((acc − zero_point·colsum)·weight_scale)·input_scale + bias, rounded once to x's dtype; the padding is
    an exact zero.

    Args:
        x: [N, C, H, W]; fp32, bf16 or fp16. The op reads contiguous and channels_last memory in place.
        packed: the weight.
        bias: [C_out], floating.
        input_scale: one element; x's codes are clamp(round(x/input_scale) + input_zero_point, quant_min, quant_max).
        input_zero_point: one integer within quant_min…quant_max; None: 0.
        quant_min, quant_max: inclusive range of x's codes, within int8.
        stride, padding, dilation: as in ``torch.nn.functional.conv2d``, zero padding, one integer or (height, width).
        channels_last: whether the result lies in channels_last memory; else it is contiguous.

    Returns:
        [N, C_out, H_out, W_out] of x's dtype. Infinities saturate; a NaN in x makes every output that sees it NaN.

    Differentiable in x, bias and input_scale, as the float convolution of ``fake_quantize(x)`` with the dequantized
    weight.

    Raises:
        RuntimeError: another shape, dtype or range, or C·kh·kw/groups > 131071.
    """
    if x.is_nested:
        checks.dense("x", x)
    channels = packed.shape[1] * packed.groups
    if x.dim() != 4 or x.shape[1] != channels:
        raise RuntimeError(f"x: got shape {list(x.shape)}; accepted: [N, {channels}, H, W]")
    x, bias, input_scale = as_torch_jit_takes_them(x, bias, input_scale)
    if transformed() or wants_gradient(x, bias, input_scale):
        return _differentiable_conv2d(
            x, packed, bias, input_scale, input_zero_point, quant_min, quant_max, channels_last,
            _pair(stride), _pair(padding), _pair(dilation), packed.groups,
        )  # fmt: skip
    return _int8_conv2d(
        x,
        packed.data,
        packed.colsum,
        packed.scale,
        bias,
        input_scale,
        input_zero_point,
        quant_min,
        quant_max,
        list(packed.shape[2:]),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        packed.groups,
        channels_last,
    )
