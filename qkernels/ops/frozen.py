"""Gradients through layers on frozen integer weights: what the linear layers and the convolution share.

The gradient of a layer is that of the float layer with its dequantized weight, behind the fake quantization of its
input. The backward pass dequantizes the weight a block at a time; between the passes only the codes are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import gemm_checks, layouts
from ..reference.activation import FUNCTIONS
from .fake_quantize import fake_quantize
from .quantize import dequantize

BLOCK = 1 << 22  # how many weights are dequantized at a time


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_torch_jit_takes_them(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Detaches the tensors while torch.jit traces: its graphs hold kernels, but no autograd.Function."""
    return tuple(map(constant, tensors)) if torch.jit.is_tracing() else tensors


def constant(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def represented(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:  # fmt: skip
    """The values through which the gradient passes: those of x's codes; with a dynamic scale, which clips none, x."""
    if scale is None:
        return x
    if x.dtype != torch.int8:
        if not torch.compiler.is_compiling():  # the check reads values, which tracing cannot; the kernel checks again
            gemm_checks.static("input", scale, zero_point, quant_min, quant_max)
        return fake_quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max)
    rows = x.reshape(-1, x.shape[-1])
    scale, zero_point = (None if t is None else t.reshape(-1, 1) for t in (scale, zero_point))
    assert scale is not None
    return dequantize(rows, scale, zero_point).view(x.shape)


def through_weight(grad: Tensor, n: int, k: int, rows: Callable[[int, int, torch.dtype], Tensor]) -> Tensor:
    """grad [..., N] @ weight [N, K]; ``rows(i, j, dtype)`` gives the weight's rows i…j."""
    # A CPU without matrix units multiplies 16-bit matrices many times slower than fp32 ones.
    flat = grad.reshape(-1, n) if grad.is_cuda else grad.reshape(-1, n).float()
    step = max(layouts.PANEL, BLOCK // max(k, 1) // layouts.PANEL * layouts.PANEL)
    if n <= step:
        dx = flat @ rows(0, n, flat.dtype)
    else:
        dx = torch.zeros(flat.shape[0], k, device=grad.device)
        for start in range(0, n, step):
            stop = min(start + step, n)
            part = flat[:, start:stop] @ rows(start, stop, flat.dtype)
            dx = dx + part if torch.is_grad_enabled() else dx.add_(part)
    return dx.view(*grad.shape[:-1], k)


def bias_gradient(grad: Tensor, dims: tuple[int, ...], bias: torch.dtype) -> Tensor:
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    # grad.sum(()) would sum over all dims.
    return (grad.sum(dims, dtype=wide) if dims else grad).to(bias)


class _Activation(Function):
    """The kernels' activation, bit for bit, with torch's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, activation: str) -> Tensor:
        return FUNCTIONS[activation](z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.activation = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _slope(ctx.activation, grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _slope(ctx.activation, tangent, *ctx.saved_tensors)


def _slope(activation: str, grad: Tensor, z: Tensor) -> Tensor:
    if activation == "relu":
        return torch.where(z > 0, grad, 0)
    return (torch.ops.aten.gelu_backward if activation == "gelu" else torch.ops.aten.silu_backward)(grad, z)


def activated(z: Tensor, activation: str | None, out_dtype: torch.dtype) -> Tensor:
    """The last steps of a kernel's epilogue: the activation of z (fp32) and the rounding to out_dtype."""
    return (z if activation is None else _Activation.apply(z, activation)).to(out_dtype)
