"""Convolutions in 1 to 3 dims, transposed ones too, on packed int8 weights: int8_programs of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import checks, gemm_checks, layouts
from ..reference import int8_convolution as reference
from ..reference.transforms import as_if
from .autograd import entered, transformed
from .frozen import as_torch_jit_takes_them, bias_gradient, constant, represented, wants_gradient
from .int8_conv2d import (
    int8_conv_pack,
    int8_conv_transpose_pack,
    int8_conv_transpose_unpack,
    int8_conv_unpack,
)
from .int8_program import int8_program


@dataclass(frozen=True)
class Geometry:
    """What the arguments of torch.convolution say beside its tensors, with an entry for each spatial dim.

    Attributes:
        shape: that of torch's weight: [C_out, C_in/groups, *kernel], or [C_in, C_out/groups, *kernel] if transposed.
        stride, padding, dilation, output_padding: as in torch.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def dims(self) -> int:
        return len(self.shape) - 2

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def out_channels(self) -> int:
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def in_channels(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    def for_torch(self) -> tuple[Any, ...]:
        """The last arguments of torch.convolution."""
        added = self.output_padding or (0,) * self.dims
        return self.stride, self.padding, self.dilation, self.transposed, added, self.groups


def pack(q: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Codes of the geometry's shape, int8, as (data, colsum) of the program's step; ``layouts.py`` draws them."""
    if geometry.transposed:
        return int8_conv_transpose_pack(q, geometry.groups, geometry.stride, geometry.dilation)  # type: ignore[no-any-return]
    return int8_conv_pack(q, geometry.groups)  # type: ignore[no-any-return]


def unpack(data: Tensor, geometry: Geometry) -> Tensor:
    """The codes that were packed."""
    shape, groups = geometry.shape, geometry.groups
    if geometry.transposed:
        return int8_conv_transpose_unpack(data, shape, groups, geometry.stride, geometry.dilation)  # type: ignore[no-any-return]
    return int8_conv_unpack(data, shape, groups)  # type: ignore[no-any-return]


def three(sizes: Sequence[int], missing: int) -> tuple[int, ...]:
    """Sizes of up to three spatial dims, as a program has them."""
    return (*[missing] * (3 - len(sizes)), *map(int, sizes))


def _written(geometry: Geometry, low: int, high: int, has_zero_point: bool, has_bias: bool) -> str:
    def text(sizes: Sequence[int], missing: int) -> str:
        return ",".join(map(str, three(sizes, missing)))

    first = 1 + has_zero_point
    zero_point = "zero_point=1 " if has_zero_point else ""
    bias = f"bias={first + 3} " if has_bias else ""
    last = ("output_padding", geometry.output_padding) if geometry.transposed else ("padding_after", geometry.padding)
    added = f"{last[0]}={text(last[1], 0)}"
    return "\n".join(
        (
            f"quantizer id=0 scale=0 {zero_point}low={low} high={high}",
            "input out=f0 index=0",
            "quantize out=q0 x=f0 q=0",
            f"{'conv_transpose' if geometry.transposed else 'conv'} x=q0 data={first} colsum={first + 1} "
            f"scale={first + 2} {bias}in={geometry.in_channels} out_channels={geometry.out_channels} "
            f"kernel={text(geometry.kernel, 1)} stride={text(geometry.stride, 1)} padding={text(geometry.padding, 0)} "
            f"{added} dilation={text(geometry.dilation, 1)} groups={geometry.groups} out=f1",
            "output x=f1 index=0 channels_last=input",
        )
    )


_plan = lru_cache(_written)


def _convolved(
    x: Tensor, data: Tensor, colsum: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor,
    input_zero_point: Tensor | None, quant_min: int, quant_max: int, geometry: Geometry,
) -> Tensor:  # fmt: skip
    numbers = [input_scale.float()] if input_zero_point is None else [input_scale.float(), input_zero_point]
    constants = [*numbers, data, colsum, scale, *([] if bias is None else [bias.float()])]
    written = _written if torch.compiler.is_compiling() else _plan  # torch.compile ignores caches, with a warning
    plan = written(geometry, quant_min, quant_max, input_zero_point is not None, bias is not None)
    return int8_program([x.float()], constants, plan)[0].to(x.dtype)  # type: ignore[no-any-return]


def _on_integers(x: Tensor, data: Tensor, *rest: Any) -> Tensor:
    """What a program computes, in plain torch: no wait for a GPU, and torch.func can transform it."""
    return reference.int8_convolution(x, unpack(data, rest[-1]), *rest[1:-1], *rest[-1].for_torch())


class _Convolution(Function):
    """Sends x's gradient to ``values``, which ``represented(x)`` gives. Keeps the codes of the weight."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, x: Tensor, data: Tensor, colsum: Tensor, scale: Tensor,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(data, scale)
        ctx.geometry, ctx.input = rest[-1], tuple(x.shape)
        ctx.dtypes = values.dtype, None if bias is None else bias.dtype
        return _chosen(x)(x, data, colsum, scale, bias, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            data, scale = ctx.saved_tensors
            weight = dequantized(data, scale, ctx.geometry, grad.dtype)
            x = grad.new_empty(1).expand(ctx.input)  # only its shape counts
            arguments = grad, x, weight, None, *ctx.geometry.for_torch(), (True, False, False)
            dx = torch.ops.aten.convolution_backward(*arguments)[0].to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dbias = bias_gradient(grad, (0, *range(2, grad.dim())), ctx.dtypes[1])
        return dx, dbias, *[None] * (len(ctx.needs_input_grad) - 2)


_convolution = entered(_Convolution)


def _chosen(x: Tensor) -> Any:
    return _on_integers if x.is_cuda else _convolved


def dequantized(data: Tensor, scale: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The weight, in the geometry's shape."""
    q = unpack(data, geometry)
    rows = layouts.outputs_first(q, geometry.groups) if geometry.transposed else q
    values = (rows.float() * scale.view(-1, *[1] * (rows.dim() - 1))).to(dtype)
    return layouts.inputs_first(values, geometry.groups) if geometry.transposed else values


def int8_convolution(
    x: Tensor,
    data: Tensor,
    colsum: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    geometry: Geometry,
) -> Tensor:
    """torch.convolution(x, weight, bias, …) with x quantized to int8 codes; sums are exact, the float epilogue is fp32.

    Args:
        x: [N, C_in, *size] in the geometry's 1 to 3 dims; fp32, bf16 or fp16.
        data, colsum: what ``pack`` gave.
        scale: [C_out] fp32; weight ≈ code·scale.
        bias: [C_out], floating.
        input_scale, input_zero_point, quant_min, quant_max: as in ``int8_conv2d``.

    Returns:
        [N, C_out, *size] of x's dtype, in channels_last memory if x is. Infinities saturate; an image that holds a NaN
        gives NaN in all its outputs.

    Differentiable in x, bias and input_scale, as the float convolution of ``fake_quantize(x)`` with the dequantized
    weight.

    Raises:
        RuntimeError: another shape, dtype or range.
    """
    checks.dense("x", x)
    if x.dim() != geometry.dims + 2 or x.shape[1] != geometry.in_channels:
        sides = ", ".join(("D", "H", "W")[-geometry.dims :] if geometry.dims > 1 else "L")
        raise RuntimeError(f"x: got shape {list(x.shape)}; accepted: [N, {geometry.in_channels}, {sides}]")
    checks.require(
        x.dtype in gemm_checks.OUT_DTYPES, f"x: got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16"
    )
    for added, stride, dilation in zip(geometry.output_padding, geometry.stride, geometry.dilation, strict=False):
        checks.require(
            added < max(stride, dilation),
            f"output_padding: got {added}; accepted: less than the stride or the dilation, {max(stride, dilation)}",
        )
    x, bias, input_scale = as_torch_jit_takes_them(x, bias, input_scale)
    rest = input_scale.detach(), input_zero_point, quant_min, quant_max, geometry
    if not (transformed() or wants_gradient(x, bias, input_scale)):
        return _chosen(x)(x, data, colsum, scale, bias, *rest)  # type: ignore[no-any-return]
    values = represented(x, input_scale, input_zero_point, quant_min, quant_max)
    if transformed():
        y = _on_integers(x.detach(), data, colsum, scale, constant(bias), *rest)
        weight = dequantized(data, scale, geometry, torch.float32)
        model = torch.convolution(values.float(), weight, None if bias is None else bias.float(), *geometry.for_torch())
        return as_if(y, model)
    return _convolution(values, bias, x.detach(), data, colsum, scale, *rest)  # type: ignore[no-any-return]
