"""Makes convolutions on integers of QAT layers, with the BatchNorm behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import layouts
from ..nn.int8 import Int8Conv2d, Int8Convolution
from ..nn.int8_conv1d import Int8Conv1d
from ..nn.int8_conv3d import Int8Conv3d
from ..nn.int8_conv_transpose import Int8ConvTranspose1d, Int8ConvTranspose2d, Int8ConvTranspose3d
from ..nn.qat import QATConvolution
from ..nn.qat_conv_transpose import QATConvTranspose
from .fold import factor_and_bias
from .integer_layers import group_size

CONVOLUTIONS: tuple[type[Int8Convolution], ...] = (
    Int8Conv1d,
    Int8Conv2d,
    Int8Conv3d,
    Int8ConvTranspose1d,
    Int8ConvTranspose2d,
    Int8ConvTranspose3d,
)


def outputs_first(layer: Any, t: Tensor) -> Tensor:
    """A tensor of the weight's dims with the output channels in the first one, [C_out, C_in/groups, …]."""
    return layouts.outputs_first(t, layer.groups) if layer.transposed else t


def as_weight(layer: Any, rows: Tensor) -> Tensor:
    """The reverse of ``outputs_first``."""
    return layouts.inputs_first(rows, layer.groups) if layer.transposed else rows


def times(layer: Any, weight: Tensor, factor: Tensor) -> Tensor:
    """The weight, or another tensor of its shape, times a factor for each output channel."""
    rows = outputs_first(layer, weight)
    return as_weight(layer, rows * factor.view(-1, *[1] * (rows.dim() - 1)))


@torch.no_grad()
def integer_convolution(layer: QATConvolution | QATConvTranspose, norm: nn.Module | None) -> Int8Convolution:
    """norm: the BatchNorm whose factor and shift the layer's scales, signs of codes and bias take over."""
    source: Any = layer
    weight, input = layer.quantizer_of("weight"), layer.quantizer_of("input")
    assert weight is not None
    codes, scale, zero_point = weight.quantize(source.weight)
    scale, bias = scale.float(), source.bias
    if source.transposed:
        scale, zero_point = _of_outputs(source, scale), None if zero_point is None else _of_outputs(source, zero_point)
    options: dict[str, Any] = {"weight_bits": weight.bits}
    if input is None:
        options.update(act_bits=16, group_size=group_size(weight), symmetric=weight.symmetric)
    else:
        options.update(input=input)
        scale = scale.reshape(-1)
    if norm is not None:
        factor, folded_bias = (t.float() for t in factor_and_bias(norm, source.bias))
        codes = times(layer, codes, torch.where(factor < 0, -1, 1).to(torch.int8))
        scale, bias = scale * factor.abs(), folded_bias
    kind = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind.float_class))
    new = kind.like(layer, bias=bias is not None, **options).to(source.weight.device)
    new.set_weight(codes, scale, bias, zero_point)
    if input is not None:
        new.set_input(input)
    return new


def _of_outputs(layer: Any, t: Tensor) -> Tensor:
    """The scales or zero points of a transposed convolution's weight, one for each output channel or one for all."""
    if t.numel() == 1:
        return t.reshape(-1)
    one = (*layer.weight.shape[:2], *[1] * (t.dim() - 2))
    return outputs_first(layer, t.expand(one))[:, 0].reshape(-1)  # those of a group's inputs are equal
