"""calibrate: runs batches through a prepared model and sets every quantizer's scale from what it saw."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import SCALE_FLOOR, FakeQuantize, block_statistics
from ..ops import statistics as ops
from .fold import eval_mode
from .histogram import RangeHistogram

METHODS = ("minmax", "moving_average", "percentile", "mse")
MOVING_AVERAGE = 0.1  # calibration sees tens of batches, not thousands: torch.ao's 0.01 would keep to the first one


class _Statistics:
    """Minimum, maximum and mean magnitude of all that one quantizer was given; its distribution where that counts."""

    def __init__(self, name: str, quantizer: FakeQuantize, method: str) -> None:
        self.name, self.quantizer, self.method = name, quantizer, method
        self.scale_shape = quantizer.scale.shape
        self.weight: Tensor | None = None
        self.histogram = RangeHistogram(self.scale_shape)
        self.values: tuple[Tensor, Tensor, Tensor] | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high, mean = block_statistics(x, self.scale_shape)
        amax = float(torch.maximum(-low, high).max())
        is_weight = self.name.endswith("weight_fake_quant")
        if not math.isfinite(amax):
            layer = self.name.rpartition(".")[0] or "model"
            what = "weight" if is_weight else "input"
            raise ValueError(f"batches: the {what} of layer {layer!r} holds NaN or infinity; accepted: finite values")
        self.count += 1
        if is_weight:  # the same in every batch
            self.weight = x
        elif self.method in ("percentile", "mse"):
            self.histogram.update(x, amax)
        if self.values is None:
            self.values = (low, high, mean)
            return
        old_low, old_high, old_mean = self.values
        if self.method != "moving_average":
            share = 1 / self.count
            low, high = torch.minimum(old_low, low), torch.maximum(old_high, high)
        else:
            share = MOVING_AVERAGE
            low, high = old_low + share * (low - old_low), old_high + share * (high - old_high)
        self.values = (low, high, old_mean + share * (mean - old_mean))

    def apply(self, percentile: float) -> None:
        """Sets the quantizer's range, if it was given anything."""
        if self.values is None:
            return
        low, high, mean = self.values
        quantizer, weight, histogram = self.quantizer, self.weight, self.histogram
        if self.method == "percentile":
            tails = low, high, percentile, quantizer.symmetric
            chosen = ops.percentile_range(weight, *tails) if weight is not None else histogram.percentile_range(*tails)
            quantizer.set_range(*chosen)
        elif self.method == "mse":
            rule = low, high, quantizer.quant_min, quantizer.quant_max, quantizer.symmetric, SCALE_FLOOR
            chosen = ops.mse_range(weight, *rule) if weight is not None else histogram.mse_range(*rule)
            quantizer.set_range(*chosen)
        else:
            quantizer.set_range(low, high, mean)


def calibrate(model: nn.Module, batches: Iterable[Any], *, method: str = "minmax", percentile: float = 99.99) -> None:
    """Sets scale and zero point of every quantizer of a prepared model, in place, from a few batches of real inputs.

    Runs ``model`` in eval mode without gradients and without quantization, so that each layer sees what the float
    model gives it; modes are restored. Weight quantizers start anew from the weights as they are now.

    Args:
        model: from ``prepare``.
        batches: tensors (the input), tuples or lists (the first element is the input), or dicts (keyword arguments).
        method: "minmax": the extremes over all batches. "moving_average": an average of the batches' extremes
            (the first, then value += 0.1·(batch − value)), which a single outlier moves less. "percentile": what holds
            ``percentile`` % of all magnitudes (symmetric quantizers), or of the values counted from either end.
            "mse": the fraction of the extremes, of 64 down to 1/79, that gives the smallest squared error: the one
            to take at 4 bits and below, or for heavy tails. Both look at weights themselves and at inputs through a
            histogram of 32768 bins, and set learned scales too, in place of LSQ's own formula.
        percentile: above 50, at most 100; the default clips one value in ten thousand.

    Raises:
        ValueError: no batches, a method, percentile or model other than these, or NaN or infinity in a layer's input
            (names the layer). The model's scales then stay as they were.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; accepted: {', '.join(METHODS)}")
    ops.check_percentile(percentile)
    quantizers = quantizers_of(model)
    statistics = {
        quantizer: _Statistics(name, quantizer, method)
        for name, quantizer in quantizers.items()
        if quantizer.quantizer != "dynamic"
    }

    def observe(quantizer: FakeQuantize, x: Tensor) -> Tensor:
        if quantizer in statistics:
            statistics[quantizer].update(x)
        return x

    seen = 0
    with eval_mode(model), torch.no_grad(), quantizers_replaced(model, observe):
        for batch in batches:
            call(model, batch)
            seen += 1
    if not seen:
        raise ValueError("batches: got none; accepted: at least one batch of inputs")
    with torch.no_grad():
        for observed in statistics.values():
            observed.apply(percentile)


def quantizers_of(model: nn.Module) -> dict[str, FakeQuantize]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}
    if not found:
        raise ValueError("model: got one without quantizers; accepted: what qk.prepare(model, config) returns")
    return found


def call(model: nn.Module, batch: Any) -> Any:
    """The model on one batch: a tensor, a tuple or list that starts with the input, or a dict of keyword arguments."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        return model(batch[0])
    raise TypeError(
        f"batches: got a {type(batch).__name__}; accepted: tensors, tuples or lists that start with the input, "
        "dicts of keyword arguments"
    )


@contextlib.contextmanager
def quantizers_replaced(model: nn.Module, fn: Callable[[FakeQuantize, Tensor], Tensor]) -> Iterator[None]:
    """Every quantizer computes ``fn(quantizer, x)`` inside; the quantizers' own code carries no trace of it."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    for quantizer in quantizers:
        quantizer.forward = lambda x, quantizer=quantizer: fn(quantizer, x)  # type: ignore[method-assign, misc]
    try:
        yield
    finally:
        for quantizer in quantizers:
            del quantizer.forward
