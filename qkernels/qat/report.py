"""report: what quantization did to each layer, and what the whole model weighs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.int4 import Int4Embedding, Int4Linear
from ..nn.int8 import Int8Conv2d, Int8Linear
from ..nn.qat import QATConv2d, QATLinear
from ..reference.packing import BITS, packed_length
from .calibrate import call, quantizers_replaced
from .config import QUANTIZABLE
from .fold import eval_mode, factor_and_bias, find_folds
from .selection import to_int4

SCALE_BYTES = 4
QAT_LAYERS = (QATLinear, QATConv2d)
INT8_LAYERS = (Int8Linear, Int8Conv2d)
INT4_LAYERS = (Int4Linear, Int4Embedding)
CONVERTED_LAYERS = INT8_LAYERS + INT4_LAYERS


@dataclass
class LayerRow:
    """One Linear or Conv2d layer, or an Int4Embedding.

    Bits None: float. SQNR in dB, clipped as a share of the elements; None: not known.
    """

    name: str
    kind: str
    weight_bits: int | None
    input_bits: int | None
    weight_sqnr: float | None = None
    output_sqnr: float | None = None
    weight_clipped: float | None = None
    input_clipped: float | None = None
    float_bytes: int = 0
    quantized_bytes: int = 0


@dataclass
class Report:
    """Rows per layer, totals for the model, and notes: layers and BatchNorms that stay as they are, with the reason.

    quantized_bytes counts what the state_dict of the converted model holds. float_bytes counts the float model that it
    came from.
    """

    layers: list[LayerRow]
    float_bytes: int
    quantized_bytes: int
    notes: dict[str, str]
    accuracy: float | None = None

    @property
    def ratio(self) -> float:
        return self.float_bytes / max(self.quantized_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        header = [
            "layer",
            "kind",
            "W bits",
            "A bits",
            "W SQNR dB",
            "out SQNR dB",
            "W clipped",
            "A clipped",
            "kB",
            "was kB",
        ]
        table = [header] + [
            [
                row.name or "(model)",
                row.kind,
                _cell(row.weight_bits, "d", "float"),
                _cell(row.input_bits, "d", "float"),
                _cell(row.weight_sqnr, ".1f"),
                _cell(row.output_sqnr, ".1f"),
                _cell(row.weight_clipped, ".2%"),
                _cell(row.input_clipped, ".2%"),
                f"{row.quantized_bytes / 1e3:.1f}",
                f"{row.float_bytes / 1e3:.1f}",
            ]
            for row in self.layers
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(
            f"model: {self.float_bytes / 1e3:.1f} kB in float, {self.quantized_bytes / 1e3:.1f} kB quantized, "
            f"{self.ratio:.2f}x smaller" + ("" if self.accuracy is None else f", accuracy {self.accuracy:.2%}")
        )
        lines += [f"note: {name or '(model)'}: {reason}" for name, reason in self.notes.items()]
        return "\n".join(lines)


def report(
    model: nn.Module, example: Any = None, *, float_model: nn.Module | None = None, accuracy: float | None = None
) -> Report:
    """Says what quantization does to ``model`` (prepared or converted), layer by layer and in total.

    Args:
        model: from ``prepare`` or ``convert``; it is run in eval mode and left as it was.
        example: one batch as for ``calibrate``. Gives the inputs' clipped share and, against float_model, the SQNR
            of each layer's output; a prepared model without float_model is compared with itself unquantized.
        float_model: the model before ``prepare``. A converted model needs it for its weights' SQNR.
        accuracy: any number measured elsewhere, to be shown with the rest.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QAT_LAYERS + CONVERTED_LAYERS + QUANTIZABLE)
    }
    quantized = QAT_LAYERS + CONVERTED_LAYERS
    if not any(isinstance(module, quantized) or hasattr(module, "weight_bits") for module in layers.values()):
        raise ValueError("model: got a float model; accepted: what qk.prepare or qk.convert returns")
    folds = find_folds(model)
    float_folds = {} if float_model is None else find_folds(float_model).batch_norm_of
    # In a converted model the folded BatchNorm is gone; the float model still tells where it was.
    folded = {
        conv: norm
        for conv, norm in (float_folds if float_model is not None else {}).items()
        if isinstance(layers.get(conv), Int8Conv2d) and not isinstance(_submodule(model, norm), nn.BatchNorm2d)
    }
    rows, notes = [], {}
    for name, layer in layers.items():
        source = None if float_model is None else _submodule(float_model, name)
        norm = folds.batch_norm_of.get(name)
        row, note = _row(name, layer, None if norm is None else model.get_submodule(norm))  # type: ignore[arg-type]
        if isinstance(layer, CONVERTED_LAYERS) and source is not None:
            weight = source.weight.detach().float()  # type: ignore[union-attr, operator]
            if name in folded:
                factor, _ = factor_and_bias(float_model.get_submodule(folded[name]), None)  # type: ignore[union-attr, arg-type]
                weight = weight * factor.reshape(-1, 1, 1, 1)
            row.weight_sqnr = sqnr(weight, layer.dequantize())
        rows.append(row)
        if note:
            notes[name] = note
    notes.update({name: f"BatchNorm stays a float layer: {reason}" for name, reason in folds.kept.items()})
    if example is not None:
        _run_example(model, example, float_model, layers, folded, rows)
    float_bytes, quantized_bytes = _totals(model, float_model, rows, folds.batch_norm_of)
    return Report(rows, float_bytes, quantized_bytes, notes, accuracy)


def sqnr(reference: Tensor, approximation: Tensor) -> float | None:
    """10·log10(Σ reference² / Σ (reference − approximation)²) in dB; inf where equal, None for a reference of zeros."""
    reference, approximation = reference.detach().double(), approximation.detach().double()
    signal, noise = float(reference.square().sum()), float((reference - approximation).square().sum())
    if signal == 0:
        return None
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def clipped_share(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> float:
    """The share of x's elements whose code lies outside the range."""
    if x.numel() == 0:
        return 0.0
    while scale.dim() == x.dim() and any(s not in (1, n) for s, n in zip(scale.shape, x.shape, strict=True)):
        repeats = [n // s if s not in (1, n) else 1 for s, n in zip(scale.shape, x.shape, strict=True)]
        for dim, repeat in enumerate(repeats):
            scale = scale.repeat_interleave(repeat, dim)
            zero_point = None if zero_point is None else zero_point.repeat_interleave(repeat, dim)
    q = (x.detach().float() / scale).round() + (0 if zero_point is None else zero_point)
    return float(((q < quant_min) | (q > quant_max)).float().mean())


def _row(name: str, layer: nn.Module, norm: nn.BatchNorm2d | None) -> tuple[LayerRow, str | None]:
    bias: Tensor | None = getattr(layer, "bias", None)
    if isinstance(layer, CONVERTED_LAYERS):
        input_bits = None if isinstance(layer, Int4Embedding) else layer.input_bits
        row = LayerRow(name, type(layer).__name__, layer.weight_bits, input_bits)
        row.float_bytes = 4 * (math.prod(layer.weight_shape) + (0 if bias is None else bias.numel()))
        row.quantized_bytes = _bytes(list(layer.state_dict().values()))
        return row, None
    weight: Tensor = layer.weight  # type: ignore[assignment]
    outputs = weight.shape[0]
    weight_quant: FakeQuantize | None = getattr(layer, "weight_fake_quant", None)
    input_quant: FakeQuantize | None = getattr(layer, "input_fake_quant", None)
    row = LayerRow(
        name,
        type(layer).__name__,
        getattr(layer, "weight_bits", None) if weight_quant is None else weight_quant.bits,
        None if input_quant is None else input_quant.bits,
    )
    row.float_bytes = row.quantized_bytes = _bytes([weight, *([] if bias is None else [bias])])
    note = None
    if row.weight_bits is None:
        note = "weight stays float" if row.input_bits is None else "not convertible: its weight is not quantized"
    if weight_quant is not None and weight_quant.is_calibrated:
        codes, scale, zero_point = weight_quant.quantize(weight)
        row.weight_sqnr = sqnr(weight, _eval(weight_quant, weight))
        row.weight_clipped = clipped_share(weight, scale, zero_point, weight_quant.quant_min, weight_quant.quant_max)
        static = 0
        if input_quant is not None and input_quant.quantizer != "dynamic":
            static = 1 if input_quant.symmetric else 2
        scales = max(scale.numel(), outputs)
        if to_int4(layer):
            packed = outputs * packed_length(codes.shape[1], weight_quant.bits)
        else:
            packed = packed_length(codes.numel(), weight_quant.bits if weight_quant.bits in BITS else 8)
        packed += 0 if zero_point is None else scales  # int8
        row.quantized_bytes = (
            packed + SCALE_BYTES * (scales + static) + (0 if bias is None and norm is None else 4 * outputs)
        )
    return row, note


def _totals(
    model: nn.Module, float_model: nn.Module | None, rows: list[LayerRow], folds: dict[str, str]
) -> tuple[int, int]:
    counted = {row.name for row in rows}
    rest = folded = 0
    for name, module in model.named_modules():
        if name in counted or isinstance(module, FakeQuantize):
            continue
        own = _bytes([*module.parameters(recurse=False), *module.buffers(recurse=False)])
        rest += own
        folded += own if name in folds.values() and _converts(model, folds, name) else 0
    quantized_bytes = sum(row.quantized_bytes for row in rows) + rest - folded
    if float_model is not None:
        return _bytes([*float_model.parameters(), *float_model.buffers()]), quantized_bytes
    return sum(row.float_bytes for row in rows) + rest, quantized_bytes


def _converts(model: nn.Module, folds: dict[str, str], norm: str) -> bool:
    conv = model.get_submodule(next(conv for conv, name in folds.items() if name == norm))
    return isinstance(conv, QATConv2d) and conv.weight_fake_quant is not None and conv.input_fake_quant is not None


def _run_example(
    model: nn.Module,
    example: Any,
    float_model: nn.Module | None,
    layers: Mapping[str, nn.Module],
    folded: dict[str, str],
    rows: list[LayerRow],
) -> None:
    with eval_mode(model):
        inputs, outputs = _record(model, example, {name: name for name in layers})
        references: dict[str, Tensor] = {}
        if float_model is not None:
            with eval_mode(float_model):
                _, references = _record(float_model, example, {name: folded.get(name, name) for name in layers})
        elif any(isinstance(layer, QAT_LAYERS) for layer in layers.values()):
            with quantizers_replaced(model, lambda quantizer, x: x):
                _, references = _record(model, example, {name: name for name in layers})
    for row in rows:
        layer = layers[row.name]
        if row.name in references and row.name in outputs:
            row.output_sqnr = sqnr(references[row.name], outputs[row.name])
        if row.name not in inputs:
            continue
        x = inputs[row.name]
        if isinstance(layer, (*INT8_LAYERS, Int4Linear)):
            if layer.input_scale is not None:
                row.input_clipped = clipped_share(
                    x, layer.input_scale, layer.input_zero_point, layer.quant_min, layer.quant_max
                )
        elif isinstance(layer, QAT_LAYERS) and layer.input_fake_quant is not None:
            quantizer = layer.input_fake_quant
            if quantizer.quantizer != "dynamic":
                row.input_clipped = clipped_share(x, *quantizer.qparams(), quantizer.quant_min, quantizer.quant_max)


def _record(model: nn.Module, example: Any, modules: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First input and output of the modules (given as row name -> module name) while the model runs on the example."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args:
                inputs.setdefault(name, args[0].detach())
            outputs.setdefault(name, output.detach())

        return hook

    handles = []
    for name, target in modules.items():
        module = _submodule(model, target)
        if module is not None:
            handles.append(module.register_forward_hook(hook_of(name)))
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def _eval(quantizer: FakeQuantize, x: Tensor) -> Tensor:
    with eval_mode(quantizer), torch.no_grad():
        return quantizer(x)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(name)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _cell(value: float | None, spec: str, missing: str = "–") -> str:
    return missing if value is None else format(value, spec)
