"""Moves scales after the range of the tensor that they quantize: ``follow_range`` in place, ``followed`` as copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import library, samples
from ..reference import follow_range as reference
from .autograd import transformed


def _follow_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for shape in {(1,), (x.shape[0], *[1] * (x.dim() - 1)) if x.dim() else (1,)}:
        yield x, torch.rand(shape), None, *samples.INT8, True, 0.1, 0.0
        yield x, torch.rand(shape), torch.rand(shape).bfloat16(), *samples.INT4, False, 0.5, 0.25
        yield x, torch.rand(shape), torch.zeros(shape, dtype=torch.int32), *samples.INT8, False, 1.0, 1.0


_follow_range = library.define(
    "follow_range",
    "(Tensor x, Tensor(a!) scale, Tensor(b!)? zero_point, SymInt quant_min, SymInt quant_max, bool symmetric, "
    "float up, float down) -> ()",
    reference.follow_range,
    lambda *args: None,
    cpu=("avx512", "avx2", "scalar"),
    triton=True,
    samples=_follow_samples,
)


def follow_range(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    symmetric: bool = True,
    up: float = 1.0,
    down: float = 1.0,
) -> None:
    """Moves scale and zero point, in place, towards those of x's range, without synchronisation.

    Args:
        x: any shape; fp32, fp64, fp16 or bf16.
        scale: fp32, contiguous; its shape is the granularity, as in ``fake_quantize``.
        zero_point: None, or contiguous and of scale's shape: a floating dtype, or int32 if up and down are 0 or 1.
        quant_min, quant_max: inclusive integer range, within ±2**24.
        symmetric: as in ``choose_qparams``, which says what scale and zero point a range has.
        up, down: 0 to 1: the share of the way that a scale goes if the range's is larger (up) or smaller (down). 1 and
            1 follow the range; 0.1 and 0 let it grow.

    A channel of zeros alone, or with a NaN or infinity, keeps its scale and zero point; an empty x changes none.

    Raises:
        RuntimeError: an argument's dtype, device, shape or value does not fit; the message names it.
    """
    _follow_range(x.detach(), scale.detach(), zero_point if zero_point is None else zero_point.detach(),
                  quant_min, quant_max, symmetric, up, down)  # fmt: skip


@torch.no_grad()
def followed(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    up: float,
    down: float,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as ``follow_range`` moves them, as new tensors; works in torch.func's transforms too."""
    if transformed():
        if x.numel():
            scale, zero_point = reference.followed(x, scale, zero_point, quant_min, quant_max, symmetric, up, down)
        return scale, zero_point
    scale, zero_point = scale.clone(), None if zero_point is None else zero_point.clone()
    _follow_range(x.detach(), scale, zero_point, quant_min, quant_max, symmetric, up, down)
    return scale, zero_point
