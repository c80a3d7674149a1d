"""Fake quantization with parameters per channel of one dim, and the gradient through a bool mask, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from . import fake_quantize as reference


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    scale, zero_point = checks.channel_views(x, axis, scale, zero_point)
    return reference.fake_quantize_forward(x, scale, zero_point, quant_min, quant_max)


def fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    scale, zero_point = checks.channel_views(x, axis, scale, zero_point)
    return reference.fake_quantize_forward_mask(x, scale, zero_point, quant_min, quant_max)


def inside_range(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:
    scale, zero_point = checks.channel_views(x, axis, scale, zero_point)
    return reference.inside_range(x, scale, zero_point, quant_min, quant_max)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    checks.values("x", x)
    checks.grad(grad, x)
    scale, zero_point = checks.channel_views(x, axis, scale, zero_point)
    return reference.fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max)


def fake_quantize_backward_bytes(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where mask is set, else 0; in grad's memory layout, or in mask's if grad is not dense."""
    checks.bytes_mask(mask, grad)
    return empty_gradient(grad, mask).copy_(torch.where(mask, grad, 0))


def empty_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    dx = torch.empty_like(grad)
    return dx if dx.stride() == grad.stride() else torch.empty_like(mask, dtype=grad.dtype)
