"""prepare: float layers become QAT layers, in a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat import QATConv2d, QATLinear
from .config import QUANTIZABLE, QConfig

QAT_CLASS: dict[type[nn.Module], type[QATLinear] | type[QATConv2d]] = {nn.Linear: QATLinear, nn.Conv2d: QATConv2d}


def prepare(model: nn.Module, config: QConfig | None = None) -> nn.Module:
    """A copy of ``model`` whose Linear and Conv2d layers train with fake quantization.

    Parameters keep their names. Weight quantizers start from the weights; input quantizers of kind "lsq" and "minmax"
    need ``calibrate`` before the first forward pass. Subclasses of Linear and Conv2d have a forward of their own and
    stay in float. ``model`` itself is never changed.

    Raises:
        ValueError: nothing to quantize, weights that are not finite, or a spec that a layer cannot take (named).
    """
    config = QConfig() if config is None else config
    if any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ValueError("model: got one that is prepared already; accepted: a float model")
    layers = {name: module for name, module in model.named_modules() if type(module) in QUANTIZABLE}
    config.warn_of_idle_rules(layers)
    chosen = {name: specs for name, module in layers.items() if any(specs := config.specs(name, module))}
    if not chosen:
        raise ValueError(
            "model: holds no layer that config selects; accepted: a model with Linear or Conv2d layers that the rules "
            "do not leave in float"
        )
    prepared = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for name, (weight_spec, input_spec) in chosen.items():
        layer = prepared.get_submodule(name)
        if not bool(layer.weight.isfinite().all()):  # type: ignore[union-attr, operator]
            raise ValueError(f"model: the weight of {name!r} holds NaN or infinity; accepted: finite weights")
        try:
            weight = None if weight_spec is None else weight_spec.for_weight(layer)
            input = None if input_spec is None else input_spec.for_input(layer)
        except ValueError as error:
            raise ValueError(f"config, layer {name!r}: {error}") from None
        if weight is not None and weight.quantizer != "dynamic":
            weight.to(layer.weight.device).start(layer.weight)  # type: ignore[union-attr, arg-type]
        for quantizer, kind in ((weight, "weight"), (input, "input")):
            if quantizer is not None:
                quantizer.name = f"{name}.{kind}_fake_quant".removeprefix(".")
        made[layer] = QAT_CLASS[type(layer)].from_float(layer, weight=weight, input=input)  # type: ignore[arg-type]
    return replace_modules(prepared, made.get)


def replace_modules(model: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Puts ``substitute(module)`` for each module where it is not None, under all its names; returns the root."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            new = None if child is None else substitute(child)
            if new is not None:
                parent._modules[name] = new
    root = substitute(model)
    return model if root is None else root
