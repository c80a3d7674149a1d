"""int8 convolution in plain torch: quantizes the input per tensor, convolves the integers exactly, ends in floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .. import conv_checks, gemm_checks, layouts
from .int8_gemm import epilogue, quantize_codes, static_qparams


def int8_conv_pack(q: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Codes [C_out, C_in/groups, *kernel] packed, and the sum of each output channel's codes."""
    gemm_checks.require(q.dtype == torch.int8, f"q: got {q.dtype}; accepted: torch.int8")
    conv_checks.conv_weight("q", q.shape, groups)
    return layouts.conv_pack(q, groups), q.flatten(1).sum(1, dtype=torch.int32)


def int8_conv_unpack(data: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """The codes [C_out, C_in/groups, *kernel] that were packed into ``data``."""
    conv_checks.conv_weight("shape", shape, groups)
    conv_checks.conv_data(data, shape, groups)
    return layouts.conv_unpack(data, shape, groups)


def int8_conv_transpose_pack(
    q: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Codes [C_in, C_out/groups, *kernel] packed, and the sums of codes of its classes, [classes·C_out]."""
    gemm_checks.require(q.dtype == torch.int8, f"q: got {q.dtype}; accepted: torch.int8")
    conv_checks.conv_transpose_weight("q", q.shape, groups, stride, dilation)
    return layouts.conv_transpose_pack(q, groups, stride, dilation)


def int8_conv_transpose_unpack(
    data: Tensor, shape: Sequence[int], groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The codes [C_in, C_out/groups, *kernel] that were packed into ``data``."""
    conv_checks.conv_transpose_weight("shape", shape, groups, stride, dilation)
    conv_checks.conv_transpose_data(data, shape, groups, stride, dilation)
    return layouts.conv_transpose_unpack(data, shape, groups, stride, dilation)


def int8_conv2d(
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
    shape = conv_checks.int8_conv2d(
        x, data, colsum, scale, bias, input_scale, input_zero_point, quant_min, quant_max, kernel_size, stride, padding,
        dilation, groups,
    )  # fmt: skip
    format = torch.channels_last if channels_last else torch.contiguous_format
    channels_out = colsum.numel()
    group_in = x.shape[1] // groups
    s, zero_point = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max)
    if x.shape[0] == 0 or channels_out == 0:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format)
    q, nan = quantize_codes(x.detach(), s, zero_point, quant_min, quant_max)
    weight = layouts.conv_unpack(data, (channels_out, group_in, *kernel_size), groups)
    sides = (padding[1], padding[1], padding[0], padding[0])
    # (q - zero_point) is zero in the padding, because the zero point is the code of an exact 0.
    acc = conv2d(pad((q.long() - zero_point).double(), sides), weight.double(), None, stride, 0, dilation, groups)
    seen = conv2d(pad(nan.double(), sides), torch.ones_like(weight).double(), None, stride, 0, dilation, groups)
    rows = acc.long().permute(0, 2, 3, 1).contiguous()
    scale_a = torch.where(seen.permute(0, 2, 3, 1) > 0, torch.nan, s)
    y = epilogue(rows, scale_a, scale, bias, "none", x.dtype, None, None).permute(0, 3, 1, 2)
    return y if channels_last else y.clone(memory_format=torch.contiguous_format)
