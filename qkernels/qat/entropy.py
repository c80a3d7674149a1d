"""The divergence between a histogram and its quantized form, by which the method "entropy" chooses a range."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.statistics import best_of, candidate_qparams

# TensorRT's 2048 bins for magnitudes, on either side of zero. Finer bins of the same values hold one value or none each
# and fit every form; with coarser ones an 8-bit step of the full range would span fewer than 8.
BINS = 4096
NOTHING = 1e-4  # a bin that is empty in the quantized form counts as this share of one value: a logarithm needs some


def entropy_range(
    counts: Tensor, edges: Tensor, low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """[low, high] shrunk to the fraction whose quantized form diverges least from the histogram.

    The scheme is TensorRT's (S. Migacz, "8-bit inference with TensorRT", GTC 2017), which onnxruntime and MXNet have
    too. P is the histogram inside the range; the outermost bins inside also count what the range clips. Q spreads the
    values of each code, without those that were clipped, evenly over the code's bins that are not empty in P. The
    divergence is Σ P·log(P/Q). Three points differ from it, or are left open by it:

    - the candidates are the fractions that "mse" tries, as far as a step is no narrower than a bin;
    - P and Q are both shares of all values. Q divided by its own sum would be perfect where a range clips nearly all;
    - the bin of zero counts no more than the larger of its neighbours: zero is a code, so zeros have no error, but
      those of a ReLU would outweigh all other values.

    Args:
        counts: ``[*low.shape, BINS]``, how many values lie in each bin.
        edges: ``[BINS + 1]``, fp64; the middle one is zero.
        low, high: the extremes of the values.
    """
    middle = BINS // 2
    counts = counts.double()
    beside = torch.maximum(counts[..., middle - 1], counts[..., middle + 1])
    counts[..., middle] = torch.minimum(counts[..., middle], beside)
    fractions, scales, zero_points = candidate_qparams(low, high, quant_min, quant_max, symmetric, 0.0)
    width = edges[1] - edges[0]
    middles = (edges[1:] + edges[:-1]) / 2
    divergences: list[Tensor] = []
    for scale, zero_point in zip(scales, zero_points, strict=True):
        codes = (middles / scale.double().unsqueeze(-1)).round() + zero_point.unsqueeze(-1) - quant_min
        found = divergence(counts, codes, quant_max - quant_min)
        divergences.append(torch.where(scale >= width, found, torch.inf) if divergences else found)
    return best_of(fractions, torch.stack(divergences), low, high)


def divergence(counts: Tensor, codes: Tensor, largest: int) -> Tensor:
    """Σ P·log(P/Q) over the last dim, for bins of these codes; those outside 0 … largest are clipped."""
    inside = (codes >= 0) & (codes <= largest)
    index = codes.clamp(0, largest).long()
    kept = counts * inside
    p = kept.clone()
    numbers = torch.arange(counts.shape[-1], device=counts.device)
    for end, clipped in (
        (torch.where(inside, numbers, counts.shape[-1]).amin(-1, keepdim=True), counts * (codes < 0)),
        (torch.where(inside, numbers, -1).amax(-1, keepdim=True), counts * (codes > largest)),
    ):
        p.scatter_add_(-1, end.clamp(0, counts.shape[-1] - 1), clipped.sum(-1, keepdim=True))
    filled = (p > 0).double()
    per_code = counts.new_zeros(2, *counts.shape[:-1], largest + 1)
    per_code.scatter_add_(-1, index.expand(2, *counts.shape), torch.stack((kept, filled)))
    q = (per_code[0] / per_code[1].clamp(min=1)).gather(-1, index)
    terms = p * (p.clamp(min=NOTHING) / q.clamp(min=NOTHING)).log()
    return terms.sum(-1) / counts.sum(-1).clamp(min=1)
