"""RangeHistogram: the values that a quantizer got over many batches, in a fixed amount of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.fake_quantize import fake_quantize
from ..ops.statistics import best_of, candidate_qparams, histogram
from . import entropy

# The bins take 256 KiB per tensor. The largest value lies in the outer half of the range, so an 8-bit step spans 64 to
# 128 bins if the codes cover the full range, and 4 to 8 bins if they cover only a sixteenth of it.
BINS = 32768


class RangeHistogram:
    """Counts values in equal bins of [−limit, limit]; limit is a power of two above all magnitudes so far.

    A batch that exceeds the limit doubles it as often as needed; each doubling merges bins two by two. So no count is
    ever split or estimated; any other growth factor would require that.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)  # scale's shape: one histogram for each element of scale
        self.exponent: int | None = None
        self.counts: Tensor | None = None

    def update(self, x: Tensor, amax: float) -> None:
        """Adds x; amax is finite and no magnitude in x is above it."""
        exponent = max(math.frexp(amax)[1], -100, -100 if self.exponent is None else self.exponent)
        if exponent >= 127:  # the width of the range is beyond fp32
            x = x.double()
        limit = torch.full(self.shape, math.ldexp(1.0, exponent), dtype=torch.float64, device=x.device)
        self.add(histogram(x, -limit, limit, bins=BINS)[0], exponent)

    def add(self, counts: Tensor, exponent: int) -> None:
        """Adds the counts of another histogram, whose limit is 2**exponent."""
        if self.counts is not None and self.exponent is not None:
            top = max(exponent, self.exponent)
            counts = doubled(counts, top - exponent) + doubled(self.counts, top - self.exponent)
            exponent = top
        self.counts, self.exponent = counts, exponent

    def edges(self) -> Tensor:
        assert self.counts is not None
        assert self.exponent is not None
        steps = torch.arange(-BINS // 2, BINS // 2 + 1, device=self.counts.device, dtype=torch.float64)
        return steps * math.ldexp(2.0 / BINS, self.exponent)

    def percentile_range(self, low: Tensor, high: Tensor, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
        """As ``ops.statistics.percentile_range``, but rounds the ends outwards to edges of bins."""
        assert self.counts is not None
        edges, total = self.edges().to(low.dtype), self.counts.sum(-1, keepdim=True)
        rank = (total * (percentile / 100)).ceil().clamp(min=1)
        if symmetric:
            negative, positive = self.counts[..., : BINS // 2].flip(-1), self.counts[..., BINS // 2 :]
            bound = edges[BINS // 2 :][1 + below(rank, negative + positive)]
            return torch.maximum(low, -bound), torch.minimum(high, bound)
        top = edges[1 + below(rank, self.counts)]
        bottom = edges[below(total + 1 - rank, self.counts)]
        return torch.maximum(low, bottom), torch.minimum(high, top)

    def mse_range(
        self, low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As ``ops.statistics.mse_range``, but takes every value for the middle of its bin."""
        assert self.counts is not None
        fractions, scales, zero_points = candidate_qparams(low, high, quant_min, quant_max, symmetric, eps)
        edges = self.edges()
        middles = ((edges[1:] + edges[:-1]) / 2).to(low.dtype).expand(self.counts.shape)
        errors = []
        for scale, zero_point in zip(scales, zero_points, strict=True):
            qparams = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
            error = fake_quantize(middles, *qparams, quant_min=quant_min, quant_max=quant_max) - middles
            errors.append((error.double().square() * self.counts).sum(-1))
        return best_of(fractions, torch.stack(errors), low, high)

    def entropy_range(
        self, low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
    ) -> tuple[Tensor, Tensor]:
        """[low, high] shrunk by the method "entropy"."""
        assert self.counts is not None
        pooled = self.counts.unflatten(-1, (entropy.BINS, -1)).sum(-1)
        edges = self.edges()[:: BINS // entropy.BINS]
        return entropy.entropy_range(pooled, edges, low, high, quant_min, quant_max, symmetric)


def doubled(counts: Tensor, times: int) -> Tensor:
    """The counts over a range that is 2**times as wide."""
    quarter = BINS // 4
    for _ in range(min(times, BINS.bit_length())):  # after so many, all counts are in the two middle bins and stay
        counts = torch.nn.functional.pad(counts.unflatten(-1, (-1, 2)).sum(-1), (quarter, quarter))
    return counts


def below(rank: Tensor, counts: Tensor) -> Tensor:
    """The bin that holds the value of this rank (1: the smallest)."""
    return (counts.cumsum(-1) < rank).sum(-1).clamp(max=counts.shape[-1] - 1)
