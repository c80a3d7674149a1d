"""ReLU fused with fake quantization: ``relu_fake_quantize``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import checks, library, samples
from ..layouts import mask_like
from ..reference import relu_fake_quantize as reference
from ..reference import transforms
from .autograd import is_kept, kept, learnable, masked, transformed
from .fake_quantize import as_tensors

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), triton=True)

_PARAMS = "Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max"

_forward = _define(
    "relu_fake_quantize_forward",
    f"(Tensor x, {_PARAMS}) -> Tensor",
    reference.relu_fake_quantize_forward,
    lambda x, *_: torch.empty_like(x),
    samples=samples.quantizer,
)
_forward_mask = _define(
    "relu_fake_quantize_forward_mask",
    f"(Tensor x, {_PARAMS}, bool lsq=False) -> (Tensor, Tensor)",
    reference.relu_fake_quantize_forward_mask,
    lambda x, *_: (torch.empty_like(x), mask_like(x)),
    samples=samples.with_lsq(samples.quantizer),
)
_backward = _define(
    "relu_fake_quantize_backward",
    f"(Tensor grad, Tensor x, {_PARAMS}, bool lsq=False) -> Tensor",
    reference.relu_fake_quantize_backward,
    lambda grad, x, *_: torch.empty_like(x),
    samples=samples.with_lsq(samples.backward(samples.quantizer)),
)
_learnable_backward = _define(
    "relu_fake_quantize_learnable_backward",
    f"(Tensor grad, Tensor x, {_PARAMS}, float grad_factor, bool lsq=False) -> (Tensor, Tensor, Tensor)",
    reference.relu_fake_quantize_learnable_backward,
    lambda grad, x, scale, *_: (torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)),
    samples=samples.with_lsq(samples.learnable),
    sums=(1, 2),
)


_kept = kept(_forward, _backward, reference.inside_range)
_masked = masked(_forward_mask)
_learnable = learnable(
    _forward,
    _learnable_backward,
    no_second="relu_fake_quantize: learned scales have no second derivative; detach scale and zero_point",
)


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
    """``fake_quantize(torch.relu(x), …)`` in one pass, with the same bits, also in the gradients.

    Arguments, result and errors are those of ``fake_quantize``; numbers for scale and zero_point become one-element
    tensors, straight_through is "clip" or "lsq". The gradient of x passes where x is positive and inside the range. The
    backward pass keeps x if x lives until then anyway or a scale is learned, else one bit per element; torch.relu alone
    would keep its whole output.
    """
    checks.clip_or_lsq(straight_through)
    lsq = straight_through == "lsq"
    scale, zero_point = as_tensors(x, scale, zero_point, quant_min, quant_max)
    if transformed():
        return transforms.fake_quantize(
            x.relu(), scale, zero_point, quant_min, quant_max, grad_factor, straight_through
        )
    if torch.is_grad_enabled():
        if scale.requires_grad or (zero_point is not None and zero_point.requires_grad):
            return _learnable(x, scale, zero_point, quant_min, quant_max, grad_factor, lsq)
        if x.requires_grad:
            return (_kept if is_kept(x) else _masked)(x, scale, zero_point, quant_min, quant_max, lsq)
    return _forward(x, scale, zero_point, quant_min, quant_max)


def relu_fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    source: tuple[Tensor, Tensor],
    *,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    lsq: bool,
) -> Tensor:
    """``relu_fake_quantize`` as ``fake_quantize_learned`` is ``fake_quantize``."""
    return _learnable(x, scale, zero_point, quant_min, quant_max, grad_factor, lsq, source=source)  # type: ignore[no-any-return]
