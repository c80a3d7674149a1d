"""A moving-average observer and a fake quantization in one, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .fake_quantize import fake_quantize_forward_mask
from .ranges import range_of, step_of, within_reach


def observe_fake_quantize(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    symmetric_steps: float,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    """Updates the four statistics in place, then returns y and the mask.

    running += averaging_const · (batch − running); an infinite running takes the batch's value. Statistics are fp32 and
    have the shape of scale. symmetric_steps is the number of steps that cover max(|min|, |max|), with the zero point
    symmetric_zero_point; 0 means asymmetric. A batch that is empty or whose range is not finite does not change the
    statistics.
    """
    checks.observe(x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point, quant_min, quant_max)
    # Statistics of one element may have any shape.
    running_max, zero_point = running_max.view_as(running_min), zero_point.view_as(running_min)
    scale = scale.view_as(running_min)
    low, high = range_of(x, running_min)
    learn = observer_on.bool().reshape(()) & low.isfinite() & high.isfinite()
    for running, batch in ((running_min, low), (running_max, high)):
        running.copy_(torch.where(learn, moving_average(running, batch, averaging_const), running))
    s, z = observed_qparams(running_min, running_max, quant_min, quant_max, symmetric_steps, symmetric_zero_point)
    scale.copy_(torch.where(learn, s, scale))
    zero_point.copy_(torch.where(learn, z, zero_point))
    y, mask = fake_quantize_forward_mask(x, scale, zero_point, quant_min, quant_max)
    on = fake_quant_on.bool().reshape(())
    return torch.where(on, y, x, out=torch.empty_like(x)), torch.where(on, mask, 255)


def moving_average(running: Tensor, batch: Tensor, averaging_const: float) -> Tensor:
    """running + averaging_const · (batch − running), also if the difference is beyond fp32."""
    momentum = torch.full_like(running, averaging_const)
    distance = batch - running
    near, far = running + momentum * distance, (1 - momentum) * running + momentum * batch
    return torch.where(running.isinf(), batch, torch.where(distance.isinf(), far, near))


def observed_qparams(
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric_steps: float,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of torch.ao's observers with their default eps: a scale is at least fp32's epsilon."""
    low, high = within_reach(low.clamp(max=0)), within_reach(high.clamp(min=0))
    eps = torch.finfo(torch.float32).eps
    if symmetric_steps:
        scale = (torch.maximum(-low, high) / symmetric_steps).clamp(min=eps)
        return scale, torch.full_like(scale, symmetric_zero_point, dtype=torch.int32)
    scale = step_of(low, high, quant_max - quant_min).clamp(min=eps)
    return scale, (quant_min - (low / scale).round()).clamp(quant_min, quant_max).nan_to_num(quant_min).to(torch.int32)
