"""ReLU fused with fake quantization: ``relu_fake_quantize``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import library
from ..reference import relu_fake_quantize as reference
from ..reference import transforms
from ..reference.straight_through import check_clip_or_lsq
from .fake_quantize import _again, _entered, _is_kept, _mask_like, _through_mask, as_tensors, transformed

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), triton=True)

_PARAMS = "Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max"

_forward = _define(
    "relu_fake_quantize_forward",
    f"(Tensor x, {_PARAMS}) -> Tensor",
    reference.relu_fake_quantize_forward,
    lambda x, *_: torch.empty_like(x),
)
_forward_mask = _define(
    "relu_fake_quantize_forward_mask",
    f"(Tensor x, {_PARAMS}, bool lsq=False) -> (Tensor, Tensor)",
    reference.relu_fake_quantize_forward_mask,
    lambda x, *_: (torch.empty_like(x), _mask_like(x)),
)
_backward = _define(
    "relu_fake_quantize_backward",
    f"(Tensor grad, Tensor x, {_PARAMS}, bool lsq=False) -> Tensor",
    reference.relu_fake_quantize_backward,
    lambda grad, x, *_: torch.empty_like(x),
)
_learnable_backward = _define(
    "relu_fake_quantize_learnable_backward",
    f"(Tensor grad, Tensor x, {_PARAMS}, float grad_factor, bool lsq=False) -> (Tensor, Tensor, Tensor)",
    reference.relu_fake_quantize_learnable_backward,
    lambda grad, x, scale, *_: (torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)),
)


class _ReluKept(Function):
    """x alone needs a gradient and lives until then anyway: the backward pass recomputes from it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, lsq: bool
    ) -> Tensor:
        ctx.range = (low, high, lsq)
        ctx.save_for_backward(x, scale, zero_point)
        return _forward(x, scale, zero_point, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if _again(grad):
            dx = torch.where(reference.inside_range(*ctx.saved_tensors, *ctx.range), grad, 0)
        else:
            dx = _backward(grad, *ctx.saved_tensors, *ctx.range)
        return dx, None, None, None, None, None


class _ReluMask(Function):
    """x alone needs a gradient: one bit per element is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, lsq: bool
    ) -> Tensor:
        y, mask = _forward_mask(x, scale, zero_point, low, high, lsq)
        ctx.stride = y.stride()
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _through_mask(ctx, grad), None, None, None, None, None


class _ReluLearnable(Function):
    """Scale or zero point is learned: x is kept, everything else is recomputed in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, factor: float, lsq: bool
    ) -> Tensor:
        ctx.range = (low, high, factor, lsq)
        ctx.save_for_backward(x, scale, zero_point)
        return _forward(x, scale, zero_point, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if _again(grad):
            raise RuntimeError(
                "relu_fake_quantize: learned scales have no second derivative; detach scale and zero_point"
            )
        x, scale, zero_point = ctx.saved_tensors
        dx, dscale, dzp = _learnable_backward(grad, x, scale, zero_point, *ctx.range)
        if ctx.needs_input_grad[2]:
            dzp = (dzp.sum() if zero_point.numel() == 1 else dzp).reshape(zero_point.shape).to(zero_point.dtype)
        return dx, dscale, dzp if ctx.needs_input_grad[2] else None, None, None, None, None


_kept = _entered(_ReluKept)
_masked = _entered(_ReluMask)
_learnable = _entered(_ReluLearnable)


def relu_fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    straight_through: str = "clip",
) -> Tensor:
    """``fake_quantize(torch.relu(x), …)`` in one pass, bit for bit, and its gradients too.

    Arguments, result and errors are those of ``fake_quantize``; numbers for scale and zero_point become one-element
    tensors, straight_through is "clip" or "lsq". The gradient of x passes where x is positive and inside the range. For
    the backward pass x is kept where it lives anyway or a scale is learned, else one bit per element: torch.relu alone
    would keep its whole output.
    """
    check_clip_or_lsq(straight_through)
    lsq = straight_through == "lsq"
    if not isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        raise RuntimeError("zero_point: got a tensor beside a float scale; accepted: an int or None")
    scale, zero_point = as_tensors(x, scale, zero_point, quant_min, quant_max)
    if transformed():
        return transforms.relu_fake_quantize(x, scale, zero_point, quant_min, quant_max, grad_factor, straight_through)
    if torch.is_grad_enabled():
        if scale.requires_grad or (zero_point is not None and zero_point.requires_grad):
            return _learnable(x, scale, zero_point, quant_min, quant_max, grad_factor, lsq)
        if x.requires_grad:
            return (_kept if _is_kept(x) else _masked)(x, scale, zero_point, quant_min, quant_max, lsq)
    return _forward(x, scale, zero_point, quant_min, quant_max)
