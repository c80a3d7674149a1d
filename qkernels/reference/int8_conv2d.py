"""int8 convolution in plain torch: quantize the input per tensor, convolve the integers exactly, one float epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .int8_gemm import (
    OUT_DTYPES,
    check,
    check_floating,
    check_k,
    check_vector,
    epilogue,
    int8_unpack,
    packed_shape,
    quantize_codes,
    static_qparams,
)


def check_pair(name: str, values: Sequence[int], least: int) -> None:
    check(
        len(values) == 2 and min(values) >= least,
        f"{name}: got {list(values)}; accepted: 2 integers, height and width, at least {least}",
    )


def out_shape(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """[N, C_out, H_out, W_out]; raises where the geometry does not fit together."""
    check(x.dim() == 4, f"x: got shape {list(x.shape)}; accepted: [N, C, H, W]")
    check(
        groups >= 1 and x.shape[1] % groups == 0 and out_channels % groups == 0,
        f"groups: got {groups}; accepted: a divisor of the input channels {x.shape[1]} and the output channels "
        f"{out_channels}",
    )
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        check_pair(name, values, least)
    size = []
    for i, side in enumerate(("height", "width")):
        padded, reach = x.shape[2 + i] + 2 * padding[i], dilation[i] * (kernel_size[i] - 1) + 1
        check(reach <= padded, f"x: got padded {side} {padded}; accepted: at least the dilated kernel's, {reach}")
        size.append((padded - reach) // stride[i] + 1)
    return x.shape[0], out_channels, size[0], size[1]


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
) -> Tensor:
    check(x.dtype in OUT_DTYPES, f"x: got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16")
    channels_out = colsum.numel()
    check_vector("colsum", colsum, channels_out, "[C_out]")
    shape = out_shape(x, channels_out, kernel_size, stride, padding, dilation, groups)
    group_in, group_out = x.shape[1] // groups, channels_out // groups
    k = kernel_size[0] * kernel_size[1] * group_in
    check_k("data", k)
    expected = (groups, *packed_shape(group_out, k))
    check(
        data.dtype == torch.int8 and tuple(data.shape) == expected and data.is_contiguous(),
        f"data: got {data.dtype} of shape {list(data.shape)}; accepted: what PackedInt8Conv2d holds, "
        f"contiguous torch.int8 {list(expected)}",
    )
    check(
        colsum.dtype == torch.int32 and colsum.is_contiguous(),
        f"colsum: got {colsum.dtype}; accepted: contiguous torch.int32",
    )
    check_vector("scale", scale, channels_out, "[C_out]")
    check_floating("scale", scale)
    if bias is not None:
        check_vector("bias", bias, channels_out, "[C_out]")
        check_floating("bias", bias)
    s, zero_point = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max)
    if x.shape[0] == 0 or channels_out == 0:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    q, nan = quantize_codes(x.detach(), s, zero_point, quant_min, quant_max)
    weight = torch.cat([int8_unpack(panels, group_out, k) for panels in data])
    weight = weight.view(channels_out, *kernel_size, group_in).permute(0, 3, 1, 2)
    sides = (padding[1], padding[1], padding[0], padding[0])
    # (q - zero_point) is zero in the padding: the code of an exact real zero.
    acc = conv2d(pad((q.long() - zero_point).double(), sides), weight.double(), None, stride, 0, dilation, groups)
    seen = conv2d(pad(nan.double(), sides), torch.ones_like(weight).double(), None, stride, 0, dilation, groups)
    rows = acc.long().permute(0, 2, 3, 1)
    scale_a = torch.where(seen.permute(0, 2, 3, 1) > 0, torch.nan, s)
    return epilogue(rows, scale_a, scale, bias, "none", x.dtype, None, None).permute(0, 3, 1, 2)
