"""SwiGLU's product fused with dynamic quantization: ``silu_mul_[fake_]quantize_dynamic``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import library, samples
from ..reference import silu_mul_quantize as reference
from ..reference import transforms
from ..reference.fake_quantize import compute_dtype, inside_range
from .autograd import entered, transformed
from .dynamic import fake_dynamic_qparams, group_size_argument, range_of_bits

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), triton=True)

_PRODUCT = "Tensor gate, Tensor up, SymInt group_size, SymInt quant_min, SymInt quant_max, bool symmetric"


def _silu_mul_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for _, *rest in samples.dynamic(x):
        yield x, torch.randn(x.shape).to(x.dtype), *rest


def _silu_mul_backward_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in _silu_mul_samples(x):
        gate, up, _, low, high, symmetric = case
        _, *clipped = reference.silu_mul_fake_quantize_dynamic_forward(*case)
        yield torch.randn(x.shape).to(x.dtype), gate, up, *((None, None) if symmetric else clipped), low, high


_forward = _define(
    "silu_mul_fake_quantize_dynamic_forward",
    f"({_PRODUCT}) -> (Tensor, Tensor, Tensor)",
    reference.silu_mul_fake_quantize_dynamic_forward,
    lambda gate, up, group_size, *_: (gate.new_empty(gate.shape), *fake_dynamic_qparams(gate, group_size)),
    samples=_silu_mul_samples,
)
_quantize = _define(
    "silu_mul_quantize_dynamic",
    f"({_PRODUCT}) -> (Tensor, Tensor, Tensor)",
    reference.silu_mul_quantize_dynamic,
    lambda gate, up, group_size, *_: (
        gate.new_empty(gate.shape, dtype=torch.int8),
        *fake_dynamic_qparams(gate, group_size),
    ),
    samples=_silu_mul_samples,
)
_backward = _define(
    "silu_mul_fake_quantize_dynamic_backward",
    "(Tensor grad, Tensor gate, Tensor up, Tensor? scale, Tensor? zero_point, SymInt quant_min, SymInt quant_max) "
    "-> (Tensor, Tensor)",
    reference.silu_mul_fake_quantize_dynamic_backward,
    lambda grad, gate, up, *_: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    samples=_silu_mul_backward_samples,
)


class _SiluMulFakeQuantize(Function):
    """Keeps gate and up, and if values can be clipped (symmetric=False), 8 bytes for each scale."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, group_size: int, low: int, high: int, symmetric: bool) -> Tensor:
        y, scale, zero_point = _forward(gate, up, group_size, low, high, symmetric)
        ctx.range = (low, high)
        ctx.save_for_backward(gate, up, *((None, None) if symmetric else (scale, zero_point)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dgate, dup = (_differentiable if again else _backward)(grad, *ctx.saved_tensors, *ctx.range)
        return dgate, dup, None, None, None, None


def _differentiable(
    grad: Tensor, gate: Tensor, up: Tensor, scale: Tensor | None, zero_point: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """The backward op written in torch's ops, so that autograd can differentiate it again (create_graph)."""
    g = gate.to(compute_dtype(gate))
    dy, u = grad.to(g.dtype), up.to(g.dtype)
    if scale is not None:
        value = reference.product(gate.detach(), up.detach())
        dy = torch.where(inside_range(value, scale, zero_point, low, high), dy, 0)
    dgate, dup = reference.gradients(dy, g, u, g.sigmoid())
    return dgate.to(gate.dtype), dup.to(up.dtype)


_fused = entered(_SiluMulFakeQuantize)


def silu_mul_fake_quantize_dynamic(
    gate: Tensor, up: Tensor, *, bits: int = 8, group_size: int | None = -1, symmetric: bool = True
) -> Tensor:
    """``fake_quantize_dynamic(silu(gate) * up)``, the input of a SwiGLU block's last matmul, in one pass.

    Args:
        gate, up: one shape and dtype; fp32, fp64, fp16 or bf16 (SwiGLU: arXiv 2002.05202).
        bits, group_size, symmetric: as in ``fake_quantize_dynamic``. One range for the whole tensor (None) takes two
            passes; on a GPU it runs in plain torch.

    Returns:
        A contiguous tensor of gate's shape and dtype. The product goes to the quantizer in fp32 (fp64 for fp64) and is
        rounded once to gate's dtype, after the quantizer. silu is gate·sigmoid(gate), right to 2**-21, with the same
        bits in every kernel; as in torch it is NaN at −inf.

    Gradients pass the quantizer straight through, as in ``fake_quantize_dynamic``, and the product exactly. The
    backward pass keeps gate, up, and with symmetric=False 8 bytes for each scale.

    Raises:
        RuntimeError: an argument's dtype, device or shape does not fit; the message names it.
        ValueError: bits is not 2 to 8.
    """
    args = (gate, up, group_size_argument(group_size), *range_of_bits(bits), symmetric)
    if transformed():
        return transforms.silu_mul_fake_quantize_dynamic(*args)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _fused(*args)
    return _forward(*args)[0]


def silu_mul_quantize_dynamic(
    gate: Tensor, up: Tensor, *, bits: int = 8, group_size: int | None = -1, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8, scale, zero_point int32) of ``silu(gate) * up``; not differentiable.

    Arguments are as in ``silu_mul_fake_quantize_dynamic``. ``dequantize(q, scale, zero_point, dtype=gate.dtype)`` gives
    its values bit for bit where they are not NaN. q is contiguous; scale is fp32 (fp64 for fp64); scale and zero_point
    are shaped as in ``quantize_dynamic``.
    """
    return _quantize(gate.detach(), up.detach(), group_size_argument(group_size), *range_of_bits(bits), symmetric)
