"""Losses of what a prepared model computes, against the float model, another model, or any target."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.qat_layer import QATLayer
from ..nn.quantizer_rules import nearest
from .calibrate import call, check_shapes, quantizers_of, quantizers_replaced, tensors_in, uncompiled
from .fold import BatchNorm, eval_mode
from .model_losses import total, wide
from .spec import listed
from .where import Where, chosen

MEASURES = ("kl", "mse")


def divergence(
    output: Tensor, target: Tensor, *, measure: str = "kl", temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """How far the output is from the target, which gets no gradient.

    Args:
        output, target: of equal shapes, floating.
        measure: "kl": KL(softmax(target/T) || softmax(output/T))·T², summed over the classes and averaged over all else
            (arXiv 1503.02531). "mse": the mean of (output − target)².
        temperature: T; "mse" has none.
        dim: the dim of the classes, for "kl": −1 for [B, classes] and [B, tokens, classes], 1 for images of classes.

    Raises:
        ValueError: the shapes differ, measure is another word, or temperature is not positive.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"target: got shape {list(target.shape)}; accepted: {list(output.shape)}, that of the model's output"
        )
    check_divergence(measure, temperature)
    output, target = wide(output), wide(target.detach())
    if measure == "mse":
        return F.mse_loss(output, target)
    output, target = (output / temperature).log_softmax(dim), (target / temperature).log_softmax(dim)
    rows = max(output.numel() // max(output.shape[dim], 1), 1)
    return F.kl_div(output, target, reduction="sum", log_target=True) * (temperature**2 / rows)


def consistency(
    model: nn.Module, inputs: Any, output: Any, *, measure: str = "kl", temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """How far quantization takes the output: ``divergence`` from that of the same weights without quantization.

    The forward pass without quantization has no gradient. It runs in eval mode, so without dropout, except that a
    BatchNorm in training mode uses the batch's statistics and keeps none. Compiled models run it uncompiled.

    Args:
        model: from ``prepare``.
        inputs: what the model was called on: a tensor, a tuple of arguments or a dict of them by name, as in
            ``calibrate``.
        output: what it returned, with its gradient: a tensor, or a tuple, list or dict whose first floating tensor
            counts.
        measure, temperature, dim: as in ``divergence``.

    Raises:
        ValueError: the model has no quantizers; or as ``divergence``.
    """
    check_shapes(model)
    quantizers_of(model)
    with torch.no_grad(), undisturbed(model), quantizers_replaced(model, lambda _, x: x):
        target = call(model, inputs)
    options: dict[str, Any] = {"measure": measure, "temperature": temperature, "dim": dim}
    return divergence(_first(output, "output"), _first(target, "output"), **options)


def distillation(
    inputs: Any,
    output: Any,
    *,
    teacher: Callable[..., Any],
    measure: str = "kl",
    temperature: float = 1.0,
    dim: int = -1,
) -> Tensor:
    """``divergence`` from what a teacher returns for the same inputs (arXiv 1503.02531).

    Args:
        inputs, output: as in ``consistency``.
        teacher: a module, which runs in eval mode and is as before afterwards, or a function; no gradient.
        measure, temperature, dim: as in ``divergence``.

    Raises:
        ValueError: the teacher's output has another shape; or as ``divergence``.
    """
    is_module = isinstance(teacher, nn.Module)
    with torch.no_grad(), eval_mode(teacher) if is_module else contextlib.nullcontext():  # type: ignore[arg-type]
        target = call(teacher, inputs) if is_module else teacher(inputs)  # type: ignore[arg-type]
    output, target = _first(output, "output"), _first(target, "teacher's output")
    if output.shape != target.shape:
        raise ValueError(
            f"teacher: got one whose output has shape {list(target.shape)}; accepted: {list(output.shape)}, that of "
            "the model's output"
        )
    return divergence(output, target, measure=measure, temperature=temperature, dim=dim)


def layer_outputs(model: nn.Module, inputs: Any, *, where: Where = "*") -> Tensor:
    """How far layers are from the float model: the mean over their outputs of Σ (y − f)² / Σ f².

    y is what the quantized model computes, from quantized inputs; f what the same weights compute without quantization
    (block reconstruction, as in BRECQ, arXiv 2102.05426). Both forward passes are run here, y's with a gradient, in the
    modes of ``consistency``, and uncompiled. An output whose shape differs, as behind a routing that chose otherwise,
    is left out.

    Args:
        model: from ``prepare``.
        inputs: as in ``consistency``.
        where: a glob, or a list of globs, on names of modules, such as ``"blocks.?"``. "*": all layers with quantizers.

    Raises:
        ValueError: the model has no quantizers, or where matches no module that the model calls.
    """
    check_shapes(model)
    quantizers_of(model)
    layers = chosen_layers(model, where)
    found: dict[nn.Module, list[Tensor]] = {}

    def record(module: nn.Module, _: Any, result: Any) -> None:
        if (tensor := _floating(result)) is not None:
            found.setdefault(module, []).append(tensor)

    hooks = [module.register_forward_hook(record) for module in layers.values()]
    try:
        with undisturbed(model):
            with torch.no_grad(), quantizers_replaced(model, lambda _, x: x):
                call(model, inputs)
            floats, found = found, {}
            with uncompiled():
                call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(y, f) for module, ys in found.items() for y, f in zip(ys, floats.get(module, []), strict=False)]
    if not pairs:
        raise ValueError(f"where: got {where!r}, but the model calls none of {listed(layers)} on these inputs")
    errors = [
        (wide(y) - wide(f)).square().sum() / wide(f).square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        for y, f in pairs
        if y.shape == f.shape
    ]
    return total(errors) / max(len(errors), 1)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, except that BatchNorms in training mode go on using the batch's statistics; they keep none."""
    norms = [norm for norm in model.modules() if isinstance(norm, BatchNorm) and norm.training]
    tracking = [norm.track_running_stats for norm in norms]
    try:
        with eval_mode(model):
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
            yield
    finally:
        for norm, tracks in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracks


def chosen_layers(model: nn.Module, where: Where = "*") -> dict[str, nn.Module]:
    kinds = QATLayer if where == "*" else nn.Module
    named = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: named[name] for name in chosen(where, named, "modules")}


def _floating(value: Any) -> Tensor | None:
    return next((t for t in tensors_in(value) if t.is_floating_point()), None)


def _first(value: Any, name: str) -> Tensor:
    found = _floating(value)
    if found is None:
        raise ValueError(f"{name}: got a {type(value).__name__} without a floating tensor; accepted: one with some")
    return found


def check_divergence(measure: str, temperature: float) -> None:
    if measure not in MEASURES:
        raise ValueError(
            f"measure: got {measure!r}; accepted: {', '.join(map(repr, MEASURES))}{nearest(measure, MEASURES)}"
        )
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature!r}; accepted: a positive number")
