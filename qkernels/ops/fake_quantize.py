"""Fake quantization: differentiable public functions over the raw ops ``qkernels::fake_quantize_*``.

Raw ops are not differentiable. Autograd lives in old-style autograd.Functions, entered only where a gradient is
wanted: per call that costs a third of ``register_autograd``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import Function, forward_ad

from .. import library
from ..reference import fake_quantize as reference
from ..reference import transforms
from ..reference.aten_fake_quantize import channel_views
from ..reference.straight_through import VARIANTS, check_variant
from .straight_through import straight_through_backward as _variant_backward

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), cuda=True, triton=True)


def _mask_like(x: Tensor) -> Tensor:
    return x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


def _scalar(fn: Any) -> Any:
    """The reference of an overload whose scale and zero point are numbers."""

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
)
_forward_mask = _define(
    "fake_quantize_forward_mask",
    "(Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, bool lsq=False) "
    "-> (Tensor, Tensor)",
    reference.fake_quantize_forward_mask,
    lambda x, *_: (torch.empty_like(x), _mask_like(x)),
)
_backward = _define(
    "fake_quantize_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, bool lsq=False) "
    "-> Tensor",
    reference.fake_quantize_backward,
    lambda grad, x, *_: torch.empty_like(x),
)
_forward_scalar = _define(
    "fake_quantize_forward.scalar",
    "(Tensor x, float scale, SymInt zero_point, SymInt quant_min, SymInt quant_max) -> Tensor",
    _scalar(reference.fake_quantize_forward),
    lambda x, scale, zero_point, quant_min, quant_max: torch.empty_like(x),
)
_forward_mask_scalar = _define(
    "fake_quantize_forward_mask.scalar",
    "(Tensor x, float scale, SymInt zero_point, SymInt quant_min, SymInt quant_max) -> (Tensor, Tensor)",
    _scalar(reference.fake_quantize_forward_mask),
    lambda x, scale, zero_point, quant_min, quant_max: (torch.empty_like(x), _mask_like(x)),
)
_backward_scalar = _define(
    "fake_quantize_backward.scalar",
    "(Tensor grad, Tensor x, float scale, SymInt zero_point, SymInt quant_min, SymInt quant_max) -> Tensor",
    _scalar(reference.fake_quantize_backward),
    lambda grad, x, scale, zero_point, quant_min, quant_max: torch.empty_like(x),
)
_backward_mask = _define(
    "fake_quantize_backward_mask",
    "(Tensor grad, Tensor mask) -> Tensor",
    reference.fake_quantize_backward_mask,
    lambda grad, mask: torch.empty_like(grad),
)
_learnable_backward = _define(
    "fake_quantize_learnable_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max, float grad_factor, "
    "bool lsq=False) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_learnable_backward,
    lambda grad, x, scale, *_: (
        torch.empty_like(x),
        scale.new_empty(scale.shape),
        scale.new_empty(scale.shape),
    ),
)


def _fake_dynamic(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, zero_point = fake_dynamic_qparams(x, group_size)
    return torch.empty_like(x), scale, zero_point, x.new_empty(0, dtype=torch.uint8) if symmetric else _mask_like(x)


def fake_dynamic_qparams(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    shape = [1] * x.dim() if group_size == 0 else [*x.shape[:-1], 1 if group_size == -1 else x.shape[-1] // group_size]
    scale = x.new_empty(shape, dtype=reference.compute_dtype(x))
    return scale, torch.empty_like(scale, dtype=torch.int32)


_dynamic_forward = _define(
    "fake_quantize_dynamic_forward",
    "(Tensor x, SymInt group_size, SymInt quant_min, SymInt quant_max, bool symmetric) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.fake_quantize_dynamic_forward,
    _fake_dynamic,
)
_observe = _define(
    "observe_fake_quantize",
    "(Tensor x, Tensor observer_on, Tensor fake_quant_on, Tensor(a!) running_min, Tensor(b!) running_max, "
    "Tensor(c!) scale, Tensor(d!) zero_point, float averaging_const, SymInt quant_min, SymInt quant_max, "
    "float symmetric_steps, SymInt symmetric_zero_point) -> (Tensor, Tensor)",
    reference.observe_fake_quantize,
    lambda x, *_: (torch.empty_like(x), _mask_like(x)),
)

# Autograd nodes that keep their own output: keeping x for the backward pass costs nothing after these.
_KEEPS_OUTPUT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0", "ExpBackward0"}


def _is_kept(x: Tensor) -> bool:
    """Whether x lives until the backward pass anyway, so that recomputing from it needs no memory at all."""
    return x.is_leaf or (not torch.compiler.is_compiling() and type(x.grad_fn).__name__ in _KEEPS_OUTPUT)


def _as_output(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """grad in the memory layout that the mask's bits follow."""
    if grad.stride() == stride:
        return grad
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


_in_torch_func = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether torch.func's transforms or forward mode are at work, for which an op is in ``reference.transforms``."""
    return _in_torch_func() or forward_ad._current_level >= 0


def _entered(function: type[Function]) -> Any:
    """``function.apply`` without its look for setup_context, which takes 2 of the 8 µs of a small forward call.

    For calls that are not ``transformed``.
    """
    direct = super(Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if torch.compiler.is_compiling() else direct(*args)

    return apply


def _again(grad: Tensor) -> bool:
    """Whether the gradient is itself to be differentiated (create_graph), which the raw ops cannot be."""
    return grad.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _FakeQuantizeKept(Function):
    """x alone needs a gradient and lives until then anyway: the backward pass recomputes from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int, lsq: bool) -> Tensor:
        if isinstance(scale, Tensor):
            ctx.save_for_backward(x, scale, zero_point)
            ctx.rest = (quant_min, quant_max, lsq)
            return _forward(x, scale, zero_point, quant_min, quant_max)
        ctx.save_for_backward(x)
        ctx.rest = (scale, zero_point, quant_min, quant_max)
        return _forward_scalar(x, scale, zero_point, quant_min, quant_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors
        if _again(grad):
            inside = reference.inside_range if len(saved) > 1 else _scalar(reference.inside_range)
            dx = torch.where(inside(*saved, *ctx.rest), grad, 0)
            return dx, None, None, None, None, None
        dx = (_backward_scalar if len(saved) == 1 else _backward)(grad, *saved, *ctx.rest)
        return dx, None, None, None, None, None


def _through_mask(ctx: Any, grad: Tensor) -> Tensor:
    (mask,) = ctx.saved_tensors
    grad = _as_output(grad, ctx.stride)
    if _again(grad):
        return torch.where(reference.unpack_mask(mask, grad), grad, 0)
    return _backward_mask(grad, mask)


class _FakeQuantizeMask(Function):
    """x alone needs a gradient: one bit per element is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int, lsq: bool) -> Tensor:
        if isinstance(scale, Tensor):
            y, mask = _forward_mask(x, scale, zero_point, quant_min, quant_max, lsq)
        else:
            y, mask = _forward_mask_scalar(x, scale, zero_point, quant_min, quant_max)
        ctx.stride = y.stride()
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _through_mask(ctx, grad), None, None, None, None, None


def gradient_of(zero_point: Tensor, dzp: Tensor) -> Tensor:
    """dzp, which has the shape of scale, as the gradient of a zero point that may be shared or of another dtype."""
    if zero_point.shape != dzp.shape or zero_point.dtype != dzp.dtype:
        return (dzp.sum() if zero_point.numel() == 1 else dzp).reshape(zero_point.shape).to(zero_point.dtype)
    return dzp


class _FakeQuantizeLearnable(Function):
    """Scale or zero point is learned (LSQ, LSQ+): x is kept, everything else is recomputed in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, factor: float,
        lsq: bool,
    ) -> Tensor:  # fmt: skip
        ctx.range = (quant_min, quant_max, factor, lsq)
        ctx.save_for_backward(x, scale, zero_point)
        return _forward(x, scale, zero_point, quant_min, quant_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = _learned_gradients(ctx, grad, _learnable_backward, *ctx.saved_tensors, *ctx.range)
        return *gradients, None, None, None, None


class _NoSecondDerivative(Function):
    """Gradients that may be computed with a graph (create_graph), as torch's own may, but not differentiated."""

    @staticmethod
    def forward(ctx: Any, dx: Tensor, dscale: Tensor, dzp: Tensor, *sources: Tensor | None) -> tuple[Tensor, ...]:
        return dx.view_as(dx), dscale.view_as(dscale), dzp.view_as(dzp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            'fake_quantize: learned scales have no second derivative, nor has straight_through="pact" or "ewgs"; '
            "detach scale and zero_point"
        )


def _learned_gradients(
    ctx: Any, grad: Tensor, op: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx, dscale and dzp from an op that takes (grad, x, scale, zero_point, …), dzp as zero_point is."""
    if _again(grad):
        with torch.no_grad():
            gradients = op(grad, x, scale, zero_point, *rest)
        dx, dscale, dzp = _NoSecondDerivative.apply(*gradients, grad, x, scale, zero_point)
    else:
        dx, dscale, dzp = op(grad, x, scale, zero_point, *rest)
    if zero_point is None or not ctx.needs_input_grad[2]:
        return dx, dscale, None
    return dx, dscale, gradient_of(zero_point, dzp)


class _FakeQuantizeVariant(Function):
    """A straight-through variant that needs x, whatever is learned."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int,
        variant: str, delta: float, factor: float,
    ) -> Tensor:  # fmt: skip
        ctx.range = (quant_min, quant_max, variant, delta, factor)
        ctx.save_for_backward(x, scale, zero_point)
        return _forward(x, scale, zero_point, quant_min, quant_max)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (
            *_learned_gradients(ctx, grad, _variant_backward, *ctx.saved_tensors, *ctx.range),
            None,
            None,
            None,
            None,
            None,
        )


class _FakeQuantizeMasked(Function):
    """An op that returned its mask (dynamic, observed): the gradient passes where nothing was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        ctx.stride = y.stride()
        ctx.save_for_backward(mask)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _through_mask(ctx, grad), None, None


class _StraightThrough(Function):
    """y in the forward pass, x's gradient in the backward pass: nothing was clipped, nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


_kept = _entered(_FakeQuantizeKept)
_masked = _entered(_FakeQuantizeMask)
_learnable = _entered(_FakeQuantizeLearnable)
_variant = _entered(_FakeQuantizeVariant)
_already_masked = _entered(_FakeQuantizeMasked)
_straight_through = _entered(_StraightThrough)


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
        straight_through: what the backward pass makes of rounding and clipping, with v = x/scale. The conventions
            differ first of all in the half steps between an end of the range and the last value that rounds to it.
            "clip": torch's. dx = dy where round(v) + zero_point lies in the range, bounds included: the half steps are
            inside. dscale = grad_factor·Σ dy·(quant_min − zero_point below | quant_max − zero_point above |
            round(v) − v inside); dzero_point = −grad_factor·Σ dy·scale outside.
            "lsq": LSQ (arXiv 1902.08153, equations 3 and 5) and LSQ+ (arXiv 2004.09576): the same sums, but inside is
            quant_min < v + zero_point < quant_max before rounding, bounds excluded: the half steps are outside.
            "pass": dx = dy everywhere, clipped or not; scale and zero_point as in "clip".
            "pact": PACT (arXiv 1805.06085) for any range: dx = dy where quant_min <= v + zero_point < quant_max before
            rounding, and only what lies outside moves scale: dscale = grad_factor·Σ dy·(quant_min − zero_point |
            quant_max − zero_point). PACT's learned clip is alpha = scale·(quant_max − zero_point): compute scale =
            alpha / (quant_max − zero_point) from a parameter alpha; where zero_point is quant_min, autograd then gives
            it PACT's own Σ dy over x >= alpha.
            "ewgs": EWGS (arXiv 2104.00903), which clips before it rounds: dx = dy·(1 + ewgs_delta·sign(dy)·(v −
            round(v))) where quant_min <= v + zero_point <= quant_max before rounding, bounds included as in the clamp
            of the authors' code; scale and zero_point by the chain rule through that.
        ewgs_delta: EWGS's factor per step of rounding error, at least 0. The paper measures the error in a range of
            length 1: its delta divided by quant_max − quant_min is this one. The default is the fixed delta of the
            authors' code, for 1 bit, where the two agree.

    Returns:
        A tensor of x's shape, dtype and memory layout. Infinities saturate, NaN stays NaN.

    For the backward pass x is kept where it lives anyway, a scale is learned, or straight_through is "pact" or "ewgs";
    else one bit per element, and for "pass" nothing.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    lsq = straight_through == "lsq"
    if straight_through != "clip" and not lsq:
        return _by_variant(x, scale, zero_point, quant_min, quant_max, straight_through, ewgs_delta, grad_factor)
    if not isinstance(scale, Tensor):
        if isinstance(zero_point, Tensor):
            raise RuntimeError("zero_point: got a tensor beside a float scale; accepted: an int or None")
        if not lsq:
            return _by_numbers(x, scale, 0 if zero_point is None else zero_point, quant_min, quant_max)
    scale, zero_point = as_tensors(x, scale, zero_point, quant_min, quant_max)
    if transformed():
        return transforms.fake_quantize(x, scale, zero_point, quant_min, quant_max, grad_factor, straight_through)
    if torch.is_grad_enabled():
        if scale.requires_grad or (zero_point is not None and zero_point.requires_grad):
            return _learnable(x, scale, zero_point, quant_min, quant_max, grad_factor, lsq)
        if x.requires_grad:
            return (_kept if _is_kept(x) else _masked)(x, scale, zero_point, quant_min, quant_max, lsq)
    return _forward(x, scale, zero_point, quant_min, quant_max)


def as_tensors(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as the ops take them. No number is copied to a GPU, and a zero point of 0 is none."""
    if not isinstance(scale, Tensor):
        scale = torch.full((1,), scale, dtype=reference.compute_dtype(x), device=x.device)
    if zero_point is None or isinstance(zero_point, Tensor):
        return scale, zero_point
    if isinstance(zero_point, float):
        raise RuntimeError(f"zero_point: got {zero_point}; accepted: an int, a tensor or None")
    reference.check_zero_point(zero_point, zero_point, quant_min, quant_max)  # a GPU would not look at it
    if zero_point == 0:
        return scale, None
    return scale, torch.full((1,), zero_point, dtype=torch.int32, device=x.device)


def _by_numbers(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    if transformed():
        return _scalar(transforms.fake_quantize)(x, scale, zero_point, quant_min, quant_max)
    if torch.is_grad_enabled() and x.requires_grad:
        return (_kept if _is_kept(x) else _masked)(x, scale, zero_point, quant_min, quant_max, False)
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
    check_variant(variant, delta, ("clip", *VARIANTS))
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
            return _straight_through(x, _forward(x.detach(), scale, zero_point, quant_min, quant_max))
    return _forward(x, scale, zero_point, quant_min, quant_max)


def range_of_bits(bits: int) -> tuple[int, int]:
    """The signed integer range of ``bits`` bits, e.g. (−128, 127) for 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: got {bits}; accepted: 2 to 8")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def fake_quantize_dynamic(
    x: Tensor,
    *,
    bits: int = 8,
    group_size: int | None = -1,
    symmetric: bool = True,
    return_qparams: bool = False,
) -> Any:
    """Fake quantization whose scale comes from x itself, group by group, in one pass.

    Args:
        x: any shape; fp32, fp64, fp16 or bf16.
        bits: 2 to 8; the range is −2**(bits−1) … 2**(bits−1)−1.
        group_size: −1: each row of the last dim (per token); None: the whole tensor; G: groups of G elements of the
            last dim, which G must divide.
        symmetric: scale = amax / (2**(bits−1)−1), so the largest value is never clipped; else scale = (max − min) /
            (2**bits−1) over a range that includes 0, with an integer zero point.
        return_qparams: also return scale (fp32; fp64 for fp64 x; shape ``[..., K/G]``) and zero_point (int32).

    Returns:
        y, or (y, scale, zero_point). The range is a constant for the gradient: dx is dy where nothing was clipped,
        which with symmetric=True is everywhere.
    """
    args = (group_size_argument(group_size), *range_of_bits(bits), symmetric)
    if transformed():
        result = transforms.fake_quantize_dynamic(x, *args)
        return result if return_qparams else result[0]
    # Raw ops have no gradient formula, so they never see a tensor that wants one.
    y, scale, zero_point, mask = _dynamic_forward(x.detach(), *args)
    if torch.is_grad_enabled() and x.requires_grad:
        y = _straight_through(x, y) if symmetric else _already_masked(x, y, mask)
    return (y, scale, zero_point) if return_qparams else y


def group_size_argument(group_size: int | None) -> int:
    """The raw ops' number for a group size: 0 for the whole tensor."""
    if group_size == 0:
        raise RuntimeError("group_size: got 0; accepted: -1 (a row), None (the whole tensor), or a positive divisor")
    return 0 if group_size is None else group_size


def observe_fake_quantize(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> Tensor:
    """Updates moving-average statistics from x, then fake-quantizes x with them; no host synchronisation.

    The four statistics are changed in place and have one shape, which is the granularity (see ``fake_quantize``);
    running_min, running_max and scale are fp32, zero_point is int32 or int64; infinite running values mean "none yet".
    observer_on and fake_quant_on are one-element tensors read on the device. A batch that is empty or whose range is
    not finite leaves the statistics as they are. Symmetric scales never clip the observed extremes.
    """
    steps = float((quant_max - quant_min) // 2) if symmetric else 0.0
    return _observed(
        x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point,
        averaging_const, quant_min, quant_max, steps, (quant_min + quant_max + 1) // 2,
    )  # fmt: skip


def _observed(x: Tensor, *args: Any) -> Tensor:
    if transformed():
        return _observed_in_transforms(x, *args)
    y, mask = _observe(x.detach(), *args)
    if torch.is_grad_enabled() and x.requires_grad:
        return _already_masked(x, y, mask)
    return y


def _observed_in_transforms(x: Tensor, *args: Any) -> Tensor:
    """Statistics are updated from the values themselves, whatever is differentiated; one batch at a time."""
    _, fake_quant_on, _, _, scale, zero_point, _, quant_min, quant_max, *_ = args
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        _observe(*(_plain(t).detach() for t in (x, *args[:6])), *args[6:])
    return transforms.observe_fake_quantize(x, fake_quant_on, scale, zero_point, quant_min, quant_max)


def _plain(t: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            raise RuntimeError(
                "x: got a batch of vmap where moving averages are updated in place; accepted: other transforms, or "
                "vmap with the observer off the path (eval mode, or another quantizer)"
            )
        t = torch._C._functorch.get_unwrapped(t)
    return t


# The drop-ins: torch's signatures.


def fake_quantize_per_tensor_affine(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """As ``torch.fake_quantize_per_tensor_affine`` (both overloads); NaN stays NaN instead of becoming quant_min."""
    if not isinstance(scale, Tensor) and not isinstance(zero_point, Tensor):
        return _by_numbers(input, scale, zero_point, quant_min, quant_max)
    return fake_quantize(input, _constant(scale), _constant(zero_point), quant_min=quant_min, quant_max=quant_max)


def _constant(param: Any) -> Any:
    return param.detach() if isinstance(param, Tensor) and param.requires_grad else param


def fake_quantize_learnable_per_tensor_affine(
    input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, grad_factor: float = 1.0
) -> Tensor:
    """As ``torch._fake_quantize_learnable_per_tensor_affine``, with the right gradient for negative zero points."""
    return fake_quantize(
        input, scale, rounded(zero_point), quant_min=quant_min, quant_max=quant_max, grad_factor=grad_factor
    )


def rounded(zero_point: Tensor) -> Tensor:
    # The learnable ops of torch round and clamp a zero point of any dtype; here an integer one must be in the range.
    return zero_point if zero_point.is_floating_point() else zero_point.float()


def fake_quantize_learnable_per_channel_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
) -> Tensor:
    """As ``torch._fake_quantize_learnable_per_channel_affine``, in every floating dtype."""
    scale, zero_point = channel_views(input, axis, scale, rounded(zero_point))
    return fake_quantize(input, scale, zero_point, quant_min=quant_min, quant_max=quant_max, grad_factor=grad_factor)


def fused_moving_avg_obs_fake_quant(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int = -1,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
) -> Tensor:
    """As ``torch.fused_moving_avg_obs_fake_quant``, in every floating dtype.

    It trains with the scale and zero point that torch.ao's observer computes at convert time from the same
    statistics, where torch's own op trains with others: up to 2× in scale on ReLU data, and up to 0.4 % for symmetric
    weights in −128 … 127, of which 99.5 % then differ (the observer takes max(−min, max) / 127.5, torch's op the larger
    of −min / 128 and max / 127). A signed symmetric range has the zero point 0, an unsigned one its lower middle, all
    of uint16 2**15; scales are floored at fp32's epsilon, as an observer's other eps is not told to its op. The range
    is within ±2**24 and statistics stay fp32. As in torch, statistics of no or one element are resized to the number
    of channels when per_row_fake_quant is set.
    """
    return _observed(
        *observed_arguments(
            x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point, averaging_const, quant_min,
            quant_max, ch_axis, per_row_fake_quant, symmetric_quant,
        )
    )  # fmt: skip


def observed_arguments(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    axis: int,
    per_row: bool,
    symmetric: bool,
) -> tuple[Any, ...]:
    """The raw op's arguments for those of torch's; statistics of rows are resized where that must be."""
    stats: tuple[Tensor, ...] = (running_min, running_max, scale, zero_point)
    if per_row:
        channels = x.shape[axis]
        for stat, start in zip(stats, (torch.inf, -torch.inf, 1, 0), strict=True):
            if stat.numel() <= 1 and stat.numel() != channels:
                stat.resize_(channels).fill_(start)
        stats = tuple(channel_views(x, axis, *stats))
    steps = (quant_max - quant_min) / 2 if symmetric else 0.0
    middle = observers_middle(quant_min, quant_max)
    return x, observer_on, fake_quant_on, *stats, averaging_const, quant_min, quant_max, steps, middle


def observers_middle(quant_min: int, quant_max: int) -> int:
    """The zero point that torch.ao's observers give every symmetric range: 0 to signed dtypes."""
    if quant_min < 0:
        return min(0, quant_max)
    if (quant_min, quant_max) == (0, 2**16 - 1):
        return 2**15  # uint16
    return (quant_min + quant_max) // 2
