"""The ways back through a fake quantization, as old-style autograd.Functions made of an op's forward and backward.

Raw ops are not differentiable. A Function is entered only where a gradient is wanted: per call that costs a third of
``register_autograd``. There are three, by what is kept until the backward pass: x, which lives until then anyway
(``kept``); one bit per element (``masked``); x, because a scale is learned (``learnable``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..layouts import unpack_mask

# Autograd nodes that keep their own output: keeping x for the backward pass costs nothing after these.
_KEEPS_OUTPUT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0", "ExpBackward0"}

_in_torch_func = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether torch.func's transforms or forward mode are at work, for which an op is in ``reference.transforms``."""
    return _in_torch_func() or forward_ad._current_level >= 0


def is_kept(x: Tensor) -> bool:
    """Whether x lives until the backward pass anyway, so that recomputing from it needs no memory at all."""
    return x.is_leaf or (not torch.compiler.is_compiling() and type(x.grad_fn).__name__ in _KEEPS_OUTPUT)


def entered(function: type[Function]) -> Any:
    """``function.apply`` without its look for setup_context, which takes 2 of the 8 µs of a small forward call.

    For calls that are not ``transformed``.
    """
    direct = super(Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if torch.compiler.is_compiling() else direct(*args)

    return apply


def again(grad: Tensor) -> bool:
    """Whether the gradient is itself to be differentiated (create_graph), which the raw ops cannot be."""
    return grad.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def kept(forward_op: Any, backward_op: Any, inside: Callable[..., Tensor], *, tensors: int = 3) -> Any:
    """x alone needs a gradient and lives until then anyway: the backward pass recomputes from it.

    Args:
        forward_op: (x, …) -> y, whose first ``tensors`` arguments are tensors.
        backward_op: (grad, x, …) -> dx, with forward_op's arguments first. The Function takes all of them but grad.
        inside: as backward_op without grad: where the gradient passes. It serves gradients that are differentiated.
    """
    taken = len(forward_op._schema.arguments)
    nones = (None,) * (len(backward_op._schema.arguments) - 2)

    class Kept(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*args[:tensors])
            ctx.rest = args[tensors:]
            return forward_op(*args[:taken])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            if again(grad):
                return torch.where(inside(*ctx.saved_tensors, *ctx.rest), grad, 0), *nones
            return backward_op(grad, *ctx.saved_tensors, *ctx.rest), *nones

    return entered(Kept)


def masked(forward_op: Any) -> Any:
    """x alone needs a gradient: of forward_op's result, (y, mask), one bit per element is kept."""
    nones = (None,) * (len(forward_op._schema.arguments) - 1)

    class Masked(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            y, mask = forward_op(*args)
            ctx.stride = y.stride()
            ctx.save_for_backward(mask)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return through_mask(ctx, grad), *nones

    return entered(Masked)


def through_mask(ctx: Any, grad: Tensor) -> Tensor:
    (mask,) = ctx.saved_tensors
    if grad.stride() != ctx.stride:  # the mask's bits are in the order of y's memory
        grad = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype, device=grad.device).copy_(grad)
    if again(grad):
        return torch.where(unpack_mask(mask, grad), grad, 0)
    return torch.ops.qkernels.fake_quantize_backward_mask.default(grad, mask)  # type: ignore[no-any-return]


class _AlreadyMasked(Function):
    """An op that returned its mask (dynamic, observed): the gradient passes where nothing was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        ctx.stride = y.stride()
        ctx.save_for_backward(mask)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return through_mask(ctx, grad), None, None


class _StraightThrough(Function):
    """y in the forward pass, x's gradient in the backward pass: nothing was clipped, nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


already_masked = entered(_AlreadyMasked)
straight_through = entered(_StraightThrough)


def learnable(
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    *,
    no_second: str,
    tensors: int = 3,
    taken: int = 5,
) -> Any:
    """Scale or a second parameter (zero point, codebook) is learned: x is kept, all else is recomputed in one pass.

    Args:
        forward: (x, scale, second, …) -> y, of the Function's first ``taken`` arguments.
        backward: (grad, x, scale, second, …) -> dx, dscale and dsecond, of all arguments of the Function; the first
            ``tensors`` of these are tensors.
        no_second: what the error says where these gradients are differentiated.
    """
    run_forward, run_backward = forward, backward

    class Learnable(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*args[:tensors])
            ctx.rest = args[tensors:]
            return run_forward(*args[:taken])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            saved, rest = ctx.saved_tensors, ctx.rest
            if again(grad):
                with torch.no_grad():
                    gradients = run_backward(grad, *saved, *rest)
                dx, dscale, dsecond = without_second_derivative(no_second, gradients, (grad, *saved))
            else:
                dx, dscale, dsecond = run_backward(grad, *saved, *rest)
            learns = saved[2] is not None and ctx.needs_input_grad[2]
            nones = (None,) * (len(saved) + len(rest) - 3)
            return dx, dscale, gradient_of(saved[2], dsecond) if learns else None, *nones

    return entered(Learnable)


def gradient_of(param: Tensor, total: Tensor) -> Tensor:
    """total, which has the shape of scale, as the gradient of a zero point that may be shared or of another dtype."""
    if param.shape != total.shape or param.dtype != total.dtype:
        return (total.sum() if param.numel() == 1 else total).reshape(param.shape).to(param.dtype)
    return total


def without_second_derivative(message: str, gradients: Sequence[Tensor], sources: Sequence[Any]) -> Any:
    """Gradients that may be computed with a graph (create_graph), as torch's own may, but not differentiated.

    ``message`` says so where they are; ``sources`` are the tensors that they were computed from.
    """
    return _NoSecondDerivative.apply(message, len(gradients), *gradients, *sources)


class _NoSecondDerivative(Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Any) -> Any:
        ctx.message = message
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)
