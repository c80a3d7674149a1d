"""Fake quantization of many tensors in one call: ``foreach_fake_quantize`` over ``qkernels::foreach_fake_quantize_*``.

A list takes one pass through Python, autograd and the dispatcher; a loop over a model's weights takes one for each. A
GPU kernel turns the ops' lists into a table of pointers, which it gets by value, some 60 tensors to a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import checks, library, samples
from ..reference import fake_quantize as single
from ..reference import foreach_fake_quantize as reference
from ..reference import transforms
from .autograd import again, entered, gradient_of, transformed, without_second_derivative

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), cuda=True)


def _foreach_samples(*wrapped: Callable[[Tensor], Iterator[tuple[Any, ...]]]) -> Callable[[Tensor], Any]:
    """The cases of an op on one tensor as one call of its op on many, each on x and on a transposed copy of x."""

    def args(x: Tensor) -> Iterator[tuple[Any, ...]]:
        calls = [case for make in wrapped for y in (x, x.t().contiguous() if x.dim() == 2 else x) for case in make(y)]
        if calls:
            yield tuple(list(values) for values in zip(*calls, strict=True))

    return args


_forward = _define(
    "foreach_fake_quantize_forward",
    "(Tensor[] xs, Tensor[] scales, Tensor?[] zero_points, SymInt[] quant_mins, SymInt[] quant_maxs) -> Tensor[]",
    reference.foreach_fake_quantize_forward,
    lambda xs, *_: [torch.empty_like(x) for x in xs],
    samples=_foreach_samples(samples.quantizer),
)
_backward = _define(
    "foreach_fake_quantize_backward",
    "(Tensor[] grads, Tensor[] xs, Tensor[] scales, Tensor?[] zero_points, SymInt[] quant_mins, SymInt[] quant_maxs, "
    "bool lsq=False) -> Tensor[]",
    reference.foreach_fake_quantize_backward,
    lambda grads, xs, *_: [torch.empty_like(x) for x in xs],
    samples=samples.with_lsq(_foreach_samples(samples.backward(samples.quantizer))),
)
_learnable_backward = _define(
    "foreach_fake_quantize_learnable_backward",
    "(Tensor[] grads, Tensor[] xs, Tensor[] scales, Tensor?[] zero_points, SymInt[] quant_mins, SymInt[] quant_maxs, "
    "float[] grad_factors, bool lsq=False) -> (Tensor[], Tensor[], Tensor[])",
    reference.foreach_fake_quantize_learnable_backward,
    lambda grads, xs, scales, *_: (
        [torch.empty_like(x) for x in xs],
        [scale.new_empty(scale.shape) for scale in scales],
        [scale.new_empty(scale.shape) for scale in scales],
    ),
    samples=samples.with_lsq(_foreach_samples(samples.learnable)),
    sums=(1, 2),
)


NO_SECOND = "foreach_fake_quantize: learned scales have no second derivative; detach scales and zero_points"


class _ForeachFakeQuantize(Function):
    """Keeps every x: a model's weights live until the backward pass anyway."""

    @staticmethod
    def forward(
        ctx: Any, quant_mins: list[int], quant_maxs: list[int], factors: list[float], lsq: bool, *tensors: Any
    ) -> Any:
        count = len(quant_mins)
        ctx.rest = (quant_mins, quant_maxs, factors, lsq)
        ctx.save_for_backward(*tensors)
        ys = _forward(tensors[:count], tensors[count : 2 * count], tensors[2 * count :], quant_mins, quant_maxs)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        count, saved = len(grads), ctx.saved_tensors
        xs, scales, zero_points = saved[:count], saved[count : 2 * count], saved[2 * count :]
        quant_mins, quant_maxs, factors, lsq = ctx.rest
        wanted = ctx.needs_input_grad[4:]
        differentiated = any(again(grad) for grad in grads)
        args = (grads, xs, scales, zero_points, quant_mins, quant_maxs)
        if not any(wanted[count:]):
            if differentiated:
                calls = zip(xs, scales, zero_points, quant_mins, quant_maxs, strict=True)
                inside = [single.inside_range(*call, lsq) for call in calls]
                dx = [torch.where(mask, grad, 0) for mask, grad in zip(inside, grads, strict=True)]
            else:
                dx = _backward(*args, lsq)
            return None, None, None, None, *dx, *[None] * (2 * count)
        if differentiated:
            with torch.no_grad():
                gradients = [t for part in _learnable_backward(*args, factors, lsq) for t in part]
            gradients = without_second_derivative(NO_SECOND, gradients, (*grads, *saved))
            dx, dscale, dzp = (gradients[part * count :][:count] for part in range(3))
        else:
            dx, dscale, dzp = _learnable_backward(*args, factors, lsq)
        dzp = [
            gradient_of(zero_point, total) if wanted[2 * count + at] else None
            for at, (zero_point, total) in enumerate(zip(zero_points, dzp, strict=True))
        ]
        return None, None, None, None, *dx, *dscale, *dzp


_differentiable = entered(_ForeachFakeQuantize)


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each tensor: a number is repeated, a sequence is taken as given."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise RuntimeError(f"{name}: got {len(value)} values; accepted: one for each of the {count} tensors")
    return list(value)


def foreach_fake_quantize(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None] | None = None,
    *,
    quant_min: int | Sequence[int],
    quant_max: int | Sequence[int],
    grad_factor: float | Sequence[float] = 1.0,
    straight_through: str = "clip",
) -> list[Tensor]:
    """``fake_quantize`` of every tensor of a list in one call, forward and backward: for the weights of a model.

    Args:
        xs: tensors on one device, of any shapes and any mixture of fp32, fp64, fp16 and bf16.
        scales: one for each of xs, as in ``fake_quantize``: the shape of each is its granularity.
        zero_points: None, or one for each of xs: a tensor as in ``fake_quantize``, or None for 0.
        quant_min, quant_max: inclusive integer range: one for all, or one for each (layers of different bits).
        grad_factor: multiplies the gradients of scales and zero points: one for all, or one for each.
        straight_through: "clip" or "lsq", as in ``fake_quantize``, for all.

    Returns:
        A list with the result of ``fake_quantize`` for each, bit for bit, gradients included.

    The backward pass keeps every x, which costs nothing for a parameter or an activation that lives until then anyway;
    of other activations ``fake_quantize`` itself would keep one bit per element. If any scale or zero point requires
    grad, the op computes the gradients of all.

    Raises:
        RuntimeError: lists have different lengths, tensors are on different devices, or ``fake_quantize`` refuses one.
    """
    checks.clip_or_lsq(straight_through)
    count = len(xs)
    xs = list(xs)
    scales = _one_each("scales", list(scales), count)
    zero_points = _one_each("zero_points", zero_points, count)
    quant_mins = _one_each("quant_min", quant_min, count)
    quant_maxs = _one_each("quant_max", quant_max, count)
    factors = _one_each("grad_factor", grad_factor, count)
    if not count:
        return []
    if transformed():
        checks.foreach(xs)
        conventions = [straight_through] * count
        args = zip(xs, scales, zero_points, quant_mins, quant_maxs, factors, conventions, strict=True)
        return [transforms.fake_quantize(*each) for each in args]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*xs, *scales, *zero_points)):
        lsq = straight_through == "lsq"
        return list(_differentiable(quant_mins, quant_maxs, factors, lsq, *xs, *scales, *zero_points))
    return _forward(xs, scales, zero_points, quant_mins, quant_maxs)
