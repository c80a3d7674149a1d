"""The gradient of a converted layer's weight scales, one factor for each output channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _WithGain(Function):
    """y = exp(log_gain)·z + bias, whose value is known: dlog_gain = Σ dy·(y − bias) over all dims but the channels'."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, log_gain: Tensor, bias: Tensor | None, trailing: int) -> Tensor:
        ctx.save_for_backward(y, bias)
        ctx.trailing = trailing
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, bias = ctx.saved_tensors
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        moved = y.to(wide)
        if bias is not None:
            moved = moved - bias.to(wide).view(-1, *[1] * ctx.trailing)
        products = (grad.to(wide) * moved).movedim(-1 - ctx.trailing, 0)
        return grad, products.flatten(1).sum(1).float() if y.dim() > 1 else products.float(), None, None


def with_gain(y: Tensor, layer: nn.Module) -> Tensor:
    """y, what the layer computes, which passes its gradient on to the parameter ``log_gain`` [N], if there is one.

    That is the logarithm of a factor on each output channel's weights. Its value does not count here: who moves it puts
    the factor into the weights' scales. The gradient of all else is not changed.
    """
    log_gain = layer._parameters.get("log_gain")
    if log_gain is None or not (torch.is_grad_enabled() and log_gain.requires_grad):
        return y
    bias, trailing = layer._parameters.get("bias"), len(getattr(layer, "kernel_size", ()))
    return _WithGain.apply(y, log_gain, None if bias is None else bias.detach(), trailing)  # type: ignore[no-any-return, no-untyped-call]
