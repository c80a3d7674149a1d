"""The rules of arguments of integer convolutions and of programs; see ``checks``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import layouts
from .checks import require, values
from .gemm_checks import OUT_DTYPES, bias_of, devices, int32_sums, max_k, static, vector


def conv2d_shape(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """The output's shape [N, C_out, H_out, W_out]; raises if the geometry does not fit together."""
    require(x.dim() == 4, f"x: got shape {list(x.shape)}; accepted: [N, C, H, W]")
    require(
        groups >= 1 and x.shape[1] % groups == 0 and out_channels % groups == 0,
        f"groups: got {groups}; accepted: a divisor of the input channels {x.shape[1]} and the output channels "
        f"{out_channels}",
    )
    for name, pair, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        require(
            len(pair) == 2 and min(pair) >= least and max(pair) <= 2**31,
            f"{name}: got {list(pair)}; accepted: 2 integers, height and width, at least {least} and at most 2^31",
        )
    size = []
    for i, side in enumerate(("height", "width")):
        padded, reach = x.shape[2 + i] + 2 * padding[i], dilation[i] * (kernel_size[i] - 1) + 1
        require(reach <= padded, f"x: got padded {side} {padded}; accepted: at least the dilated kernel's, {reach}")
        size.append((padded - reach) // stride[i] + 1)
    return x.shape[0], out_channels, size[0], size[1]


def conv_weight(name: str, shape: Sequence[int], groups: int) -> None:
    """shape is that of a convolution's weight that can be packed."""
    require(
        3 <= len(shape) <= 5 and min(shape) >= 0,
        f"{name}: got shape {list(shape)}; accepted: [C_out, C_in/groups, kernel], the kernel in 1 to 3 dims",
    )
    require(
        groups >= 1 and shape[0] % groups == 0,
        f"groups: got {groups}; accepted: a divisor of the output channels {shape[0]}",
    )
    max_k(name, math.prod(shape[1:]))


def conv_transpose_weight(
    name: str, shape: Sequence[int], groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> None:
    """shape is that of a transposed convolution's weight that can be packed."""
    require(
        3 <= len(shape) <= 5 and min(shape) >= 0,
        f"{name}: got shape {list(shape)}; accepted: [C_in, C_out/groups, kernel], the kernel in 1 to 3 dims",
    )
    require(
        groups >= 1 and shape[0] % groups == 0,
        f"groups: got {groups}; accepted: a divisor of the input channels {shape[0]}",
    )
    for of, numbers in (("stride", stride), ("dilation", dilation)):
        require(
            len(numbers) == len(shape) - 2 and min(numbers) >= 1,
            f"{of}: got {list(numbers)}; accepted: {len(shape) - 2} integers, at least 1",
        )
    max_k(name, shape[0] // groups * math.prod(shape[2:]))


def conv_data(data: Tensor, shape: Sequence[int], groups: int) -> None:
    """data is a packed convolution with a weight of this shape."""
    _packed_conv(data, layouts.conv_bytes(shape, groups), "int8_conv_pack")


def conv_transpose_data(
    data: Tensor, shape: Sequence[int], groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> None:
    """data is a packed transposed convolution with a weight of this shape."""
    _packed_conv(data, layouts.conv_transpose_bytes(shape, groups, stride, dilation), "int8_conv_transpose_pack")


def _packed_conv(data: Tensor, expected: int, packer: str) -> None:
    require(
        data.dtype == torch.int8 and tuple(data.shape) == (expected,) and data.is_contiguous(),
        f"data: got {data.dtype} of shape {list(data.shape)}; accepted: what {packer} gives for this weight, "
        f"contiguous torch.int8 [{expected}]",
    )


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
) -> tuple[int, int, int, int]:
    """Checks the arguments and returns the output's shape."""
    require(x.dtype in OUT_DTYPES, f"x: got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16")
    devices(
        x, data=data, colsum=colsum, scale=scale, bias=bias, input_scale=input_scale, input_zero_point=input_zero_point
    )  # fmt: skip
    channels_out = colsum.numel()
    vector("colsum", colsum, channels_out, "[C_out]")
    shape = conv2d_shape(x, channels_out, kernel_size, stride, padding, dilation, groups)
    k = kernel_size[0] * kernel_size[1] * (x.shape[1] // groups)
    max_k("data", k)
    conv_data(data, (channels_out, x.shape[1] // groups, *kernel_size), groups)
    int32_sums("colsum", colsum)
    vector("scale", scale, channels_out, "[C_out]")
    values("scale", scale)
    bias_of(bias, channels_out, "C_out")
    static("input", input_scale, input_zero_point, quant_min, quant_max)
    return shape


def int8_program(inputs: Sequence[Tensor]) -> None:
    require(len(inputs) > 0, "inputs: got none; accepted: at least one tensor")
    for i, x in enumerate(inputs):
        require(
            x.dtype == torch.float32 and 2 <= x.dim() <= 5,
            f"inputs[{i}]: got {x.dtype} of shape {list(x.shape)}; accepted: torch.float32 [N, C], [N, C, L], "
            "[N, C, H, W] or [N, C, D, H, W]",
        )
        require(
            x.shape[0] == inputs[0].shape[0],
            f"inputs[{i}]: got {x.shape[0]} images; accepted: as many as inputs[0] has, {inputs[0].shape[0]}",
        )
