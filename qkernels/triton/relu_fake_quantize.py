"""ReLU and fake quantization in Triton: the kernels of ``fake_quantize`` with RELU set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reference import fake_quantize as reference
from . import fake_quantize as plain
from . import fake_quantize_learnable as learnable
from .common.granularity import unsupported_granularity
from .common.pointwise import dense_and_like, empty_mask


def unsupported(op: str, *args: Any) -> str | None:
    at = 0 if "forward" in op else 1
    return unsupported_granularity(args[at], args[at + 1]) if args else None


def relu_fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    reference.check(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    plain.forward(x, scale, zero_point, quant_min, quant_max, y, rectify=True)
    return y


def relu_fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> tuple[Tensor, Tensor]:
    reference.check(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    mask = empty_mask(x)
    plain.forward(x, scale, zero_point, quant_min, quant_max, y, mask, rectify=True, lsq=lsq)
    return y, mask


def relu_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    lsq: bool = False,
) -> Tensor:
    reference.check(x, scale, zero_point, quant_min, quant_max)
    reference.check_grad(grad, x)
    return plain.backward(grad, x, scale, zero_point, quant_min, quant_max, rectify=True, lsq=lsq)


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
    return learnable.learnable_backward(grad, x, scale, zero_point, quant_min, quant_max, grad_factor, True, lsq)
