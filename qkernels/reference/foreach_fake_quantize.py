"""Fake quantization of many tensors: calls the op for one tensor on each, in order.

The calls go through the dispatcher, so that a device without a kernel for lists runs its best kernel on each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks

single = torch.ops.qkernels

Tensors = Sequence[Tensor]
ZeroPoints = Sequence[Tensor | None]


def foreach_fake_quantize_forward(
    xs: Tensors, scales: Tensors, zero_points: ZeroPoints, quant_mins: Sequence[int], quant_maxs: Sequence[int]
) -> list[Tensor]:
    checks.foreach(xs, scales=scales, zero_points=zero_points, quant_min=quant_mins, quant_max=quant_maxs)
    calls = zip(xs, scales, zero_points, quant_mins, quant_maxs, strict=True)
    return [single.fake_quantize_forward(*call) for call in calls]


def foreach_fake_quantize_backward(
    grads: Tensors,
    xs: Tensors,
    scales: Tensors,
    zero_points: ZeroPoints,
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    lsq: bool = False,
) -> list[Tensor]:
    checks.foreach(xs, grads=grads, scales=scales, zero_points=zero_points, quant_min=quant_mins, quant_max=quant_maxs)
    calls = zip(grads, xs, scales, zero_points, quant_mins, quant_maxs, strict=True)
    return [single.fake_quantize_backward(*call, lsq) for call in calls]


def foreach_fake_quantize_learnable_backward(
    grads: Tensors,
    xs: Tensors,
    scales: Tensors,
    zero_points: ZeroPoints,
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    grad_factors: Sequence[float],
    lsq: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the tensors, of the scales and of the zero points (in the scales' shapes)."""
    checks.foreach(
        xs, grad_factor=grad_factors, grads=grads, scales=scales, zero_points=zero_points, quant_min=quant_mins,
        quant_max=quant_maxs,
    )  # fmt: skip
    calls = zip(grads, xs, scales, zero_points, quant_mins, quant_maxs, grad_factors, strict=True)
    results = [single.fake_quantize_learnable_backward(*call, lsq) for call in calls]
    dx, dscale, dzero_point = ([result[part] for result in results] for part in range(3))
    return dx, dscale, dzero_point
