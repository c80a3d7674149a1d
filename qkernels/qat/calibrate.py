"""calibrate: runs batches through a prepared model and sets every quantizer's scale from the values that it gets."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..nn.fake_quantize import FakeQuantize
from ..nn.learned_scale import MSE_BITS
from ..nn.ranges import block_statistics
from ..ops import statistics as ops
from .fold import eval_mode
from .histogram import RangeHistogram

METHODS = ("auto", "minmax", "moving_average", "percentile", "mse", "lsq")
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # they pass all arguments on
MOVING_AVERAGE = 0.1  # calibration sees tens of batches, not thousands: torch.ao's 0.01 would stay near the first


class _Statistics:
    """Minimum, maximum and mean magnitude of all values that one quantizer got, and their histogram if it is needed."""

    def __init__(self, name: str, quantizer: FakeQuantize, method: str, percentile: float) -> None:
        self.name, self.quantizer, self.method, self.percentile = name, quantizer, method, percentile
        if method == "auto":
            self.method = "mse" if quantizer.quantizer == "lsq" and quantizer.bits <= MSE_BITS else "minmax"
        self.scale_shape = quantizer.scale.shape
        self.chosen: tuple[Tensor, ...] | None = None
        self.histogram = RangeHistogram(self.scale_shape)
        self.values: tuple[Tensor, Tensor, Tensor] | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        checks.dense(self.name, x)
        if x.numel() == 0:
            return
        low, high, mean = block_statistics(x, self.scale_shape)
        amax = float(torch.maximum(-low, high).max())
        if not math.isfinite(amax):
            layer = self.name.rpartition(".")[0] or "model"
            what = "weight" if self.quantizer.is_weight else "input"
            raise ValueError(f"batches: the {what} of layer {layer!r} holds NaN or infinity; accepted: finite values")
        self.count += 1
        if self.quantizer.is_weight:  # it is the same in every batch; FSDP frees it after the first
            if self.chosen is None:
                self.chosen = self._choose(x, low, high, mean)
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

    def _choose(self, weight: Tensor | None, low: Tensor, high: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
        """The arguments for ``set_range``."""
        quantizer, histogram = self.quantizer, self.histogram
        if self.method == "percentile":
            tails = low, high, self.percentile, quantizer.symmetric
            return ops.percentile_range(weight, *tails) if weight is not None else histogram.percentile_range(*tails)
        if self.method == "mse":
            rule = low, high, quantizer.quant_min, quantizer.quant_max, quantizer.symmetric, 0.0
            return ops.mse_range(weight, *rule) if weight is not None else histogram.mse_range(*rule)
        return (low, high, mean) if self.method == "lsq" else (low, high)

    def apply(self) -> None:
        """Sets the quantizer's range, if it got any values."""
        if self.values is None:
            return
        quantizer = self.quantizer
        quantizer.set_range(*(self.chosen or self._choose(None, *self.values)))
        # Training must not undo what the method clips. A scale that moves with the mean magnitude keeps the clipped
        # share, so training may move it after any method.
        few_bits = quantizer.quantizer == "lsq" and quantizer.bits <= MSE_BITS
        if quantizer.quantizer != "ema" and (few_bits or self.method in ("minmax", "lsq")):
            quantizer.observe_from(self.values[2])


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "auto",
    percentile: float = 99.99,
    max_batches: int | None = None,
) -> None:
    """Sets scale and zero point of every quantizer of a prepared model, in place, from a few batches of real inputs.

    It runs ``model`` in eval mode without gradients and without quantization, so that each layer gets the float model's
    values, and restores all modes. A BatchNorm that has seen no batch yet normalizes by the batch's statistics, as it
    will in training, and keeps none. Weight quantizers start anew from the present weights. A warning names the
    quantizers that no batch reached; they start from their first batch in training. If tqdm is installed, a terminal
    shows the progress.

    Args:
        model: from ``prepare``.
        batches: tensors (the input), tuples or lists (the model's arguments by position), or dicts (arguments by name).
            A model that takes one argument gets the first element of a tuple: a loader gives inputs and targets.
        method: how the range follows from the values.
            - "minmax": the extremes over all batches.
            - "moving_average": an average of the batches' extremes (the first, then value += 0.1·(batch − value)),
              which a single outlier moves less.
            - "percentile": the range that holds ``percentile`` % of all magnitudes (symmetric quantizers), or of the
              values counted from either end.
            - "mse": the fraction of the extremes, out of 64 from 1 down to 1/79, with the smallest squared error; best
              at 4 bits and below, or for heavy tails.
            - "lsq": LSQ's own start, 2·mean|x|/sqrt(steps), for learned scales of at most 4 bits, else the extremes.
            - "auto": "mse" for learned scales of at most 4 bits, else "minmax".
            "percentile" and "mse" look at the weights themselves, but at inputs through a histogram of 32768 bins.
        percentile: above 50, at most 100; the default clips one value in ten thousand.
        max_batches: how many batches to take at most; None: all.

    Raises:
        ValueError: there are no batches; method, percentile, max_batches or model has another value; or a layer's input
            holds NaN or infinity (the text names the layer). The model's scales then stay as they were.
        TypeError: a batch has another form, or more elements than the model takes arguments.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; accepted: {', '.join(METHODS)}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: got {max_batches}; accepted: at least 1, or None for all")
    ops.check_percentile(percentile)
    quantizers = quantizers_of(model)
    statistics = {
        quantizer: _Statistics(name, quantizer, method, percentile)
        for name, quantizer in quantizers.items()
        if quantizer.quantizer != "dynamic"
    }

    def observe(quantizer: FakeQuantize, x: Tensor) -> Tensor:
        if quantizer in statistics:
            statistics[quantizer].update(x)
        return x

    seen = 0
    with _as_it_will_train(model), torch.no_grad(), quantizers_replaced(model, observe):
        for batch in _progress(itertools.islice(batches, max_batches), "calibrate: batches"):
            call(model, batch)
            seen += 1
    if not seen:
        raise ValueError("batches: got none; accepted: at least one batch of inputs")
    with torch.no_grad():
        for observed in _progress(statistics.values(), "calibrate: scales"):
            observed.apply()
    unreached = [observed.name for observed in statistics.values() if observed.values is None]
    if unreached:
        warnings.warn(
            f"qk.calibrate: no batch reached {', '.join(unreached)}: not called, or its parent reads its weight "
            "instead of calling it",
            stacklevel=2,
        )


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """The items; after a second tqdm, if installed, shows on a terminal how many are done."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, disable=None, delay=1, leave=False)


@contextlib.contextmanager
def _as_it_will_train(model: nn.Module) -> Iterator[None]:
    """Eval mode, except for BatchNorms that will train and have no statistics: these use the batch's and keep none."""
    fresh = [
        module
        for module in model.modules()
        if isinstance(module, BATCH_NORMS) and module.training and _has_seen_nothing(module)
    ]
    idle = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and not m.training and _has_seen_nothing(m)]
    if idle:
        warnings.warn(
            f"qk.calibrate: {len(idle)} BatchNorm layers are in eval mode and have seen no batch, so that they change "
            "nothing; if they are to train, call model.train() before calibrate",
            stacklevel=4,
        )
    before = [(norm, norm.momentum) for norm in fresh]
    try:
        with eval_mode(model):
            for norm in fresh:
                norm.training, norm.momentum = True, 0.0
            yield
    finally:
        for norm, momentum in before:
            norm.momentum = momentum
            norm.num_batches_tracked.zero_()  # type: ignore[union-attr]


def _has_seen_nothing(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the running statistics are those of a new layer; a loaded file may hold others and count no batches."""
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or count is None or mean.is_meta:
        return False
    return not bool(count) and not bool(mean.any()) and bool((var == 1).all())


def quantizers_of(model: nn.Module) -> dict[str, FakeQuantize]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}
    if not found:
        raise ValueError("model: got one without quantizers; accepted: what qk.prepare(model, config) returns")
    return found


def call(model: nn.Module, batch: Any) -> Any:
    """Calls the model on one batch: a tensor, a tuple or list of arguments, or a dict of arguments by name.

    A model that takes one argument gets a tuple's first element, because loaders give pairs of inputs and targets.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, tuple | list) or not batch:
        raise TypeError(
            f"batches: got a {type(batch).__name__}; accepted: tensors, tuples or lists of the model's arguments, or "
            "dicts of arguments by name"
        )
    most = _positional(model)
    if most == 1:
        return model(batch[0])
    if len(batch) > most:
        raise TypeError(
            f"batches: got a {type(batch).__name__} of {len(batch)} elements for a model that takes {most:.0f} "
            "arguments; accepted: at most as many, or a dict of arguments by name"
        )
    return model(*batch)


def _positional(model: nn.Module) -> float:
    """How many arguments the model takes by position."""
    inside: Any = getattr(model, "_orig_mod", model)
    while isinstance(inside, WRAPPERS):
        inside = inside.module
    parameters = inspect.signature(inside.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return math.inf
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


@contextlib.contextmanager
def quantizers_replaced(model: nn.Module, fn: Callable[[FakeQuantize, Tensor], Tensor]) -> Iterator[None]:
    """Inside, every quantizer computes ``fn(quantizer, x)``."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    for quantizer in quantizers:
        quantizer.forward = lambda x, quantizer=quantizer: fn(quantizer, x)  # type: ignore[method-assign, misc]
    try:
        yield
    finally:
        for quantizer in quantizers:
            del quantizer.forward
