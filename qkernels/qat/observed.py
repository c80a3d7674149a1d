"""Observed: what calibration keeps of the values that one quantizer got, and the range that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..nn.fake_quantize import FakeQuantize
from ..nn.ranges import block_statistics
from ..ops import statistics as ops
from .histogram import RangeHistogram

BY_HISTOGRAM = ("percentile", "mse", "entropy")
MOVING_AVERAGE = 0.1  # calibration sees tens of batches, not thousands: torch.ao's 0.01 would stay near the first


class Unusable(ValueError):
    """Values that give no range; the text is complete."""


@dataclass(frozen=True)
class Seen:
    """Of some values: the extremes, the sum of magnitudes (fp64) and the number of each block that shares a scale."""

    low: Tensor
    high: Tensor
    total: Tensor
    count: int

    def joined(self, other: Seen) -> Seen:
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Seen(low, high, self.total + other.total, self.count + other.count)

    def moved(self, other: Seen) -> Seen:
        """As ``joined``, but the extremes only move towards the other's."""
        low = self.low + MOVING_AVERAGE * (other.low - self.low)
        high = self.high + MOVING_AVERAGE * (other.high - self.high)
        return replace(self.joined(other), low=low, high=high)

    def to(self, device: torch.device | str) -> Seen:
        return Seen(self.low.to(device), self.high.to(device), self.total.to(device), self.count)

    @property
    def mean(self) -> Tensor:
        return (self.total / self.count).float()


@dataclass(frozen=True)
class State:
    """What one rank tells the others, on the CPU: the least that gives the range."""

    seen: Seen
    weight_range: tuple[Tensor, ...] | None
    counts: Tensor | None
    exponent: int | None


class Observed:
    """Minimum, maximum and mean magnitude of all values that one quantizer got, and their histogram if it is needed.

    A batch is one observation, however often the model calls the quantizer in it: recurrent layers do so at each step.
    """

    def __init__(self, name: str, quantizer: FakeQuantize, method: str, percentile: float) -> None:
        self.name, self.quantizer, self.percentile = name, quantizer, percentile
        if method == "auto" or (method == "entropy" and quantizer.is_weight):
            method = "mse" if quantizer.learns_at_few_bits else "minmax"
        if method in ("mse", "entropy") and not quantizer.integer_codes:
            method = "minmax"  # these two measure the error of integer codes
        self.method = method
        self.scale_shape = quantizer.scale.shape
        self.histogram = RangeHistogram(self.scale_shape)
        self.seen: Seen | None = None
        self.weight_range: tuple[Tensor, ...] | None = None
        self.weight: Tensor | None = None
        self._batch: Seen | None = None

    def add(self, x: Tensor, batch: str) -> None:
        """Adds the values of one call; ``batch`` is the name of the batch for errors."""
        checks.dense(self.name, x)
        checks.values(self.name, x)
        if x.numel() == 0 or self.weight_range is not None:  # a weight is the same in every call
            return
        if self.quantizer.quantizer == "pact":  # it takes what is below zero for zero, as its own start does
            x = x.clamp(min=0)
        low, high, mean = block_statistics(x, self.scale_shape)
        amax = float(torch.maximum(-low, high).max())
        if not math.isfinite(amax):
            layer = self.name.rpartition(".")[0] or "model"
            if self.quantizer.is_weight:
                raise Unusable(f"model: the weight of layer {layer!r} holds NaN or infinity; accepted: finite values")
            raise Unusable(
                f"{batch}: the input of layer {layer!r} holds NaN or infinity; accepted: finite values, so leave this "
                "batch out or mend the layer in front that overflows"
            )
        count = x.numel() // low.numel()
        seen = Seen(low, high, mean.double() * count, count)
        if self.quantizer.is_weight:  # FSDP frees it after this call
            self.weight_range = self._range(seen, x)
            if self.quantizer.quantizer == "kmeans":  # it fits its levels, not only its scale
                self.weight = x.detach().clone()
        elif self.method in BY_HISTOGRAM:
            self.histogram.update(x, amax)
        self._batch = seen if self._batch is None else self._batch.joined(seen)

    def end_batch(self) -> None:
        if self._batch is None:
            return
        if self.seen is None:
            self.seen = self._batch
        elif self.method == "moving_average":
            self.seen = self.seen.moved(self._batch)
        else:
            self.seen = self.seen.joined(self._batch)
        self._batch = None

    def state(self) -> State | None:
        """What other ranks need of this one's values; None: it got none."""
        if self.seen is None:
            return None
        weight_range = None if self.weight_range is None else tuple(t.cpu() for t in self.weight_range)
        counts = None if self.histogram.counts is None else self.histogram.counts.cpu()
        return State(self.seen.to("cpu"), weight_range, counts, self.histogram.exponent)

    def take(self, states: list[State | None], device: torch.device) -> None:
        """Replaces what this rank saw by what all ranks saw; the order of states is the same on all of them."""
        reached = [state for state in states if state is not None]
        if not reached:
            return
        seen = reached[0].seen
        for state in reached[1:]:
            seen = seen.joined(state.seen)
        if self.method == "moving_average":
            low, high = (
                torch.stack([getattr(state.seen, end).double() for state in reached]).mean(0).float()
                for end in ("low", "high")
            )
            seen = replace(seen, low=low, high=high)
        self.seen = seen.to(device)
        if reached[0].weight_range is not None:
            self.weight_range = tuple(t.to(device) for t in reached[0].weight_range)
        self.histogram = RangeHistogram(self.scale_shape)
        for state in reached:
            if state.counts is not None and state.exponent is not None:
                self.histogram.add(state.counts.to(device), state.exponent)

    def range(self) -> tuple[Tensor, ...]:
        """The arguments for ``set_range``."""
        assert self.seen is not None
        return self._range(self.seen, None) if self.weight_range is None else self.weight_range

    def _range(self, seen: Seen, weight: Tensor | None) -> tuple[Tensor, ...]:
        quantizer, ends = self.quantizer, (seen.low, seen.high)
        rule = *ends, quantizer.quant_min, quantizer.quant_max, quantizer.symmetric
        if self.method == "percentile":
            tails = *ends, self.percentile, quantizer.symmetric
            return self.histogram.percentile_range(*tails) if weight is None else ops.percentile_range(weight, *tails)
        if self.method == "mse":
            return self.histogram.mse_range(*rule, 0.0) if weight is None else ops.mse_range(weight, *rule, 0.0)
        if self.method == "entropy":
            return self.histogram.entropy_range(*rule)
        return (*ends, seen.mean) if self.method == "lsq" else ends

    def apply(self, arguments: tuple[Tensor, ...]) -> None:
        """Sets the quantizer's range to what ``range`` gave."""
        assert self.seen is not None
        quantizer = self.quantizer
        if self.weight is not None:
            quantizer.start(self.weight)
            return
        quantizer.set_range(*arguments)
        # Training must not undo what the method clips. A scale that moves with the mean magnitude keeps the clipped
        # share, so training may move it after any method.
        if quantizer.quantizer != "ema" and (quantizer.learns_at_few_bits or self.method in ("minmax", "lsq")):
            quantizer.observe_from(self.seen.mean)

    def fall_back(self, low: float, high: float, device: torch.device) -> None:
        """Gives the quantizer of an input that no batch reached a range, which training may move on."""
        ends = (torch.full(self.scale_shape, end, device=device) for end in (low, high))
        self.quantizer.set_range(*ends)
        if self.quantizer.quantizer != "ema":
            self.quantizer.observe_from(torch.full(self.scale_shape, -1.0, device=device))  # its magnitude is not known
