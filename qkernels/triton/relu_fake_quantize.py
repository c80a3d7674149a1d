"""ReLU and fake quantization in Triton: the kernels of fake quantization and of its sums, with RELU set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from . import fake_quantize as plain
from .common.granularity import unsupported_granularity
from .common.pointwise import dense_and_like, empty_mask
from .common.sums import learnable_backward


def unsupported(op: str, *args: Any) -> str | None:
    at = 0 if "forward" in op else 1
    return unsupported_granularity(args[at], args[at + 1]) if args else None


def relu_fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    plain.forward(x, scale, zero_point, quant_min, quant_max, y, rectify=True)
    return y


def relu_fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> tuple[Tensor, Tensor]:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
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
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
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
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    terms = "lsq" if lsq else "clip"
    return learnable_backward(terms, grad, x, scale, zero_point, quant_min, quant_max, grad_factor, rectify=True)
