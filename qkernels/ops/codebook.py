"""Non-uniform quantization: ``fake_quantize_codebook``, ``quantize_codebook``, ``dequantize_codebook``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import library, samples
from ..layouts import mask_like
from ..reference import codebook as reference
from ..reference import transforms
from .autograd import is_kept, kept, learnable, masked, transformed

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"), triton=True)


def _codebook_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for (scale, _), levels in zip(samples.qparams(x), (16, 256, 5, 33), strict=False):
        yield x, scale * 9, torch.randn(levels)


def _codebook_learnable_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for case in samples.backward(_codebook_samples)(x):
            yield *case, 0.5, True


def _dequantize_codebook_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for _, scale, codebook in _codebook_samples(x):
        yield torch.randint(0, 256, x.shape, dtype=torch.uint8), scale, codebook, x.dtype


_forward = _define(
    "fake_quantize_codebook_forward",
    "(Tensor x, Tensor scale, Tensor codebook) -> Tensor",
    reference.fake_quantize_codebook_forward,
    lambda x, scale, codebook: torch.empty_like(x),
    samples=_codebook_samples,
)
_forward_mask = _define(
    "fake_quantize_codebook_forward_mask",
    "(Tensor x, Tensor scale, Tensor codebook) -> (Tensor, Tensor)",
    reference.fake_quantize_codebook_forward_mask,
    lambda x, scale, codebook: (torch.empty_like(x), mask_like(x)),
    samples=_codebook_samples,
)
_backward = _define(
    "fake_quantize_codebook_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor codebook) -> Tensor",
    reference.fake_quantize_codebook_backward,
    lambda grad, x, scale, codebook: torch.empty_like(x),
    samples=samples.backward(_codebook_samples),
)
_learnable_backward = _define(
    "fake_quantize_codebook_learnable_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor codebook, float grad_factor, bool learn_codebook) "
    "-> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_codebook_learnable_backward,
    lambda grad, x, scale, codebook, grad_factor, learn_codebook: (
        torch.empty_like(x),
        scale.new_empty(scale.shape),
        codebook.new_empty(codebook.shape if learn_codebook else 0),
    ),
    samples=_codebook_learnable_samples,
    sums=(1, 2),
)
_quantize = _define(
    "quantize_codebook",
    "(Tensor x, Tensor scale, Tensor codebook) -> Tensor",
    reference.quantize_codebook,
    lambda x, scale, codebook: torch.empty_like(x, dtype=torch.uint8),
    samples=_codebook_samples,
)
_dequantize = _define(
    "dequantize_codebook",
    "(Tensor codes, Tensor scale, Tensor codebook, ScalarType dtype) -> Tensor",
    reference.dequantize_codebook,
    lambda codes, scale, codebook, dtype: torch.empty_like(codes, dtype=dtype),
    samples=_dequantize_codebook_samples,
)


_kept = kept(_forward, _backward, reference.inside_codebook)
_masked = masked(_forward_mask)
_learnable = learnable(
    _forward,
    _learnable_backward,
    no_second="fake_quantize_codebook: learned scales and codebooks have no second derivative; detach them",
    taken=3,
)


def fake_quantize_codebook(x: Tensor, scale: Tensor, codebook: Tensor, *, grad_factor: float = 1.0) -> Tensor:
    """Replaces x/scale by the nearest level of a codebook, then multiplies by scale: codebook[nearest(x/scale)]·scale.

    Args:
        x: any shape; fp32, fp64, fp16 or bf16. Arithmetic is fp32 (fp64 for fp64).
        scale: positive; its shape is the granularity, as in ``fake_quantize``: ``[N, K/64]`` gives NF4's blocks of 64
            (``w.abs().reshape(N, -1, 64).amax(-1)``). With the largest magnitude as scale, a codebook that reaches ±1
            clips nothing.
        codebook: ``[L]``, 2 to 256 finite levels of a floating dtype in any order; see ``qk.codebooks``. A level that
            is NaN or infinite makes all of y NaN.
        grad_factor: multiplies the gradients of scale and codebook.

    Returns:
        A tensor of x's shape, dtype and memory layout. A tie goes to the lower level, infinities to the end levels,
        NaN stays NaN.

    The gradient of x passes where x/scale lies within the codebook, its ends included. The gradient of scale is
    Σ dy·(level − x/scale) inside and Σ dy·level outside (as LSQ, arXiv 1902.08153); that of a level is Σ dy·scale over
    the elements that are quantized to it; the sums are deterministic. The backward pass keeps x if x lives until then
    anyway or scale or codebook requires grad, else one bit per element.

    Raises:
        RuntimeError: an argument's dtype, device or shape does not fit; the message names it.
    """
    if transformed():
        return transforms.fake_quantize_codebook(x, scale, codebook, grad_factor)
    if torch.is_grad_enabled():
        if scale.requires_grad or codebook.requires_grad:
            return _learnable(x, scale, codebook, grad_factor, codebook.requires_grad)
        if x.requires_grad:
            return (_kept if is_kept(x) else _masked)(x, scale, codebook)
    return _forward(x, scale, codebook)


def quantize_codebook(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """Codes (uint8, x's shape and memory layout): the index in the codebook of the level nearest to x/scale.

    Arguments are as in ``fake_quantize_codebook``. ``dequantize_codebook`` of the codes equals
    ``fake_quantize_codebook`` bit for bit where x is not NaN; NaN gets the code of 0. Not differentiable.
    """
    return _quantize(x.detach(), scale.detach(), codebook.detach())


def dequantize_codebook(
    codes: Tensor, scale: Tensor, codebook: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codebook[codes]·scale, computed in fp32 (fp64 for fp64) and rounded once to dtype.

    codes is uint8; scale and codebook are as in ``fake_quantize_codebook``, and differentiable. A code beyond the last
    level gives NaN.
    """
    if transformed() or (torch.is_grad_enabled() and (scale.requires_grad or codebook.requires_grad)):
        return transforms.dequantize_codebook(codes, scale, codebook, dtype)
    return _dequantize(codes, scale.detach(), codebook.detach(), dtype)
