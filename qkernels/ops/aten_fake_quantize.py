"""What torch's own signatures need beyond ``fake_quantize``: parameters per channel of one dim, and byte masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import Function

from .. import library
from ..reference import aten_fake_quantize as reference
from .fake_quantize import _again, _constant, _entered, _is_kept, _mask_like, _through_mask, fake_quantize, transformed

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"))

_forward = _define(
    "fake_quantize_forward.channel",
    "(Tensor x, Tensor scale, Tensor zero_point, int axis, SymInt quant_min, SymInt quant_max) -> Tensor",
    reference.fake_quantize_forward,
    lambda x, *_: torch.empty_like(x),
)
_forward_mask = _define(
    "fake_quantize_forward_mask.channel",
    "(Tensor x, Tensor scale, Tensor zero_point, int axis, SymInt quant_min, SymInt quant_max) -> (Tensor, Tensor)",
    reference.fake_quantize_forward_mask,
    lambda x, *_: (torch.empty_like(x), _mask_like(x)),
)
_backward = _define(
    "fake_quantize_backward.channel",
    "(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int axis, SymInt quant_min, SymInt quant_max) -> Tensor",
    reference.fake_quantize_backward,
    lambda grad, x, *_: torch.empty_like(x),
)
_backward_bytes = _define(
    "fake_quantize_backward_bytes",
    "(Tensor grad, Tensor mask) -> Tensor",
    reference.fake_quantize_backward_bytes,
    reference.empty_gradient,
)


def _as_product(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
    with mode:
        return torch.mul(*args)


# In a graph that is compiled this op becomes the product that torch itself writes there, which compilers can fuse.
torch.library.register_torch_dispatch(_backward_bytes.name(), FunctionalTensorMode, _as_product)


class _ChannelKept(Function):
    """As _FakeQuantizeKept: x lives until the backward pass anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, *rest: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.rest = rest
        return _forward(x, scale, zero_point, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors
        if _again(grad):
            dx = torch.where(reference.inside_range(*saved, *ctx.rest), grad, 0)
        else:
            dx = _backward(grad, *saved, *ctx.rest)
        return dx, None, None, None, None, None


class _ChannelMask(Function):
    """As _FakeQuantizeMask: one bit per element is kept."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, mask = _forward_mask(*args)
        ctx.stride = y.stride()
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _through_mask(ctx, grad), None, None, None, None, None


_kept = _entered(_ChannelKept)
_masked = _entered(_ChannelMask)


def fake_quantize_per_channel_affine(
    input: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    """As ``torch.fake_quantize_per_channel_affine``, with any integer or float zero point, bf16 scales and axis < 0.

    scale and zero_point have one element for each of the channels of dim ``axis``. A float zero point is rounded half
    to even; NaN stays NaN and infinities saturate.
    """
    scale, zero_point = _constant(scale), _constant(zero_point)
    if not input.is_cpu or transformed():  # only the CPU has kernels with an axis
        scale, zero_point = reference.channel_views(input, axis, scale, zero_point)
        return fake_quantize(input, scale, zero_point, quant_min=quant_min, quant_max=quant_max)
    if torch.is_grad_enabled() and input.requires_grad:
        return (_kept if _is_kept(input) else _masked)(input, scale, zero_point, axis, quant_min, quant_max)
    return _forward(input, scale, zero_point, axis, quant_min, quant_max)
