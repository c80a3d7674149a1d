"""RMSNorm fused with dynamic quantization: ``rms_norm_[fake_]quantize_dynamic``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import library, samples
from ..reference import rms_norm_quantize as reference
from ..reference import transforms
from ..reference.fake_quantize import compute_dtype
from .autograd import entered, transformed
from .dynamic import fake_dynamic_qparams, group_size_argument, range_of_bits

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), triton=True)

_NORM = "Tensor x, Tensor? weight, float eps, SymInt group_size, SymInt quant_min, SymInt quant_max, bool symmetric"


def _rms_norm_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for _, *rest in samples.dynamic(x):
        if x.dim() > 0:
            yield x, None, 1e-6, *rest
            yield x, torch.rand(x.shape[-1]) + 0.5, 1e-6, *rest


def _rms_norm_backward_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for case in _rms_norm_samples(x):
            _, weight, _, _, low, high, symmetric = case
            _, scale, zero_point, rstd = reference.rms_norm_fake_quantize_dynamic_forward(*case)
            clipped = (None, None) if symmetric else (scale, zero_point)
            yield torch.randn(x.shape).to(x.dtype), x, weight, rstd, *clipped, low, high, weight is not None


def _fake_forward(dtype: torch.dtype | None) -> Any:
    def fake(x: Tensor, weight: Tensor | None, eps: float, group_size: int, *_: Any) -> tuple[Tensor, ...]:
        rstd = x.new_empty([*x.shape[:-1], 1], dtype=compute_dtype(x))
        return x.new_empty(x.shape, dtype=dtype), *fake_dynamic_qparams(x, group_size), rstd

    return fake


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    if weight is None or not rest[-1]:
        return dx, rstd.new_empty(0)
    return dx, weight.new_empty(weight.shape)


_forward = _define(
    "rms_norm_fake_quantize_dynamic_forward",
    f"({_NORM}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.rms_norm_fake_quantize_dynamic_forward,
    _fake_forward(None),
    samples=_rms_norm_samples,
    sums=(3,),
    given=lambda args, outputs: reference.given_rstd(args[0], args[1], outputs[3], *args[3:]),
)
_quantize = _define(
    "rms_norm_quantize_dynamic",
    f"({_NORM}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.rms_norm_quantize_dynamic,
    _fake_forward(torch.int8),
    samples=_rms_norm_samples,
    sums=(3,),
    given=lambda args, outputs: reference.given_rstd_quantized(args[0], args[1], outputs[3], *args[3:]),
)
_backward = _define(
    "rms_norm_fake_quantize_dynamic_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, Tensor? scale, Tensor? zero_point, SymInt quant_min, "
    "SymInt quant_max, bool weight_grad) -> (Tensor, Tensor)",
    reference.rms_norm_fake_quantize_dynamic_backward,
    _fake_backward,
    samples=_rms_norm_backward_samples,
    sums=(0, 1),
)


class _RmsNormFakeQuantize(Function):
    """Keeps x, 4 bytes for each row and, if values can be clipped (symmetric=False), 8 for each scale."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, group_size: int, low: int, high: int, symmetric: bool
    ) -> Tensor:
        y, scale, zero_point, rstd = _forward(x, weight, eps, group_size, low, high, symmetric)
        ctx.eps, ctx.range = eps, (low, high)
        ctx.save_for_backward(x, weight, rstd, *((None, None) if symmetric else (scale, zero_point)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rstd, scale, zero_point = ctx.saved_tensors
        back: Any = _backward
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: autograd differentiates this
            back, rstd = reference.rms_norm_fake_quantize_dynamic_backward, reference.rstd_of(x, ctx.eps)
        dx, dweight = back(grad, x, weight, rstd, scale, zero_point, *ctx.range, ctx.needs_input_grad[1])
        return dx, dweight if ctx.needs_input_grad[1] else None, None, None, None, None, None


_fused = entered(_RmsNormFakeQuantize)


def _arguments(
    x: Tensor, weight: Tensor | None, eps: float | None, bits: int, group_size: int | None, symmetric: bool
) -> tuple[Any, ...]:
    eps = torch.finfo(compute_dtype(x)).eps if eps is None else eps
    return x, weight, eps, group_size_argument(group_size), *range_of_bits(bits), symmetric


def rms_norm_fake_quantize_dynamic(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = None,
    bits: int = 8,
    group_size: int | None = -1,
    symmetric: bool = True,
) -> Tensor:
    """``fake_quantize_dynamic(rms_norm(x) * weight)`` in one pass over x.

    Args:
        x: at least one dim; the op normalises along the last (RMSNorm, arXiv 1910.07467). fp32, fp64, fp16 or bf16.
        weight: None or one value for each element of the last dim; any floating dtype.
        eps: added to the mean square; None: the epsilon of the compute dtype, as in torch.nn.functional.rms_norm.
        bits, group_size, symmetric: as in ``fake_quantize_dynamic``. One range for the whole tensor (None) takes two
            passes; on a GPU it runs in plain torch.

    Returns:
        A contiguous tensor of x's shape and dtype. The normalised value goes to the quantizer in fp32 (fp64 for fp64)
        and is rounded once to x's dtype, after the quantizer.

    Gradients pass the quantizer straight through, as in ``fake_quantize_dynamic``, and the norm exactly; dweight is
    summed in a fixed order. The backward pass keeps x, weight, 4 bytes for each row, and with symmetric=False 8 for
    each scale. Kernels may add the squares in any order: rstd is right to 2**-21, and given a kernel's rstd all other
    bits are fixed.

    Raises:
        RuntimeError: an argument's dtype, device or shape does not fit; the message names it.
        ValueError: bits is not 2 to 8.
    """
    args = _arguments(x, weight, eps, bits, group_size, symmetric)
    if transformed():
        return transforms.rms_norm_fake_quantize_dynamic(*args)
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _fused(*args)
    return _forward(*args)[0]


def rms_norm_quantize_dynamic(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = None,
    bits: int = 8,
    group_size: int | None = -1,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8, scale, zero_point int32) of ``rms_norm(x) * weight``; not differentiable.

    Arguments are as in ``rms_norm_fake_quantize_dynamic``. ``dequantize(q, scale, zero_point, dtype=x.dtype)`` gives
    its values bit for bit where they are not NaN. q is contiguous; scale is fp32 (fp64 for fp64 x); scale and
    zero_point are shaped as in ``quantize_dynamic``.
    """
    x, weight, *rest = _arguments(x, weight, eps, bits, group_size, symmetric)
    return _quantize(x.detach(), None if weight is None else weight.detach(), *rest)[:3]
