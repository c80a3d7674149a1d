"""Histograms of weights, in steps of their scales: before quantization, and on the levels that they are rounded to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.codebook_quantizers import CodebookQuantizer
from ..nn.int8_conv_transpose import Int8ConvTranspose
from ..nn.qat_layer import QATLayer, effective_weight
from ..nn.ranges import per_element
from ..ops.statistics import histogram
from .quantized_weights import codes_of, scales_of

BINS = 96


@dataclass
class WeightHistogram:
    """The weights of a layer in units in which all channels have the same levels: w/scale + zero_point.

    Attributes:
        low, high: ends of the bins of ``before``, a quarter of the range beyond the levels, or farther.
        before: how many weights are in each bin before quantization, those beyond the ends in the first and the last;
            empty: they are not known.
        levels: the levels, ascending where they are not trained.
        after: how many weights each level has.
    """

    low: float
    high: float
    before: list[int]
    levels: list[float]
    after: list[int]


@torch.no_grad()
def of_prepared(layer: nn.Module) -> WeightHistogram | None:
    """Of the quantized weights of a layer in eval mode that have the levels of the first; None: there are none."""
    found: list[WeightHistogram] = []
    for parameter, quantizer in layer.quantized_weights() if isinstance(layer, QATLayer) else ():
        weight = effective_weight(layer, parameter).detach()
        if weight.is_meta or not weight.numel() or not quantizer.is_calibrated or not bool(weight.isfinite().all()):
            continue
        scale, zero_point = scales_of(quantizer, weight)
        if not bool(scale.isfinite().all()):
            continue
        codes, count = codes_of(quantizer, weight, (scale, zero_point))
        if isinstance(quantizer, CodebookQuantizer):
            levels = [float(level) for level in quantizer.levels.detach().tolist()]
        else:
            levels = [float(level) for level in range(quantizer.quant_min, quantizer.quant_max + 1)]
        position = weight.float() / per_element(scale, weight)
        if zero_point is not None:
            position += per_element(zero_point, weight)
        found.append(_made(position, codes, levels, count))
    return _sum(found)


@torch.no_grad()
def of_converted(parts: Sequence[Any], weight: Tensor | None) -> WeightHistogram | None:
    """Of the layers on integers that a converted layer consists of; weight: the float one, or all of them in a row."""
    found: list[WeightHistogram] = []
    at = 0
    for part in parts:
        codes = part.codes
        if codes.is_meta or not codes.numel():
            return None
        own = None if weight is None else weight.flatten()[at : at + codes.numel()]
        at += codes.numel()
        most = 2 ** (part.weight_bits - 1)
        least = -most + (int(codes.amin()) > -most)  # symmetric codes leave the lowest one out
        levels = [float(level) for level in range(least, most)]
        position = None if own is None else _position(part, codes, own)
        found.append(_made(position, codes.int() - least, levels, len(levels)))
    return _sum(found)


def _position(part: Any, codes: Tensor, weight: Tensor) -> Tensor | None:
    """The weight in steps; None: its scales lie in another way than by rows, or it has minima for zero points."""
    if isinstance(part, Int8ConvTranspose) or getattr(part, "minimum", None) is not None:
        return None
    scale, zero_point = part.scale.detach().float(), part.zero_point
    if weight.numel() != codes.numel() or scale.shape[0] != codes.shape[0]:
        return None
    groups = weight.float().reshape(codes.shape[0], scale.numel() // scale.shape[0], -1)
    position = groups / scale.reshape(*groups.shape[:2], 1)
    return position if zero_point is None else position + zero_point.float().reshape(*groups.shape[:2], 1)


def _made(position: Tensor | None, codes: Tensor, levels: list[float], count: int) -> WeightHistogram:
    margin = max((max(levels) - min(levels)) / 4, 1.5 * (max(levels) - min(levels)) / max(count - 1, 1))
    low, high = min(levels) - margin, max(levels) + margin
    ends = [torch.tensor([end], device=codes.device) for end in (-0.5, count - 0.5, low, high)]
    after, _ = histogram(codes.float(), ends[0], ends[1], bins=count)
    before: list[int] = []
    if position is not None:
        counts, outside = histogram(position, ends[2], ends[3], bins=BINS)
        before = counts.flatten().tolist()
        below, above, _ = outside.flatten().tolist()
        before[0] += below
        before[-1] += above
    return WeightHistogram(low, high, before, levels, after.flatten().tolist())


def _sum(found: list[WeightHistogram]) -> WeightHistogram | None:
    """Their sum, of those with the levels of the first."""
    if not found:
        return None
    same = [one for one in found if one.levels == found[0].levels]
    before = (
        [sum(bins) for bins in zip(*(one.before for one in same), strict=True)] if all(o.before for o in same) else []
    )
    after = [sum(counts) for counts in zip(*(one.after for one in same), strict=True)]
    return WeightHistogram(same[0].low, same[0].high, before, same[0].levels, after)
