"""The ways back through a fake quantization: old-style autograd.Functions made of an op's forward and backward.

Raw ops are not differentiable. The public functions enter a Function only if a gradient is wanted, which costs a third
of ``register_autograd`` per call. There are three ways, by what they keep for the backward pass: x, which lives until
then anyway (``kept``); one bit per element (``masked``); x, because a scale is learned (``learnable``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..layouts import unpack_mask

# Autograd nodes that keep their own output, so that keeping x behind them costs nothing.
_KEEPS_OUTPUT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0", "ExpBackward0"}

_in_torch_func = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether torch.func's transforms or forward mode are active, for which ``reference.transforms`` has the ops."""
    return _in_torch_func() or forward_ad._current_level >= 0


def recomputing() -> bool:
    """Whether a backward pass is under way, so that a forward pass now is the second one of a checkpointed part.

    Compiled code does not ask: what it recomputes it has split off when it was traced.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_kept(x: Tensor) -> bool:
    """Whether x lives until the backward pass anyway, so that keeping it takes no memory."""
    return x.is_leaf or (not torch.compiler.is_compiling() and type(x.grad_fn).__name__ in _KEEPS_OUTPUT)


def entered(function: type[Function]) -> Any:
    """``function.apply`` without its search for setup_context, which takes 2 of the 8 µs of a small forward call.

    It is only for calls that are not ``transformed``.
    """
    direct = super(Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if torch.compiler.is_compiling() else direct(*args)

    return apply


def again(grad: Tensor) -> bool:
    """Whether autograd will differentiate this gradient (create_graph), which raw ops do not allow."""
    return grad.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def kept(forward_op: Any, backward_op: Any, inside: Callable[..., Tensor], *, tensors: int = 3) -> Any:
    """The way if x alone needs a gradient and lives until the backward pass, which recomputes all else from x.

    Args:
        forward_op: (x, …) -> y.
        backward_op: (grad, x, …) -> dx, whose arguments after grad begin with forward_op's. The Function takes all of
            these.
        inside: takes backward_op's arguments without grad and returns where the gradient passes; create_graph uses it.
        tensors: how many of the Function's arguments, the first ones, are tensors.
    """
    last = len(forward_op._schema.arguments) - 3
    nones = (None,) * (len(backward_op._schema.arguments) - 2)

    class Kept(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: Any, second: Any, *rest: Any) -> Any:
            if tensors == 1:
                ctx.save_for_backward(x)
                ctx.rest = (scale, second, *rest)
            else:
                ctx.save_for_backward(x, scale, second)
                ctx.rest = rest
            return forward_op(x, scale, second, *rest[:last])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            if again(grad):
                return torch.where(inside(*ctx.saved_tensors, *ctx.rest), grad, 0), *nones
            return backward_op(grad, *ctx.saved_tensors, *ctx.rest), *nones

    return entered(Kept)


def masked(forward_op: Any) -> Any:
    """The way if x alone needs a gradient: it keeps the mask of forward_op's (y, mask), one bit per element."""
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
    if grad.stride() != ctx.stride:  # the mask's bits follow y's memory order
        grad = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype, device=grad.device).copy_(grad)
    if again(grad):
        return torch.where(unpack_mask(mask, grad), grad, 0)
    return torch.ops.qkernels.fake_quantize_backward_mask.default(grad, mask)  # type: ignore[no-any-return]


class _AlreadyMasked(Function):
    """For an op that has returned y and its mask (dynamic, observed): the gradient passes where x was not clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        ctx.stride = y.stride()
        ctx.save_for_backward(mask)
        return y.detach()  # a new tensor that is no view to autograd, so it may be written in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return through_mask(ctx, grad), None, None


class _StraightThrough(Function):
    """Returns y; its whole gradient goes to x, because nothing was clipped. It keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.detach()

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
    """The way if scale or a second parameter (zero point, codebook) is learned: it keeps x and recomputes all else.

    Args:
        forward: (x, scale, second, …) -> y, on the Function's first ``taken`` arguments.
        backward: (grad, x, scale, second, …) -> dx, dscale and dsecond, on grad and all arguments of the Function.
        no_second: the text of the error if these gradients are differentiated.
        tensors: how many of the Function's arguments, the first ones, are tensors.
        taken: how many of the Function's arguments forward takes.

    Returns:
        A function of the Function's arguments and of ``source``, for a scale that was computed from a parameter: that
        parameter and a factor. The parameter then gets the gradient of scale times the factor, and the backward pass
        keeps a copy of second, which the quantizer may move in place before it.
    """
    run_forward, run_backward, more, last = forward, backward, tensors - 3, taken - 3

    class Learnable(Function):
        @staticmethod
        def forward(
            ctx: Any, log_scale: Any, slope: Any, x: Tensor, scale: Tensor, second: Tensor | None, *rest: Any
        ) -> Any:
            ctx.dtype = None
            if log_scale is not None:
                ctx.dtype = log_scale.dtype
                if second is not None:
                    second = second.detach().clone()
            if more:
                ctx.save_for_backward(slope, x, scale, second, *rest[:more])
                ctx.rest = rest[more:]
            else:
                ctx.save_for_backward(slope, x, scale, second)
                ctx.rest = rest
            return run_forward(x, scale, second, *rest[:last])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (slope, *saved), rest = ctx.saved_tensors, ctx.rest
            if again(grad):
                with torch.no_grad():
                    gradients = run_backward(grad, *saved, *rest)
                dx, dscale, dsecond = without_second_derivative(no_second, gradients, (grad, *saved))
            else:
                dx, dscale, dsecond = run_backward(grad, *saved, *rest)
            dlog_scale = None
            if ctx.dtype is not None:
                dlog_scale, dscale = (dscale * slope).to(ctx.dtype), None
            learns = saved[2] is not None and ctx.needs_input_grad[4]
            nones = (None,) * (len(saved) + len(rest) - 3)
            return dlog_scale, None, dx, dscale, gradient_of(saved[2], dsecond) if learns else None, *nones

    apply = entered(Learnable)

    def learn(*args: Any, source: tuple[Tensor | None, Tensor | None] = (None, None)) -> Any:
        return apply(*source, *args)

    return learn


def gradient_of(param: Tensor, total: Tensor) -> Tensor:
    """Brings total, in scale's shape, to the shape and dtype of a zero point, which may be one for all of scale."""
    if param.shape != total.shape or param.dtype != total.dtype:
        return (total.sum() if param.numel() == 1 else total).reshape(param.shape).to(param.dtype)
    return total


def without_second_derivative(message: str, gradients: Sequence[Tensor], sources: Sequence[Any]) -> Any:
    """The gradients, which create_graph may ask for, as of torch's own ops, but which raise when differentiated.

    ``message``: the text of that error. ``sources``: the tensors that the gradients were computed from.
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
