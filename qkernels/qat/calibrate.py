"""calibrate: runs batches through a prepared model and sets every quantizer's scale from the values that it gets."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import operator
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_lazy import QATLazy
from ..nn.quantizer_rules import nearest
from ..ops.statistics import check_percentile
from .fold import eval_mode
from .observed import Observed, Unusable
from .ranks import Ranks, Status
from .spec import listed

METHODS = ("auto", "minmax", "moving_average", "percentile", "mse", "entropy", "lsq")
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # they pass all arguments on


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "auto",
    percentile: float = 99.99,
    max_batches: int | None = None,
    fallback: float | tuple[float, float] | None = None,
    group: Any = None,
) -> None:
    """Sets scale and zero point of every quantizer of a prepared model, in place, from a few batches of real inputs.

    It runs ``model`` in eval mode without gradients and without quantization, so that each layer gets the float model's
    values, and restores all modes. What ``freeze_observers`` or ``freeze_scales`` holds keeps its scale. A BatchNorm
    that has seen no batch yet normalizes by the batch's statistics, as it will in training, and keeps none. Weight
    quantizers start anew from the present weights. A warning names the quantizers that no batch reached; without a
    fallback they start from their first batch in training. If tqdm is installed, a terminal shows the progress. Memory
    does not grow with the number of batches.

    **Many processes.** If torch.distributed is initialized, every process calls ``calibrate`` with its own share of the
    batches. What all of them saw is combined before a scale is set, so that all have the same scales, also where one
    had fewer batches, or none for a layer. (Under ``fully_shard`` and SyncBatchNorm each forward pass communicates, so
    there the numbers must be equal.) If one process fails, all raise.

    Args:
        model: from ``prepare``.
        batches: any iterable of tensors (the input), tuples or lists (the model's arguments by position), or dicts
            (arguments by name). A model that takes one argument gets the first element of a tuple: a loader gives
            inputs and targets. A PackedSequence counts as a tensor. Batches without samples are skipped.
        method: how the range follows from the values.
            - "minmax": the extremes over all batches.
            - "moving_average": an average of the batches' extremes (the first, then value += 0.1·(batch − value)),
              which a single outlier moves less. Over processes: the mean of their averages.
            - "percentile": the range that holds ``percentile`` % of all magnitudes (symmetric quantizers), or of the
              values counted from either end.
            - "mse": the fraction of the extremes, out of 64 from 1 down to 1/79, with the smallest squared error; best
              at 4 bits and below, or for heavy tails.
            - "entropy": of the same fractions the one with the smallest divergence (Kullback and Leibler) between the
              inputs' histogram and its quantized form, TensorRT's scheme, which outliers move little. Weights as with
              "auto": a channel's few hundred values fill no histogram, and their extremes lose nothing at 8 bits
              (arXiv 2004.09602).
            - "lsq": LSQ's own start, 2·mean|x|/sqrt(steps), for learned scales of at most 4 bits, else the extremes.
            - "auto": "mse" for learned scales of at most 4 bits, else "minmax".
            "percentile" and "mse" look at the weights themselves. They and "entropy" look at inputs through a histogram
            of 32768 bins.
        percentile: above 50, at most 100; the default clips one value in ten thousand.
        max_batches: how many batches to take at most; None: all. No further batch is asked for.
        fallback: the range of input quantizers that no batch reached, such as those of an expert that no token was
            routed to: r for (−r, r), or (low, high). It is a number that the caller knows from such layers, since
            nothing that this function saw tells what a layer will get; training moves it on as "minmax" does. None:
            they stay as they are. Weights need none: without a scale they start from themselves.
        group: the process group to combine over, of processes that hold the same model; None: the default group.

    Raises:
        ValueError: there are no batches, or none with samples; an argument has another value; all quantizers are
            frozen; or a layer's input holds NaN or infinity.
        TypeError: batches is no iterable, or a batch has another form or more elements than the model takes arguments.
        RuntimeError: another process failed.
        What the model raises on a batch is raised as TypeError, ValueError or RuntimeError. The text gives the batch's
        index, counted from 0, and the layer. The model stays as it was after every error.
    """
    check_module(model)
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; accepted: {', '.join(METHODS)}{nearest(method, METHODS)}")
    check_max_batches(max_batches)
    check_percentile(percentile)
    fallback_range = _range_of(fallback)
    if any(isinstance(module, QATLazy) for module in model.modules()):
        batches = _with_shapes(model, batches)
    with_scale = {name: module for name, module in quantizers_of(model).items() if module.quantizer != "dynamic"}
    frozen = [quantizer for quantizer in with_scale.values() if quantizer.frozen]
    # A frozen quantizer that has no scale yet has nothing to keep.
    quantizers = {name: q for name, q in with_scale.items() if not (q.frozen and q.has_scale)}
    if with_scale and not quantizers:
        raise ValueError(
            f"model: got one whose quantizers are all frozen ({listed(with_scale)}); accepted: one with others, as "
            "behind qk.freeze_scales(model, False)"
        )
    observed = [Observed(name, quantizer, method, percentile) for name, quantizer in quantizers.items()]
    ranks = Ranks(group)

    def status(error: str | None, ran: int = 0, taken: int = 0) -> Status:
        reached = tuple(item.seen is not None for item in observed)
        return Status(error, tuple(quantizers), reached, taken, ran > 0)

    try:
        counts = _run(model, batches, max_batches, observed)
    except Exception as error:
        ranks.agree(status(f"{type(error).__name__}: {error}"))  # the others must not wait for this one
        raise
    statuses = ranks.agree(status(None, *counts))
    taken = sum(each.batches for each in statuses)
    if not taken:
        raise ValueError(
            "batches: got none; accepted: at least one batch of inputs (a generator or iterator can be read once only)"
        )
    if not any(each.samples for each in statuses):
        raise ValueError(f"batches: got {taken} without samples; accepted: at least one batch with samples")
    with torch.no_grad():
        if ranks.size > 1:
            for at, item in enumerate(observed):
                # A weight is the same everywhere: the first rank that has read it tells.
                first = next((rank for rank, each in enumerate(statuses) if each.reached[at]), 0)
                told = item.state() if ranks.rank == first or not item.quantizer.is_weight else None
                item.take(ranks.gather(told), _device_of(model, item.quantizer))
        reached = [item for item in observed if item.seen is not None]
        ranges = [item.range() for item in progress(reached, "calibrate: scales", len(reached))]
        for quantizer in frozen:
            if not quantizer.has_scale:
                quantizer.freeze(False)  # so that it knows, when it is frozen again, whether its method lets it observe
        for item, arguments in zip(reached, ranges, strict=True):
            item.apply(arguments)
        unreached = [item for item in observed if item.seen is None]
        inputs = [item for item in unreached if not item.quantizer.is_weight]
        if fallback_range is not None:
            for item in inputs:
                item.fall_back(*fallback_range, _device_of(model, item.quantizer))
    for quantizer in frozen:
        quantizer.freeze()
    if unreached:
        advice = "fallback= gives inputs a range" if fallback_range is None else f"inputs got {fallback_range}"
        warnings.warn(
            f"qk.calibrate: no batch reached {', '.join(item.name for item in unreached)}: not called, or its parent "
            f"reads its weight instead of calling it{f'; {advice}' if inputs else ''}",
            stacklevel=2,
        )


def _range_of(fallback: Any) -> tuple[float, float] | None:
    if fallback is None:
        return None
    ends = fallback if isinstance(fallback, tuple | list) else (-fallback, fallback) if _is_finite(fallback) else ()
    if len(ends) != 2 or not all(map(_is_finite, ends)) or not ends[0] < ends[1]:
        raise ValueError(
            f"fallback: got {fallback!r}; accepted: a positive number r for the range (-r, r), a pair (low, high) of "
            "finite numbers with low < high, or None"
        )
    return float(ends[0]), float(ends[1])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _with_shapes(model: nn.Module, batches: Iterable[Any]) -> Iterable[Any]:
    """Lets lazy layers see the first batch, so that all quantizers are there; returns all batches."""
    if not hasattr(batches, "__iter__") or isinstance(batches, Tensor | Mapping | str | PackedSequence):
        return batches  # an error of its own follows
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    # What fails here fails again, and is told with the place of the batch.
    with contextlib.suppress(Exception), eval_mode(model), torch.no_grad(), quantizers_replaced(model, lambda _, x: x):
        call(model, first[0])
    return itertools.chain(first, rest)


def _run(
    model: nn.Module, batches: Iterable[Any], max_batches: int | None, observed: list[Observed]
) -> tuple[int, int]:
    """Lets each quantizer see its values; returns how many batches were run, and how many were taken."""
    of = {item.quantizer: item for item in observed}
    taken = ran = 0

    def observe(quantizer: FakeQuantize, x: Tensor) -> Tensor:
        if quantizer in of:
            of[quantizer].add(x, f"batches[{taken}]")
        return x

    with _as_it_will_train(model), torch.no_grad(), quantizers_replaced(model, observe):
        for full, _ in run_batches(model, batches, max_batches, "calibrate: batches"):
            for item in observed:
                item.end_batch()
            ran += full
            taken += 1
    return ran, taken


def run_batches(
    model: nn.Module, batches: Iterable[Any], max_batches: int | None, what: str
) -> Iterator[tuple[bool, Any]]:
    """Calls the model on each batch; after each, gives whether the batch had elements, and what the model returned.

    A batch without elements is skipped. what: the text of the progress bar; "": there is none.
    """
    check_batches(batches)
    runs = unwrapped(model)  # DistributedDataParallel would send the buffers to ranks that may have no batch
    given = -1  # not known, also where the iterable's class declares a length and then refuses it
    with contextlib.suppress(NotImplementedError):
        given = operator.length_hint(batches, -1)
    total = max_batches if given < 0 else min(given, max_batches or given)
    taken = itertools.islice(batches, max_batches)
    for at, batch in enumerate(progress(taken, what, total) if what else taken):
        args, kwargs = _arguments(model, batch, f"batches[{at}]")
        full, output = not is_empty((args, kwargs)), None
        if full:
            try:
                output = runs(*args, **kwargs)
            except (Unusable, torch.OutOfMemoryError):  # loops catch the latter, to go on with smaller batches
                raise
            except Exception as error:
                raise _failure(error, model, batch, f"batches[{at}]") from error
        yield full, output


def check_batches(batches: Any) -> None:
    """Refuses what is no iterable of batches; a tensor would give its rows."""
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not iterable or isinstance(batches, Tensor | Mapping | str | PackedSequence):
        raise TypeError(
            f"batches: got a {type(batches).__name__}; accepted: an iterable of batches, such as a loader or [batch]"
        )


def check_max_batches(max_batches: int | None) -> None:
    number = isinstance(max_batches, int) and not isinstance(max_batches, bool)
    if max_batches is not None and not (number and max_batches >= 1):
        raise ValueError(f"max_batches: got {max_batches}; accepted: a whole number of at least 1, or None for all")


def is_empty(arguments: Any) -> bool:
    """Whether there are tensors in the arguments, and none has elements."""
    sizes = [t.numel() for t in tensors_in(arguments)]
    return bool(sizes) and not any(sizes)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _failure(error: Exception, model: nn.Module, batch: Any, name: str) -> Exception:
    """What the model raised, with the batch's name and the innermost of its layers whose code was running."""
    names = {module: name for name, module in model.named_modules() if not isinstance(module, FakeQuantize)}
    where = "the model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(module):
            where = f"layer {names[module]!r} ({type(module).__name__})"
    kind = next((kind for kind in (TypeError, ValueError) if isinstance(error, kind)), RuntimeError)
    text = f"{name}: {where} failed with {type(error).__name__}: {error}"
    if "accepted: " not in text and isinstance(error, TypeError | AttributeError) and _holds_batches(batch):
        # Torch's own text, of a call with a tuple, lists all ways to call the function.
        return TypeError(
            f"{name}: got a {type(batch).__name__} of {len(batch)}, each a {type(batch[0]).__name__}, with which "
            f"{where} failed with {type(error).__name__}; accepted: one batch, such as one of these"
        )
    if "accepted: " not in text:
        text += "; accepted: what the model takes in eval mode, by shape, dtype and device"
    return kind(text)


def _holds_batches(batch: Any) -> bool:
    """Whether it may be a list of batches where one is asked for."""
    return isinstance(batch, tuple | list) and all(isinstance(item, tuple | list | Mapping) for item in batch)


def _device_of(model: nn.Module, quantizer: FakeQuantize) -> torch.device:
    """The quantizer's device; of one on the meta device, the model's."""
    tensors = itertools.chain([quantizer.scale], model.parameters(), model.buffers())
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def progress(items: Iterable[Any], what: str, total: int | None) -> Iterable[Any]:
    """The items; after a second tqdm, if installed, shows on a terminal how many are done."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, total=total, disable=None, delay=1, leave=False)


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
            stacklevel=5,
        )
    momenta = [norm.momentum for norm in fresh]
    try:
        with eval_mode(model):
            for norm in fresh:
                norm.training, norm.momentum = True, 0.0
            yield
    finally:
        for norm, momentum in zip(fresh, momenta, strict=True):
            norm.momentum = momentum
            norm.reset_running_stats()  # momentum 0 keeps them, unless a batch holds NaN


def _has_seen_nothing(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the running statistics are those of a new layer; a loaded file may hold others and count no batches."""
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or count is None or mean.is_meta:
        return False
    return not bool(count) and not bool(mean.any()) and bool((var == 1).all())


def check_module(model: Any, accepted: str = "what qk.prepare(model, config) returns", argument: str = "model") -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: got a {type(model).__name__}; accepted: {accepted}")


def quantizers_of(model: nn.Module) -> dict[str, FakeQuantize]:
    check_module(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}
    if not found:
        raise ValueError("model: got one without quantizers; accepted: what qk.prepare(model, config) returns")
    return found


def check_shapes(model: nn.Module) -> None:
    check_module(model)
    lazy = [name for name, module in model.named_modules() if isinstance(module, QATLazy)]
    if lazy:
        raise ValueError(
            f"model: the shape of {listed(map(repr, lazy))} is not known yet; accepted: a model that has run on a "
            "batch, as by qk.calibrate(model, batches)"
        )


def call(model: nn.Module, batch: Any) -> Any:
    """Calls the model on one batch: a tensor, a tuple or list of arguments, or a dict of arguments by name.

    A model that takes one argument gets a tuple's first element, because loaders give pairs of inputs and targets.
    """
    args, kwargs = _arguments(model, batch, "batches")
    return model(*args, **kwargs)


def call_on(model: nn.Module, batch: Any, argument: str) -> Any:
    """``call`` on what the user gave as an argument of this name, which errors begin with."""
    args, kwargs = _arguments(model, batch, argument)
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:  # which loops catch, to go on with smaller batches
        raise
    except Exception as error:
        raise _failure(error, model, batch, argument) from error


def _arguments(model: nn.Module, batch: Any, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model, by position and by name, that the batch stands for."""
    if isinstance(batch, Tensor | PackedSequence):  # the latter is a tuple too
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, tuple | list) or not batch:
        raise TypeError(
            f"{name}: got {'an empty' if isinstance(batch, tuple | list) else 'a'} {type(batch).__name__}; accepted: "
            "tensors, tuples or lists of the model's arguments, or dicts of arguments by name"
        )
    most = _positional(model)
    if most == 1:
        return (batch[0],), {}
    if len(batch) > most:
        raise TypeError(
            f"{name}: got a {type(batch).__name__} of {len(batch)} elements for a model that takes {most:.0f} "
            "arguments; accepted: at most as many, or a dict of arguments by name"
        )
    return tuple(batch), {}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without wrappers that pass all arguments on, and without torch.compile."""
    inside: Any = model
    while True:
        if isinstance(inside, WRAPPERS):
            inside = inside.module
        elif hasattr(inside, "_orig_mod"):
            inside = inside._orig_mod
        else:
            return inside  # type: ignore[no-any-return]


def _positional(model: nn.Module) -> float:
    """How many arguments the model takes by position."""
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return math.inf
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


@contextlib.contextmanager
def quantizers_replaced(model: nn.Module, fn: Callable[[FakeQuantize, Tensor], Tensor]) -> Iterator[None]:
    """Inside, every quantizer computes ``fn(quantizer, x)``, and what torch.compile compiled runs as it was before."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    own = {quantizer: vars(quantizer)["forward"] for quantizer in quantizers if "forward" in vars(quantizer)}
    for quantizer in quantizers:
        quantizer.forward = lambda x, quantizer=quantizer: fn(quantizer, x)  # type: ignore[method-assign, misc]
    try:
        with uncompiled():
            yield
    finally:
        for quantizer in quantizers:
            del quantizer.forward
        for quantizer, forward in own.items():
            quantizer.forward = forward  # type: ignore[method-assign]


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Inside, what torch.compile compiled runs as it was before."""
    compiles = "torch._dynamo" in sys.modules  # who compiles has imported it; to import it takes a second
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()  # type: ignore[no-any-return]
