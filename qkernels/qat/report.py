"""report: what quantization does to each layer, and how many bytes the whole model takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..nn.fake_quantize import FakeQuantize
from ..nn.int4 import Int4Linear
from ..nn.int8 import Int8Convolution, Int8Linear
from ..nn.int8_cells import Int8Cell
from ..nn.int8_stateful import Int8Stateful, weight_names
from ..nn.integer_attention import IntegerMultiheadAttention
from ..nn.integer_embedding import IntegerEmbedding
from ..nn.qat_attention import projection_weights
from ..nn.qat_classes import qat_class_of
from ..nn.qat_layer import QATLayer, effective_weight
from ..nn.quantized_parameters import QATParameters
from .adapters import Adapters, find_adapters
from .calibrate import check_module, quantizers_replaced
from .convert import BURNT_IN, convert
from .copying import copy_of, whole
from .fold import BatchNorm, eval_mode, factor_and_bias, find_folds
from .fuse import fused_parts, unfused
from .integer_convolution import times
from .measures import clipped_share, sqnr
from .prepare import UNTRACED
from .recorded import Record, off_fused_paths, submodule
from .report_table import LayerRow, Report
from .selection import float_reason, no_integers, unsupported
from .weight_histograms import WeightHistogram, of_converted, of_prepared
from .weight_readers import WeightReaders, find_weight_readers

PREPARED = "what qk.prepare or qk.convert returns"
CONVERTED_LAYERS = (Int8Linear, Int8Convolution, Int4Linear, IntegerEmbedding)


def report(
    model: nn.Module, example: Any = None, *, float_model: nn.Module | None = None, accuracy: float | None = None
) -> Report:
    """Says what quantization does to ``model`` (prepared or converted), layer by layer and in total.

    Every layer with weights has a row; a layer that stays float has a note with the reason. For the sizes of a prepared
    model, ``report`` converts a copy of it.

    Args:
        model: from ``prepare`` or ``convert``; it runs in eval mode and stays unchanged.
        example: one batch as for ``calibrate``. With it the report gives the clipped share of each layer's input and
            the SQNR of its output against float_model, both for the layer's first call. A prepared model without
            float_model is compared with itself unquantized. The notes name quantized layers that nothing called.
        float_model: the model before ``prepare``. A converted model needs it for the SQNR of its weights.
        accuracy: any number measured elsewhere, shown with the rest.

    Returns:
        A ``Report``: ``print`` shows its table, ``html`` writes a page with plots, ``to_dict`` gives a dict that can be
        written as JSON.

    Raises:
        ValueError: a model that is neither prepared nor converted.
        TypeError: a model is not a module.
        RuntimeError, TypeError, ValueError: what a model raises on the example, with its layer.
    """
    check_module(model, PREPARED)
    if float_model is not None:
        check_module(float_model, "the model before qk.prepare, or None", "float_model")
    model, float_model = whole(model), None if float_model is None else whole(float_model)
    layers = dict(_layers(model))
    if not any(_is_quantized(layer) for layer in layers.values()):
        raise ValueError(f"model: got a float model; accepted: {PREPARED}")
    folds = find_folds(model)
    float_folds = {} if float_model is None else find_folds(float_model).batch_norm_of
    # A converted model no longer has its folded BatchNorms; the float model shows where they were.
    folded = {
        conv: norm
        for conv, norm in float_folds.items()
        if conv in layers and not isinstance(submodule(model, norm), BatchNorm)
    }
    readers, adapters = find_weight_readers(model), find_adapters(model)
    rows, notes = [], {}
    histograms: dict[str, WeightHistogram] = {}
    # In training mode, to read a weight under spectral_norm would change it.
    with eval_mode(model), eval_mode(model if float_model is None else float_model):
        for name, layer in layers.items():
            row, note = _row(name, layer), _note(name, layer, readers, adapters)
            parts = _on_integers(layer)
            weight = _float_weight(submodule(float_model, name)) if parts and float_model is not None else None
            if weight is not None and float_model is not None:
                if name in folded:
                    factor, _ = factor_and_bias(float_model.get_submodule(folded[name]), None)
                    weight = times(layer, weight, factor.float())
                row.weight_sqnr = sqnr(weight.flatten(), torch.cat([part.dequantize().flatten() for part in parts]))
            histogram = of_converted(parts, weight) if parts else of_prepared(layer)
            if histogram is not None:
                histograms[name] = histogram
            rows.append(row)
            if note:
                notes[name] = note
    notes.update({**_weights_of_two_quantizers(layers), **notes})
    notes.update({name: f"BatchNorm stays a float layer: {reason}" for name, reason in folds.kept.items()})
    for name, module in model.named_modules():
        if UNTRACED in vars(module):
            notes.setdefault(name, f"any sums and pools in its forward stay in float: {vars(module)[UNTRACED]}")
    if example is not None:
        _run_example(model, example, float_model, layers, folded, rows, notes)
    prepared = any(isinstance(module, FakeQuantize) for module in model.modules())
    stored = model
    if prepared:
        try:
            stored = _converted(model)
        except ValueError as error:  # somebody changed layers after prepare
            notes[""] = f"sizes are those of the float model, as this one does not convert: {error}"
    for name, reason in unfused(stored).items():
        notes.setdefault(
            name,
            f"its layers hand floats to each other: {reason}; a module inside that torch.fx can trace, such as an "
            "nn.Sequential of them, hands on codes",
        )
    for name, fused in fused_parts(stored).items():
        if fused.refused is not None:
            notes.setdefault(name, f"its own forward ran, layer by layer, as a program refused a call: {fused.refused}")
    quantized_bytes = _weigh(stored, rows, "quantized_bytes", _names_of_quantizers(model) if stored is model else ())
    source = model if float_model is None else float_model
    float_bytes = _weigh(source, rows, "float_bytes", _names_of_quantizers(source))
    if float_model is None:
        float_bytes += sum(_as_float(row, layers[row.name]) for row in rows)
    return Report(rows, float_bytes, quantized_bytes, notes, accuracy, histograms)


def _layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Quantized layers, Linear and Conv2d, and modules that hold another float parameter of two or more dims."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize) or name.startswith(inside):
            continue
        parametrized = parametrize.is_parametrized(module)
        prefix = f"{name}." if name else ""
        if parametrized or isinstance(module, QATLayer):  # the row of the layer counts its parametrizations
            inside += (f"{prefix}parametrizations.",)
        inside += tuple(f"{prefix}{part}" for part in _parts(module))
        if (
            _is_quantized(module)
            or qat_class_of(module) is not None
            or parametrized
            or any(p is not None and p.dim() > 1 and p.is_floating_point() for p in module._parameters.values())
        ):
            yield name, module


def _is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, QATLayer) or bool(_on_integers(layer)) or hasattr(layer, BURNT_IN)


def _on_integers(layer: nn.Module | None) -> Sequence[Any]:
    """The layers on integers that a row of a converted model stands for; none: the row is of another layer."""
    if isinstance(layer, CONVERTED_LAYERS):
        return (layer,)
    return () if layer is None else tuple(_parts(layer).values())


def _parts(layer: nn.Module) -> dict[str, Any]:
    """The layers on integers that a converted layer consists of, by their names in it."""
    return layer.parts if isinstance(layer, IntegerMultiheadAttention | Int8Stateful) else {}


def _float_weight(layer: nn.Module | None) -> Tensor | None:
    """The weight of a float layer, of which attention and recurrent layers have several."""
    names: Sequence[str] = ("weight",)
    if isinstance(layer, nn.MultiheadAttention):
        names = projection_weights(layer)
    elif isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        names = weight_names(layer)
    if layer is None or not isinstance(getattr(layer, names[0], None), Tensor):
        return None
    weights = [effective_weight(layer, name).detach().float() for name in names]
    return weights[0] if len(weights) == 1 else torch.cat([weight.flatten() for weight in weights])


def _row(name: str, layer: nn.Module) -> LayerRow:
    kind = type(layer).__name__
    parts = _on_integers(layer)
    if parts:
        return LayerRow(name, kind, min(part.weight_bits for part in parts), getattr(parts[0], "input_bits", None))
    if not isinstance(layer, QATLayer):
        return LayerRow(name, kind, None, None)
    input = _input_quantizer(layer)
    weights = [(effective_weight(layer, key).detach(), quantizer) for key, quantizer in layer.quantized_weights()]
    row = LayerRow(name, kind, None, None if input is None else input.bits)
    if weights:
        row.weight_bits = min(quantizer.bits for _, quantizer in weights)
    if weights and all(quantizer.is_calibrated and not weight.is_meta for weight, quantizer in weights):
        flat = [(weight.flatten(), _eval(quantizer, weight).flatten()) for weight, quantizer in weights]
        row.weight_sqnr = sqnr(torch.cat([weight for weight, _ in flat]), torch.cat([values for _, values in flat]))
        if all(quantizer.integer_codes for _, quantizer in weights):
            clipped = sum(weight.numel() * _clipped_weights(weight, quantizer) for weight, quantizer in weights)
            row.weight_clipped = clipped / max(sum(weight.numel() for weight, _ in weights), 1)
    return row


def _input_quantizer(layer: QATLayer) -> FakeQuantize | None:
    """The quantizer of the layer's first input."""
    found = (quantizer for _, role, quantizer in layer.own_quantizers() if role.kind in ("input", "attention"))
    return layer.quantizer_of("input") or next(found, None)


def _has_one_scale(layer: nn.Module) -> bool:
    """Whether a fixed scale quantizes the input of every call. Cells are there to be called more than once."""
    if isinstance(layer, Int8Cell | nn.RNNCellBase):
        return False
    if parts := _on_integers(layer):
        return getattr(parts[0], "input_scale", None) is not None
    quantizer = _input_quantizer(layer) if isinstance(layer, QATLayer) else None
    return quantizer is not None and quantizer.quantizer != "dynamic"


def _clipped_weights(weight: Tensor, quantizer: FakeQuantize) -> float:
    _, scale, zero_point = quantizer.quantize(weight)
    return clipped_share(weight, scale, zero_point, quantizer.quant_min, quantizer.quant_max)


def _note(name: str, layer: nn.Module, readers: WeightReaders, adapters: Adapters) -> str | None:
    if name in readers.too and _is_quantized(layer):
        return f"{readers.too[name]} also reads its weight, and gets it in float"
    if hasattr(layer, BURNT_IN):
        return f"float weights that hold quantized values: {getattr(layer, BURNT_IN)}"
    if isinstance(layer, QATParameters) and layer.between:
        return f"its own forward passes tensors through quantizers: {', '.join(layer.between)}"
    if isinstance(layer, QATLayer):
        if not any(layer.quantized_weights()):
            weightless = all(role.kind != "weight" for role in type(layer).roles(layer).values())
            return "computes in float" if weightless else "not convertible: its weight is not quantized"
        reason = no_integers(layer)
        return None if reason is None else f"converts to float weights that hold the quantized values: {reason}"
    if _is_quantized(layer):
        return None
    holder = next((holder for holder, base in adapters.sums.items() if base == name), adapters.parts.get(name))
    if holder in adapters.sums:
        return f"a part of {holder!r}, the sum of whose weights is quantized"
    if holder is not None:
        return f"weight stays float: it is an adapter of {holder!r}"
    cls = qat_class_of(layer)
    if cls is not None:
        reason = float_reason(name, layer, cls, readers)[0] or "no rule or default of the config selects it"
        return f"weight stays float: {reason}"
    return f"weight stays float: {unsupported(layer)}"


def _weights_of_two_quantizers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Notes on layers whose weight an earlier one has too, under another quantizer."""
    first: dict[int, tuple[str, int]] = {}
    notes = {}
    for name, layer in layers.items():
        own = dict(layer.named_parameters(recurse=False))  # to read a computed one may change what it is computed from
        for parameter, quantizer in layer.quantized_weights() if isinstance(layer, QATLayer) else ():
            if parameter not in own:
                continue
            other, known = first.setdefault(id(own[parameter]), (name, id(quantizer)))
            if known != id(quantizer):
                notes[name] = (
                    f"its {parameter} is also that of {other!r}, under another quantizer, so the file holds codes of "
                    "both; the same spec for both makes them one"
                )
    return notes


def _converted(model: nn.Module) -> nn.Module:
    """The converted model, for its sizes: quantizers that are not calibrated get an arbitrary range."""
    if not all(module.is_calibrated for module in model.modules() if isinstance(module, FakeQuantize)):
        model = copy_of(model)
        for module in model.modules():
            if isinstance(module, FakeQuantize) and not module.is_calibrated:
                ones = torch.ones_like(module.scale)
                module.set_range(-ones, ones)
    return convert(model)


def _names_of_quantizers(model: nn.Module) -> tuple[str, ...]:
    named = model.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, module in named if isinstance(module, FakeQuantize))


def _weigh(model: nn.Module, rows: list[LayerRow], field: str, without: tuple[str, ...]) -> int:
    """Bytes of the tensors in the state_dict, each storage once; a storage adds to the row of its first layer.

    ``without``: prefixes of tensors that do not count.
    """
    owners = {row.name: row for row in rows}
    named = model.named_modules(remove_duplicate=False)
    inner = tuple(f"{name}.{part}.".removeprefix(".") for name, module in named for part in _parts(module))
    seen: dict[int, int] = {}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or key.startswith(without):
            continue
        storage = tensor.untyped_storage()
        if storage._cdata in seen:
            continue
        seen[storage._cdata] = storage.nbytes()
        owner = key
        while owner and owner not in owners:
            owner = owner.rpartition(".")[0]
        if owner in owners and _holds(owner, key, inner):
            setattr(owners[owner], field, getattr(owners[owner], field) + storage.nbytes())
    return sum(seen.values())


def _holds(owner: str, key: str, inner: tuple[str, ...]) -> bool:
    """Whether the tensor is the layer's own, not that of a module in it, unless the module's name is in ``inner``."""
    rest = key.removeprefix(f"{owner}." if owner else "")
    return "." not in rest or rest.startswith("parametrizations.") or key.startswith(inner)


def _as_float(row: LayerRow, layer: nn.Module) -> int:
    """Sets the float bytes of a converted layer without its float layer; returns by how much they grow."""
    before = row.float_bytes
    if parts := _on_integers(layer):
        row.float_bytes = 0 if len(parts) == 1 else sum(p.nbytes for p in layer.parameters(recurse=False))
    for part in parts:
        bias: Tensor | None = getattr(part, "bias", None)
        weight = 0 if part.weight_elsewhere else math.prod(part.weight_shape)
        row.float_bytes += part.dtype.itemsize * (weight + (0 if bias is None else bias.numel()))
    return row.float_bytes - before


def _run_example(
    model: nn.Module,
    example: Any,
    float_model: nn.Module | None,
    layers: Mapping[str, nn.Module],
    folded: dict[str, str],
    rows: list[LayerRow],
    notes: dict[str, str],
) -> None:
    same = {name: name for name in layers}
    with eval_mode(model):
        record = Record(model, example, same)
        references: dict[str, Tensor] = {}
        if float_model is not None:
            with eval_mode(float_model), off_fused_paths(float_model):
                references = Record(float_model, example, {name: folded.get(name, name) for name in layers}).outputs
        elif not any(_on_integers(layer) or hasattr(layer, BURNT_IN) for layer in layers.values()):
            # A converted model's weights stay what they are without its quantizers, so it cannot be its own reference.
            with quantizers_replaced(model, lambda quantizer, x: x):
                references = Record(model, example, same).outputs
    for row in rows:
        layer = layers[row.name]
        if row.name in references and row.name in record.outputs:
            row.output_sqnr = sqnr(references[row.name], record.outputs[row.name])
        if row.name not in record.called and _is_quantized(layer):
            notes.setdefault(row.name, "nothing called it on the example: what reads its weight gets it in float")
        if row.name not in record.inputs:
            continue
        x, factor = record.inputs[row.name], record.factor(row.name)
        if _has_one_scale(layer) and factor > 2:
            notes.setdefault(
                row.name,
                f"one scale serves its {len(record.called[row.name])} calls, whose inputs differ by a factor of "
                f"{factor:.1f}; a layer for each call with the same weight (second.weight = first.weight, before "
                "prepare) has a scale for each",
            )
        if parts := _on_integers(layer):
            first = parts[0]
            scale = getattr(first, "input_scale", None)
            if scale is not None:
                row.input_clipped = clipped_share(x, scale, first.input_zero_point, first.quant_min, first.quant_max)
        elif isinstance(layer, QATLayer):
            quantizer = _input_quantizer(layer)
            if quantizer is not None and quantizer.quantizer != "dynamic" and quantizer.integer_codes:
                row.input_clipped = clipped_share(x, *quantizer.qparams(), quantizer.quant_min, quantizer.quant_max)


def _eval(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    with eval_mode(quantizer), torch.no_grad():
        return quantizer(x)
