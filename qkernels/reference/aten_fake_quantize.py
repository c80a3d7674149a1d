"""In plain torch: fake quantization with parameters per channel of one dim, and the gradient through a bool mask."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fake_quantize as reference


def channel_views(x: Tensor, axis: int, *params: Tensor) -> list[Tensor]:
    """Per-channel [C] parameters in the shape that speaks for dim ``axis`` of x."""
    dims = x.dim()
    if not -dims <= axis < dims:
        raise RuntimeError(f"axis: got {axis}; accepted: {-dims} to {dims - 1}, x has {dims} dims")
    shape = [1] * dims
    shape[axis] = channels = x.size(axis)
    for param in params:
        if param.dim() != 1 or param.numel() != channels:
            raise RuntimeError(
                f"scale, zero_point: got shape {list(param.shape)}; accepted: one value for each of x's {channels} "
                f"channels (dim {axis})"
            )
    return [param.view(shape) for param in params]


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    scale, zero_point = channel_views(x, axis, scale, zero_point)
    return reference.fake_quantize_forward(x, scale, zero_point, quant_min, quant_max)


def fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    scale, zero_point = channel_views(x, axis, scale, zero_point)
    return reference.fake_quantize_forward_mask(x, scale, zero_point, quant_min, quant_max)


def inside_range(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:
    scale, zero_point = channel_views(x, axis, scale, zero_point)
    return reference.inside_range(x, scale, zero_point, quant_min, quant_max)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    scale, zero_point = channel_views(x, axis, scale, zero_point)
    return reference.fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max)


def fake_quantize_backward_bytes(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where mask is set, else 0; in grad's memory layout, or in mask's where grad is not dense."""
    if mask.dtype != torch.bool or mask.shape != grad.shape:
        raise RuntimeError(
            f"mask: got {mask.dtype} of shape {list(mask.shape)}; accepted: torch.bool of grad's shape "
            f"{list(grad.shape)}"
        )
    return empty_gradient(grad, mask).copy_(torch.where(mask, grad, 0))


def empty_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    dx = torch.empty_like(grad)
    return dx if dx.stride() == grad.stride() else torch.empty_like(mask, dtype=grad.dtype)
