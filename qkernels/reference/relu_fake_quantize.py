"""ReLU and fake quantization in one, in plain torch: ``torch.relu``, then the ops of ``fake_quantize``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..layouts import pack_mask
from . import fake_quantize as plain
from .fake_quantize_learnable import fake_quantize_learnable_backward


def rectified(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x.relu())


def relu_fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    return plain.fake_quantize_forward(rectified(x), scale, zero_point, quant_min, quant_max)


def inside_range(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> Tensor:
    """Where the gradient passes: x is positive and lies in the range."""
    return plain.inside_range(x.relu(), scale, zero_point, quant_min, quant_max, lsq) & (x > 0)


def relu_fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> tuple[Tensor, Tensor]:
    y = relu_fake_quantize_forward(x, scale, zero_point, quant_min, quant_max)
    return y, pack_mask(inside_range(x, scale, zero_point, quant_min, quant_max, lsq), y)


def relu_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    lsq: bool = False,
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    inside = inside_range(x, scale, zero_point, quant_min, quant_max, lsq)
    return torch.empty_like(x).copy_(torch.where(inside, grad, 0))


def relu_fake_quantize_learnable_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    lsq: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    dx, dscale, dzp = fake_quantize_learnable_backward(
        grad, rectified(x), scale, zero_point, quant_min, quant_max, grad_factor, lsq
    )
    return torch.empty_like(x).copy_(torch.where(x > 0, dx, 0)), dscale, dzp
