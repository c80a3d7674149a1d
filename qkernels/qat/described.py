"""What tells the layers of a prepared or converted model apart from the float model's, as values that JSON knows."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from ..nn.fake_quantize import FakeQuantize
from ..nn.int4 import Int4Linear
from ..nn.int8 import Int8Convolution, Int8Linear
from ..nn.integer_attention import SETTINGS as ATTENTION
from ..nn.integer_attention import IntegerMultiheadAttention
from ..nn.integer_embedding import Int4Embedding, Int8Embedding, Int8EmbeddingBag
from ..nn.own_forward import ConvertedForward, QATForward
from ..nn.qat_classes import QAT_CLASSES
from ..nn.qat_layer import SUFFIX, QATLayer
from ..nn.qat_lazy import QATLazy
from ..nn.qat_lora import QATAdapted
from ..nn.quantized import QuantizedInputLayer, QuantizedLayer
from ..nn.quantized_parameters import QATParameters
from .config_json import plain
from .convert import BURNT_IN, FOLDED
from .equal_ranges import send_ranges
from .integer_convolution import CONVOLUTIONS
from .integer_layers import RECURRENT
from .prepare import SWITCHED_OFF

Description = dict[str, Any]

# Each layer on integers, and the float layer that it stands for.
INTEGER_LAYERS: dict[type[QuantizedLayer], type[nn.Module]] = {
    Int8Linear: nn.Linear,
    Int4Linear: nn.Linear,
    **{kind: kind.float_class for kind in CONVOLUTIONS},
    **{kind: kind.float_class for kind in (Int4Embedding, Int8Embedding, Int8EmbeddingBag)},
}
# Layers that consist of such layers under names of their own, the float layer, and what both keep of its arguments.
COMPOSITES: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
    IntegerMultiheadAttention: (nn.MultiheadAttention, ATTENTION),
    **{kind: (kind.float_class, kind.settings) for kind in RECURRENT},
}
QAT_LAYERS: tuple[type[QATLayer], ...] = (QATAdapted, QATParameters, *QAT_CLASSES)
FLOAT = "float"  # the class of a float layer whose parameters hold quantized values


def describe(model: nn.Module) -> Description:
    """All that has to be known of ``model``, beside its tensors, to make it of the float model again.

    Names are those of ``named_modules``:

    - ``modules``: name -> class of every module but quantizers. ``same``: further name -> first name of a module.
    - ``layers``: name -> what the layer is, for each layer that is not the float one or has other values.
    - ``quantizers``: name -> arguments of FakeQuantize.
    - ``folded``: name -> class of a BatchNorm that an Identity replaces.
    - ``switched_off``: modules of torch whose fused path is switched off.
    - ``prepared``: modules that ``prepare`` returned.

    Raises:
        ValueError: a layer that cannot be described; the text names it.
    """
    names = {module: name for name, module in model.named_modules()}
    found: Description = {"modules": {}, "same": {}, "layers": {}, "quantizers": {}, "folded": {}}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, FakeQuantize):
            found["modules"][name] = type(module).__name__
        if names[module] != name:
            found["same"][name] = names[module]
    for module, name in names.items():
        if isinstance(module, FakeQuantize):
            continue
        entry = _entry(name, module, names)
        if entry is not None:
            found["layers"][name] = entry
        if FOLDED in vars(module):
            found["folded"][name] = vars(module)[FOLDED]
        for quantizer, shape in _quantizers(module):
            found["quantizers"][names[quantizer]] = _quantizer(quantizer, shape)
    found["switched_off"] = [name for module, name in names.items() if SWITCHED_OFF in vars(module)]
    found["prepared"] = [name for module, name in names.items() if send_ranges in module._forward_hooks.values()]
    return found


def float_name(kind: type[nn.Module]) -> str:
    """How files call a float class: an attention's out_proj counts as the Linear that it is."""
    return "Linear" if kind is NonDynamicallyQuantizableLinear else kind.__name__


def _entry(name: str, module: nn.Module, names: dict[nn.Module, str]) -> Description | None:
    if isinstance(module, QuantizedLayer):
        entry = _integer_layer(name, module, names)
    elif isinstance(module, tuple(COMPOSITES)):
        entry = _composite(module)
    elif isinstance(module, QATLayer):
        entry = _qat_layer(name, module)
    elif BURNT_IN in vars(module):
        entry = {"class": FLOAT, "of": float_name(type(module)), "bias": _has_bias(module)}
    else:
        return None
    if BURNT_IN in vars(module):
        entry[BURNT_IN] = vars(module)[BURNT_IN]
    entry["quantizers"] = {
        key.removesuffix(SUFFIX): names[child]
        for key, child in module._modules.items()
        if key.endswith(SUFFIX) and isinstance(child, FakeQuantize)
    }
    return entry


def _integer_layer(name: str, layer: QuantizedLayer, names: dict[nn.Module, str]) -> Description:
    own: Any = layer if isinstance(layer, ConvertedForward) else None  # the class of the user's forward
    kind: Any = type(layer) if own is None else own.base_class
    if kind not in INTEGER_LAYERS:
        known = ", ".join(each.__name__ for each in INTEGER_LAYERS)
        raise ValueError(f"model: the layer {name!r} is a {kind.__name__}, which save does not know; accepted: {known}")
    entry: Description = {"class": kind.__name__, "of": float_name(INTEGER_LAYERS[kind])}
    entry["dtype"], entry["arguments"] = _dtype(layer.dtype), _arguments(layer, kind)
    entry["tied_to"] = [names[other] for other in layer.tied_to if other in names]
    entry["weight_elsewhere"] = layer.weight_elsewhere
    if isinstance(layer, QuantizedInputLayer):
        entry["input"] = _input(layer)
    if isinstance(layer, Int8Convolution) and len(layer.kernel_size) > 1:
        entry["channels_last"] = layer.channels_last
    if own is not None:
        entry.update(of=own.own_class.__name__, trial=dataclasses.asdict(own.trial), folded=own.folded)
    return entry


def _composite(layer: nn.Module) -> Description:
    kind = next(kind for kind in COMPOSITES if isinstance(layer, kind))
    of, settings = COMPOSITES[kind]
    return {
        "class": kind.__name__,
        "of": float_name(of),
        "arguments": {name: getattr(layer, name) for name in settings},
    }


def _arguments(layer: Any, kind: type[nn.Module]) -> Description:
    """The arguments from which the layer's class makes a layer without weights; a layer keeps them as attributes."""
    offset = getattr(layer, "offset", None if layer.zero_point is None else "zero_point")
    found: Description = {"symmetric": offset is None, "minimum": offset == "minimum"}
    found["bias"] = _has_bias(layer)
    found["scale_dtype"] = layer.scale_dtype if hasattr(layer, "scale_dtype") else layer.scale.dtype
    kinds: tuple[Any, ...] = (kind.float_class, kind) if issubclass(kind, Int8Convolution) else (kind,)
    parameters = [p for each in kinds for p in inspect.signature(each.__init__).parameters.values()]
    given = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [name for name in given if name not in ("self", "input", "dtype", "device")]
    values = {name: found[name] if name in found else getattr(layer, name) for name in names}
    return {name: _dtype(value) if isinstance(value, torch.dtype) else value for name, value in values.items()}


def _input(layer: QuantizedInputLayer) -> Description | None:
    """How the layer quantizes its input; None: it does not."""
    if layer.input_bits is None:
        return None
    return {
        "bits": layer.input_bits,
        "granularity": plain(layer.input_granularity),
        "symmetric": layer.input_symmetric,
        "range": [layer.quant_min, layer.quant_max],
        "scale": "dynamic" if layer.input_scale is None else "static",
        "zero_point": layer.input_zero_point is not None,
    }


def _qat_layer(name: str, layer: QATLayer) -> Description:
    if isinstance(layer, QATLazy):
        raise ValueError(
            f"model: the layer {name!r} has no shape yet; accepted: layers that know theirs, so call the model once"
        )
    kind = next(kind for kind in QAT_LAYERS if isinstance(layer, kind))
    of = type(layer).float_type
    of = of.__bases__[0] if parametrize.is_parametrized(layer) else of  # torch makes a class for each such layer
    entry: Description = {"class": kind.__name__, "of": float_name(of), "bias": _has_bias(layer)}
    if isinstance(layer, QATForward):
        entry["trial"] = dataclasses.asdict(layer.trial)
    if isinstance(layer, QATParameters) and layer.between:
        traced = layer.traced_forward
        entry["traced"] = {"roles": dict(traced.roles), "patterns": [list(pattern) for pattern in traced.patterns]}
    return entry


def _has_bias(layer: nn.Module) -> bool:
    return layer._parameters.get("bias") is not None


@torch.no_grad()
def _quantizers(module: nn.Module) -> list[tuple[FakeQuantize, list[int] | None]]:
    """The quantizers that a module holds; those of weights with the shape of the weight."""
    shapes: dict[nn.Module, list[int]] = {}
    if isinstance(module, QATLayer):
        for parameter, quantizer in module.quantized_weights():
            shapes[quantizer] = list(module.unquantized(parameter).shape)
    return [(child, shapes.get(child)) for child in module._modules.values() if isinstance(child, FakeQuantize)]


def _quantizer(quantizer: FakeQuantize, shape: list[int] | None) -> Description:
    at_source = {"at_source": True} if quantizer.at_source else {}
    return {
        **at_source,
        "quantizer": quantizer.quantizer,
        "bits": quantizer.bits,
        "granularity": plain(quantizer.granularity),
        "symmetric": quantizer.symmetric,
        "straight_through": quantizer.straight_through,
        "feature_dims": quantizer.feature_dims,
        "shape": shape,
        "ewgs_delta": quantizer.ewgs_delta,
        "keeps_result": quantizer.last is not None,
    }


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
