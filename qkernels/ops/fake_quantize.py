"""Fake quantization: the differentiable ``fake_quantize`` over the elementwise ops ``qkernels::fake_quantize_*``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks, library, samples
from ..layouts import mask_like
from ..reference import fake_quantize as reference
from ..reference import transforms
from .autograd import is_kept, kept, learnable, masked, straight_through, transformed
from .fake_quantize_learnable import learnable_backward, straight_through_backward

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), cuda=True, triton=True)


def _fake_quantize_scalar_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    yield x, 0.3, 0, *samples.INT4
    yield x, 0.05, -3, *samples.INT8


def _backward_mask_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    yield x, torch.randint(0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8)


def _scalar(fn: Any) -> Any:
    """The reference of the overload whose scale and zero point are numbers."""

    def call(*args: Any) -> Any:
        *tensors, scale, zero_point, quant_min, quant_max = args
        x = tensors[-1]
        scale = torch.full((), scale, dtype=reference.compute_dtype(x), device=x.device)
        zero_point = torch.full((), zero_point, dtype=torch.int32, device=x.device)
        return fn(*tensors, scale, zero_point, quant_min, quant_max)

    return call


_forward = _define(
    "fake_quantize_forward",
    "(Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max) -> Tensor",
    reference.fake_quantize_forward,
    lambda x, scale, zero_point, quant_min, quant_max: torch.empty_like(x),
    samples=samples.quantizer,
)
_forward_mask = _define(
    "fake_quantize_forward_mask",
    "(Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, bool lsq=False) "
    "-> (Tensor, Tensor)",
    reference.fake_quantize_forward_mask,
    lambda x, *_: (torch.empty_like(x), mask_like(x)),
    samples=samples.with_lsq(samples.quantizer),
)
_backward = _define(
    "fake_quantize_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, bool lsq=False) "
    "-> Tensor",
    reference.fake_quantize_backward,
    lambda grad, x, *_: torch.empty_like(x),
    samples=samples.with_lsq(samples.backward(samples.quantizer)),
)
_forward_scalar = _define(
    "fake_quantize_forward.scalar",
    "(Tensor x, float scale, SymInt zero_point, SymInt quant_min, SymInt quant_max) -> Tensor",
    _scalar(reference.fake_quantize_forward),
    lambda x, scale, zero_point, quant_min, quant_max: torch.empty_like(x),
    samples=_fake_quantize_scalar_samples,
)
_forward_mask_scalar = _define(
    "fake_quantize_forward_mask.scalar",
    "(Tensor x, float scale, SymInt zero_point, SymInt quant_min, SymInt quant_max) -> (Tensor, Tensor)",
    _scalar(reference.fake_quantize_forward_mask),
    lambda x, scale, zero_point, quant_min, quant_max: (torch.empty_like(x), mask_like(x)),
    samples=_fake_quantize_scalar_samples,
)
_backward_scalar = _define(
    "fake_quantize_backward.scalar",
    "(Tensor grad, Tensor x, float scale, SymInt zero_point, SymInt quant_min, SymInt quant_max) -> Tensor",
    _scalar(reference.fake_quantize_backward),
    lambda grad, x, scale, zero_point, quant_min, quant_max: torch.empty_like(x),
    samples=samples.backward(_fake_quantize_scalar_samples),
)
backward_mask = _define(
    "fake_quantize_backward_mask",
    "(Tensor grad, Tensor mask) -> Tensor",
    reference.fake_quantize_backward_mask,
    lambda grad, mask: torch.empty_like(grad),
    samples=_backward_mask_samples,
)


NO_SECOND = (
    'fake_quantize: learned scales have no second derivative, nor has straight_through="pact" or "ewgs"; '
    "detach scale and zero_point"
)

_kept = kept(_forward, _backward, reference.inside_range)
_masked = masked(_forward_mask)
_kept_scalar = kept(_forward_scalar, _backward_scalar, _scalar(reference.inside_range), tensors=1)
_masked_scalar = masked(_forward_mask_scalar)
_learnable = learnable(_forward, learnable_backward, no_second=NO_SECOND)
_variant = learnable(_forward, straight_through_backward, no_second=NO_SECOND)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    straight_through: str = "clip",
    ewgs_delta: float = 1e-3,
) -> Tensor:
    """Quantizes x to integers and back: (clamp(round(x/scale) + zero_point, quant_min, quant_max) − zero_point)·scale.

    Args:
        x: any shape; fp32, fp64, fp16 or bf16. Arithmetic is fp32 (fp64 for fp64), rounding half to even.
        scale: positive. Its shape is the granularity: one element (per tensor), or x's rank with every dim dividing
            x's: ``[N, 1]`` per row, ``[N, K/G]`` per group, ``[1, C, 1, 1]`` per channel of NCHW. A number
            is per tensor. Below the smallest normal fp32 it acts as that value; negative or NaN gives NaN.
        zero_point: None (0), one element, or scale's shape. Integers must lie in the range; a float one is rounded
            half to even and clamped into the range.
        quant_min, quant_max: inclusive integer range, within ±2**24.
        grad_factor: multiplies the gradients of scale and zero_point (LSQ uses 1/sqrt(numel·quant_max)).
        straight_through: how the gradient passes rounding and clipping, with v = x/scale. The conventions differ above
            all in the half steps between an end of the range and the last value that rounds to it.
            - "clip": torch's. dx = dy where round(v) + zero_point lies in the range, bounds included: the half steps
              are inside. dscale = grad_factor·Σ dy·(quant_min − zero_point below | quant_max − zero_point above |
              round(v) − v inside); dzero_point = −grad_factor·Σ dy·scale outside.
            - "lsq": LSQ (arXiv 1902.08153, equations 3 and 5) and LSQ+ (arXiv 2004.09576): the same sums, but inside is
              quant_min < v + zero_point < quant_max before rounding, bounds excluded: the half steps are outside.
            - "pass": dx = dy everywhere, clipped or not; scale and zero_point as in "clip".
            - "pact": PACT (arXiv 1805.06085) for any range: dx = dy where quant_min <= v + zero_point < quant_max
              before rounding, and only elements outside move scale: dscale = grad_factor·Σ dy·(quant_min − zero_point
              | quant_max − zero_point). PACT's learned clip is alpha = scale·(quant_max − zero_point): compute scale =
              alpha / (quant_max − zero_point) from a parameter alpha. If zero_point is quant_min, autograd then gives
              alpha PACT's own gradient, Σ dy over x >= alpha.
            - "ewgs": EWGS (arXiv 2104.00903), which clips before it rounds: dx = dy·(1 + ewgs_delta·sign(dy)·(v −
              round(v))) where quant_min <= v + zero_point <= quant_max before rounding, bounds included as in the clamp
              of the authors' code; the gradients of scale and zero_point follow from that by the chain rule.
        ewgs_delta: EWGS's factor per step of rounding error, at least 0. The paper measures the error in a range of
            length 1, so this is the paper's delta divided by quant_max − quant_min. The default is the fixed delta of
            the authors' code for 1 bit, where the two agree.

    Returns:
        A tensor of x's shape, dtype and memory layout. Infinities saturate, NaN stays NaN.

    The backward pass keeps x if x lives until then anyway, if a scale is learned, or if straight_through is "pact" or
    "ewgs"; else it keeps one bit per element, and for "pass" nothing.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    lsq = straight_through == "lsq"
    if straight_through != "clip" and not lsq:
        return _by_variant(x, scale, zero_point, quant_min, quant_max, straight_through, ewgs_delta, grad_factor)
    if not isinstance(scale, Tensor) and not isinstance(zero_point, Tensor) and not lsq:
        return fake_quantize_by_numbers(x, scale, 0 if zero_point is None else zero_point, quant_min, quant_max)
    scale, zero_point = as_tensors(x, scale, zero_point, quant_min, quant_max)
    if transformed():
        return transforms.fake_quantize(x, scale, zero_point, quant_min, quant_max, grad_factor, straight_through)
    if torch.is_grad_enabled():
        if scale.requires_grad or (zero_point is not None and zero_point.requires_grad):
            return _learnable(x, scale, zero_point, quant_min, quant_max, grad_factor, lsq)
        if x.requires_grad:
            return (_kept if is_kept(x) else _masked)(x, scale, zero_point, quant_min, quant_max, lsq)
    return _forward(x, scale, zero_point, quant_min, quant_max)


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    source: tuple[Tensor, Tensor],
    *,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    straight_through: str,
    ewgs_delta: float,
) -> Tensor:
    """``fake_quantize`` whose scale was computed from a parameter, which gets its gradient from the same autograd node.

    source: that parameter, and the factor that makes scale's gradient the parameter's. Not for torch.func's transforms.
    """
    if straight_through in ("clip", "lsq"):
        lsq = straight_through == "lsq"
        return _learnable(x, scale, zero_point, quant_min, quant_max, grad_factor, lsq, source=source)  # type: ignore[no-any-return]
    variant = straight_through, ewgs_delta, grad_factor
    return _variant(x, scale, zero_point, quant_min, quant_max, *variant, source=source)  # type: ignore[no-any-return]


def as_tensors(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as the ops take them, without a copy to a GPU; a zero point of 0 becomes None."""
    if not isinstance(scale, Tensor):
        if isinstance(zero_point, Tensor):
            raise RuntimeError("zero_point: got a tensor beside a float scale; accepted: an int or None")
        scale = torch.full((1,), scale, dtype=reference.compute_dtype(x), device=x.device)
    if zero_point is None or isinstance(zero_point, Tensor):
        return scale, zero_point
    if isinstance(zero_point, float):
        raise RuntimeError(f"zero_point: got {zero_point}; accepted: an int, a tensor or None")
    checks.zero_point_value(zero_point, quant_min, quant_max)  # as a tensor on a GPU it would not be checked
    if zero_point == 0:
        return scale, None
    return scale, torch.full((1,), zero_point, dtype=torch.int32, device=x.device)


def fake_quantize_by_numbers(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """``fake_quantize`` per tensor with numbers for scale and zero point, in the convention "clip"."""
    if transformed():
        return _scalar(transforms.fake_quantize)(x, scale, zero_point, quant_min, quant_max)
    if torch.is_grad_enabled() and x.requires_grad:
        return (_kept_scalar if is_kept(x) else _masked_scalar)(x, scale, zero_point, quant_min, quant_max)
    return _forward_scalar(x, scale, zero_point, quant_min, quant_max)


def _by_variant(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None,
    quant_min: int,
    quant_max: int,
    variant: str,
    delta: float,
    factor: float,
) -> Tensor:
    checks.straight_through(variant, delta, ("clip", *checks.VARIANTS))
    scale, zero_point = as_tensors(x, scale, zero_point, quant_min, quant_max)
    if transformed():
        return transforms.fake_quantize_straight_through(
            x, scale, zero_point, quant_min, quant_max, variant, delta, factor
        )
    if torch.is_grad_enabled():
        learns = scale.requires_grad or (zero_point is not None and zero_point.requires_grad)
        if learns or (x.requires_grad and variant != "pass"):
            return _variant(x, scale, zero_point, quant_min, quant_max, variant, delta, factor)
        if x.requires_grad:
            return straight_through(x, _forward(x.detach(), scale, zero_point, quant_min, quant_max))
    return _forward(x, scale, zero_point, quant_min, quant_max)
