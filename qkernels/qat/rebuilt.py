"""Makes the layers of a description (described.py) in a float model that has no memory yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.int8_stateful import Int8Stateful, weight_names
from ..nn.integer_attention import PROJECTIONS, IntegerMultiheadAttention
from ..nn.last_result import LastResult
from ..nn.own_forward import QATForward, Trial, with_forward_of
from ..nn.qat_attention import QATMultiheadAttention, projection_weights
from ..nn.qat_classes import qat_class_of
from ..nn.qat_layer import QATLayer, bake_weight, class_without_parametrizations
from ..nn.qat_lora import QATAdapted, base_class, has_adapters
from ..nn.qat_sequential import join
from ..nn.quantized import QuantizedInputLayer, QuantizedLayer
from ..nn.quantized_parameters import QATParameters
from ..nn.replacing import take_over
from .batch_norm import freeze_as_named
from .config_json import granularity_of
from .convert import BURNT_IN, identity_for, own_names
from .described import COMPOSITES, FLOAT, INTEGER_LAYERS, QAT_LAYERS, Description, describe, float_name
from .equal_ranges import send_ranges
from .prepare import FUSED_PATHS, SWITCHED_OFF
from .spec import listed
from .states import check_state
from .traced_forward import TracedForward

OWN = (QuantizedLayer, QATLayer, *COMPOSITES)
CLASSES = {kind.__name__: kind for kind in INTEGER_LAYERS}
OF_PARTS = {kind.__name__: kind for kind in COMPOSITES}
# Arguments of layers on integers that say how the weight is quantized; the others are those of the float layer.
OF_CODES = {"weight_bits", "act_bits", "group_size", "symmetric", "minimum", "scale_dtype", "bias"}


class OtherModelError(ValueError):
    """The model is not the one that was described."""


def rebuild(model: nn.Module, found: Description) -> nn.Module:
    """Replaces layers of ``model``, a float model on the meta device, in place; returns the model's root.

    Raises:
        OtherModelError: names, classes or settings of modules are not those of the described model.
    """
    freeze_as_named(model, {**found["modules"], **found["folded"]})
    refuse([*_unknown_layers(found), *_other_modules(model, found)])
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    build = _Builder(found)
    for name in sorted(found["layers"], key=lambda name: name.count(".") + bool(name)):
        module = model.get_submodule(name)
        with torch.device("meta"):
            model = _put(model, names.get(module, [name]), build.layer(name, module))
    for name in found["folded"]:
        norm = model.get_submodule(name)
        model = _put(model, names[norm], identity_for(norm))
    for module in model.modules():
        if isinstance(module, Int8Stateful):
            module.pack_for_steps()
    build.tie(model)
    _switch_off(model, found["switched_off"])
    if found["prepared"]:
        join(model)
    for name in found["prepared"]:
        prepared = model.get_submodule(name)
        if send_ranges not in prepared._forward_hooks.values():
            prepared.register_forward_hook(send_ranges)
            prepared.register_load_state_dict_pre_hook(check_state)
    if not found["prepared"]:
        model.register_load_state_dict_pre_hook(check_state)  # as convert does
    refuse([*build.differences, *_differences(describe(model), found)])
    return model


def refuse(differences: list[str]) -> None:
    if differences:
        raise OtherModelError(listed(differences, "; "))


def _unknown_layers(found: Description) -> Iterator[str]:
    known = {FLOAT, *OF_PARTS, *CLASSES, *(kind.__name__ for kind in QAT_LAYERS)}
    for name, entry in found["layers"].items():
        if entry["class"] not in known:
            yield f"the module {name!r} is a {entry['class']} in the file, which this version does not know"


def _other_modules(model: nn.Module, found: Description) -> Iterator[str]:
    """What tells, before anything is made, that another model was described."""
    held = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, FakeQuantize)
    }
    layers, folded = found["layers"], found["folded"]
    for name, kind in found["modules"].items():
        first = found["same"].get(name, name)
        if name not in held:
            if layers.get(name.rpartition(".")[0], {}).get("class") not in OF_PARTS:
                yield f"the module {name!r} ({kind}) is in the file and not in the model"
            continue
        module, own = held[name], type(held[name]).__name__
        if own == kind and first not in folded and isinstance(module, OWN):
            continue  # a layer of this package that the model has itself
        wanted, classes = kind.removeprefix("QAT") if kind == "QATSequential" else kind, [own]
        if first in layers:
            wanted, classes = layers[first]["of"], _float_classes(module)
        elif first in folded:
            wanted = folded[first]
        if wanted not in classes:
            yield f"the module {name!r} is a {wanted} in the file, and a {own} in the model"
    for name, module in held.items():
        if name not in found["modules"] and not _is_left_out(name, layers, held):
            yield f"the module {name!r} ({type(module).__name__}) is in the model and not in the file"


def _is_left_out(name: str, layers: Description, held: dict[str, nn.Module]) -> bool:
    """Whether the module is a part from which a layer's weight is computed, and the described layer has this weight."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        layer = ".".join(parts[:i])
        if layer in layers and (part == "parametrizations" or _is_summed(held[layer], layers[layer])):
            return True
    return False


def _float_classes(module: nn.Module) -> list[str]:
    """The name of the module's class, whatever computes its weight, and that of the layer to which adapters add."""
    kinds = [class_without_parametrizations(module)]
    if has_adapters(module) and (adapted := base_class(module)) is not None:
        kinds.append(adapted.float_class)
    return [float_name(kind) for kind in kinds]


def _differences(own: Description, found: Description) -> Iterator[str]:
    """What the model that was made is otherwise than the described one."""
    for name in dict.fromkeys((*found["modules"], *own["modules"])):
        there, here = (each["modules"].get(name, "module that is not there") for each in (found, own))
        if there != here:
            yield f"the module {name!r} is a {there} in the file, and a {here} in the model"
    for name in dict.fromkeys((*found["same"], *own["same"])):
        there, here = (
            f"{each['same'][name]!r} itself" if name in each["same"] else "a module of its own" for each in (found, own)
        )
        if there != here:
            yield f"the module {name!r} is {there} in the file, and {here} in the model"
    for key in ("layers", "quantizers"):
        for name, made in own[key].items():
            wanted = found[key].get(name, {})
            for part, here in made.items():  # a newer file may say more
                if _listed(here) != wanted.get(part):
                    there = wanted.get(part)
                    yield f"the module {name!r} has {part}={there} in the file, and {part}={here} in the model"


def _put(root: nn.Module, names: list[str], new: nn.Module) -> nn.Module:
    for name in names:
        if not name:
            return new
        parent, _, last = name.rpartition(".")
        root.get_submodule(parent)._modules[last] = new
    return root


def _switch_off(model: nn.Module, names: list[str]) -> None:
    for name in names:
        module = model.get_submodule(name)
        for kind, switch in FUSED_PATHS.items():
            if isinstance(module, kind):
                value = getattr(module, switch)
                module.__dict__.setdefault(SWITCHED_OFF, value)
                setattr(module, switch, type(value)(0))


class _Builder:
    """Makes layers one by one, and remembers the quantizers, which several layers may share."""

    def __init__(self, found: Description) -> None:
        self.found = found
        self.quantizers: dict[str, FakeQuantize] = {}
        self.differences: list[str] = []
        self.is_converted = not found["prepared"]

    def layer(self, name: str, module: nn.Module) -> nn.Module:
        """What stands for ``module``, the float layer of this name."""
        entry = self.found["layers"][name]
        if isinstance(module, OWN):
            return module  # the model has it itself; what is otherwise than in the file is found in the end
        if entry["class"] in OF_PARTS:
            made = self._composite(name, module, entry)
        elif entry["class"] in CLASSES:
            made = self._integer_layer(name, module, entry)
        else:
            made = self._qat_layer(name, module, entry)
        if BURNT_IN in entry:
            made.__dict__[BURNT_IN] = entry[BURNT_IN]
        return made

    def tie(self, model: nn.Module) -> None:
        for name, entry in self.found["layers"].items():
            if entry.get("tied_to"):
                layer: Any = model.get_submodule(name)
                layer.tied_to = tuple(model.get_submodule(other) for other in entry["tied_to"])

    def _quantizers(self, entry: Description) -> dict[str, FakeQuantize | None]:
        return {role: self._quantizer(name) for role, name in entry["quantizers"].items()}

    def _quantizer(self, name: str) -> FakeQuantize:
        if name not in self.quantizers:
            options = dict(self.found["quantizers"][name])
            keeps_result, delta = options.pop("keeps_result"), options.pop("ewgs_delta")
            at_source = options.pop("at_source", False)
            options["granularity"] = granularity_of(options["granularity"])
            with torch.device("cpu"):  # its levels have to be computed
                quantizer = FakeQuantize(**options)
            quantizer.name, quantizer.ewgs_delta = name, delta
            quantizer.last = LastResult() if keeps_result else None
            if at_source:
                quantizer.at_source = True
            self.quantizers[name] = quantizer
        return self.quantizers[name]

    def _source(self, module: nn.Module, entry: Description, quantizers: dict[str, FakeQuantize | None]) -> Any:
        """The QAT layer of a float one; for a converted model with a plain weight, as ``convert`` leaves it."""
        if entry["class"] == "QATParameters":
            layer: Any = QATParameters.of(module, quantizers, _traced_forward(module, entry))  # type: ignore[arg-type]
        elif _is_summed(module, entry):
            layer = QATAdapted.from_float(module, **quantizers)
            layer = layer.as_sum() if self.is_converted else layer
        else:
            cls = qat_class_of(module)
            if cls is None:  # only a parameter of it was quantized
                return module
            layer = cls.from_float(module, **quantizers)
        if "trial" in entry and isinstance(layer, QATForward):
            layer.trial = Trial(**entry["trial"])  # type: ignore[assignment]
        if self.is_converted:
            bake_weight(layer)
        return layer

    def _qat_layer(self, name: str, module: nn.Module, entry: Description) -> nn.Module:
        layer = self._source(module, entry, self._quantizers(entry))
        self._bias(name, layer, entry["bias"])
        if self.is_converted and isinstance(layer, QATLayer) and layer.is_float() and entry["class"] == FLOAT:
            return layer.to_float()
        return layer  # type: ignore[no-any-return]

    def _bias(self, name: str, layer: Any, wanted: bool) -> None:
        """A BatchNorm that was folded into a convolution has given it a bias."""
        has = layer._parameters.get("bias") is not None
        if wanted and not has and self.is_converted and hasattr(layer, "out_channels"):
            layer._parameters["bias"] = nn.Parameter(
                torch.empty(layer.out_channels, dtype=layer.weight.dtype, device="meta")
            )
        elif wanted != has:
            self._differ(name, "bias", wanted, has)

    def _check_class(self, name: str, layer: nn.Module, wanted: type[nn.Module]) -> None:
        if not isinstance(layer, wanted):  # a class of that name, but of other origin
            own = f"{type(layer).__module__}.{type(layer).__name__}"
            refuse([f"the module {name!r} is a layer of torch.nn in the file, and a {own} in the model"])

    def _differ(self, name: str, what: str, there: Any, here: Any) -> None:
        self.differences.append(f"the module {name!r} has {what}={there} in the file, and {what}={here} in the model")

    def _compare(self, name: str, layer: nn.Module, settings: Description) -> None:
        for key, there in settings.items():
            here = _listed(getattr(layer, key, None))
            if here != there:
                self._differ(name, key, there, here)

    def _integer_layer(self, name: str, module: nn.Module, entry: Description) -> nn.Module:
        kind: Any = CLASSES[entry["class"]]
        source, arguments, input = self._source(module, entry, {}), entry["arguments"], entry.get("input")
        self._check_class(name, source, INTEGER_LAYERS[kind])
        self._compare(name, source, {key: value for key, value in arguments.items() if key not in OF_CODES})
        dtype = str(source.weight.dtype).removeprefix("torch.")
        if dtype != entry["dtype"]:
            self.differences.append(
                f"the module {name!r} has weights of {entry['dtype']} in the file, and of {dtype} in the model (cast "
                f"the model first, by model.to(torch.{entry['dtype']}))"
            )
        self._bias(name, source, arguments.get("bias", False))
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()
        }
        if "scale_dtype" in options:
            options["scale_dtype"] = getattr(torch, options["scale_dtype"])
        if input is not None:
            options["input"] = FakeQuantize(
                bits=input["bits"],
                granularity=granularity_of(input["granularity"]),
                symmetric=input["symmetric"],
                quantizer="dynamic" if input["scale"] == "dynamic" else "minmax",
            )
        new = kind(**options, dtype=source.weight.dtype)
        if isinstance(new, QuantizedInputLayer):
            if input is not None:
                new.quant_min, new.quant_max = input["range"]
                new.input_zero_point = torch.zeros(1, dtype=torch.int32) if input["zero_point"] else None
            if new.bias is not None and source.bias is not None:
                new.bias.requires_grad_(source.bias.requires_grad)
        if "channels_last" in entry:
            new.channels_last = entry["channels_last"]
        new.weight_elsewhere = entry["weight_elsewhere"]
        for quantizer in self._quantizers(entry).values():
            new.quantize_output(quantizer)
        made = with_forward_of(take_over(new, source, own_names(source)).eval(), source)
        if "folded" in entry:
            made.__dict__["folded"] = entry["folded"]
        return made

    def _composite(self, name: str, module: nn.Module, entry: Description) -> nn.Module:
        """Its parts are float layers here, to be replaced by their names."""
        kind: Any = OF_PARTS[entry["class"]]
        self._check_class(name, module, COMPOSITES[kind][0])
        self._compare(name, module, entry["arguments"])
        refuse(self.differences)  # other settings mean other parts and quantizers
        quantizers = self._quantizers(entry)
        source = self._source(module, entry, quantizers)
        if kind is IntegerMultiheadAttention:
            return IntegerMultiheadAttention(source, _projections(source)).eval()
        return kind(source, _products(source), quantizers).eval()  # type: ignore[no-any-return]


def _traced_forward(module: nn.Module, entry: Description) -> TracedForward | None:
    if "traced" not in entry:
        return None
    patterns = [tuple(pattern) for pattern in entry["traced"]["patterns"]]
    try:
        return TracedForward.of(module, entry["traced"]["roles"], patterns)
    except (NotImplementedError, ValueError) as error:
        raise OtherModelError(f"the forward of {type(module).__name__} is another one: {error}") from None


def _projections(layer: QATMultiheadAttention) -> dict[str, Any]:
    dtype = getattr(layer, projection_weights(layer)[0]).dtype
    bias = layer.in_proj_bias is not None
    widths = layer.embed_dim, layer.kdim, layer.vdim
    made = (nn.Linear(width, layer.embed_dim, bias, dtype=dtype) for width in widths)
    return dict(zip(PROJECTIONS, made, strict=True))


def _products(layer: nn.Module) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in weight_names(layer):
        n, k = layer._parameters[name].shape  # type: ignore[union-attr]
        bias = layer._parameters.get(name.replace("weight", "bias")) is not None
        made[name.removeprefix("weight_")] = nn.Linear(k, n, bias, dtype=layer._parameters[name].dtype)  # type: ignore[union-attr]
    return made


def _is_summed(module: nn.Module, entry: Description) -> bool:
    """Whether the module's adapters and their base were quantized as one weight."""
    return has_adapters(module) and (entry["class"] == "QATAdapted" or entry["of"] != _float_classes(module)[0])


def _listed(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value
