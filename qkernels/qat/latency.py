"""measure_latency: what each layer takes on this machine at each width, on the kernels that it converts to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..nn.qat_layer import QATLayer
from .calibrate import calibrate, progress
from .config import QConfig
from .convert import convert
from .copying import copy_of
from .repeated_batches import random_state_kept
from .sensitivity import trials_of, widths_of
from .spec import check_type
from .trials import takes

Key = TypeVar("Key")


def measure_latency(
    model: nn.Module,
    batch: Any,
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    config: QConfig | str | None = None,
    calls: int = 20,
) -> dict[str, dict[int, float]]:
    """Seconds that each layer takes with weights of each width, as ``convert`` makes it, alone, from floats to floats.

    The widths take turns, and each time is a median. In a converted model that runs as a program, layers hand codes to
    each other and cost less; differences between widths stay. Inputs keep their width: the kernels compute on int8
    codes whatever it is. Measure on a quiet machine, with the number of threads that the model is to have.

    Args:
        model: a float model, or what ``prepare`` returns; it stays as it is.
        batch: one batch, as for ``calibrate``, of the size that counts.
        bits: the widths to measure.
        config: how a float model is prepared; None for a prepared one.
        calls: how often each layer is called at each width.

    Returns:
        layer -> bits -> seconds, for ``assign(…, cost=…)``: of the layers with quantized weights that the batch
        reached.

    Raises:
        ValueError, TypeError: an argument as ``sensitivity`` takes it, or calls below 1.
    """
    widths = widths_of(bits)
    check_type("calls", calls, int, "a whole number of at least 1")
    if calls < 1:
        raise ValueError(f"calls: got {calls}; accepted: a whole number of at least 1")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
    with random_state_kept(model), torch.no_grad():
        trials = trials_of(model, [batch], [], config, None)
        names = [name for group in trials.groups if group.weights for name in group.names]
        layers: dict[str, Any] = {name: trials.model.get_submodule(name) for name in names}
        called = _calls(trials, layers)
        converted = {}
        for width in widths:
            copy = copy_of(trials.model)
            for quantizer in {
                q for layer in copy.modules() if isinstance(layer, QATLayer) for _, q in layer.quantized_weights()
            }:
                if takes(quantizer, width):
                    quantizer.set_bits(width)
            calibrate(copy, trials.batches, fallback=1.0)  # what no batch reaches needs a range to convert
            converted[width] = dict(convert(copy).named_modules())
        times: dict[str, dict[int, float]] = {}
        for name in progress(called, "measure_latency: layers", len(called)):
            taken = [w for w in widths if all(takes(q, w) for _, q in layers[name].quantized_weights())]
            times[name] = timed({width: _calling(converted[width][name], called[name]) for width in taken}, calls)
    return times


def _calls(trials: Any, layers: dict[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """The arguments of the calls of each layer."""
    called: dict[str, list[tuple[Any, Any]]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        return lambda layer, args, kwargs: called.setdefault(name, []).append((args, kwargs))

    handles = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with trials.running():
            for _ in trials.outputs():
                pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: called[name] for name in layers if name in called}


def _calling(layer: nn.Module, arguments: list[tuple[Any, Any]]) -> Callable[[], None]:
    """All these calls of the layer."""

    def call() -> None:
        for args, kwargs in arguments:
            layer(*args, **kwargs)

    return call


def timed(contestants: Mapping[Key, Callable[[], Any]], calls: int) -> dict[Key, float]:
    """The median of the seconds of each contestant; they take turns."""
    seconds: dict[Key, list[float]] = {key: [] for key in contestants}
    for round in range(-2, calls):  # the first two warm up
        for key, contestant in contestants.items():
            _wait()
            begin = time.perf_counter()
            contestant()
            _wait()
            if round >= 0:
                seconds[key].append(time.perf_counter() - begin)
    return {key: sorted(each)[len(each) // 2] for key, each in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
