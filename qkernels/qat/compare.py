"""compare: what each layer of a quantized model returns, beside what the same layer of the float model returns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_layer import QATLayer
from ..nn.quantized import QuantizedLayer
from .calibrate import call_on, check_module, check_shapes, is_empty, tensors_in, uncompiled, unwrapped
from .copying import shadow_of, whole
from .fold import BatchNorm, eval_mode, find_folds
from .measures import as_json, sqnr
from .recorded import off_fused_paths
from .repeated_batches import random_state_kept, seed
from .spec import listed

DOUBLED = 6.0  # dB by which the SQNR falls where the error's amplitude doubles
Hook = Callable[[nn.Module, Any, Any], None]


@dataclass
class ComparedLayer:
    """A tensor that a layer returned in one of its calls, beside that of the float model.

    Attributes:
        name: of the layer; "" is the model itself.
        kind: its class in the quantized model.
        call, tensor: which call of the layer, and which floating tensor in what it returned, both from 0 on.
        shape: of the float model's tensor.
        sqnr: in dB; inf: the tensors are equal. None: the float tensor is all zeros, or the shapes differ, and all that
            follows is None in the second case.
        max_error: the largest |quantized − float|.
        mean_error: the mean of quantized − float, the bias of the error.
        cosine: of the angle between the tensors; None too if one of them is all zeros.
        departs: whether the error grows here by more than the width explains (see ``compare``).
    """

    name: str
    kind: str
    call: int
    tensor: int
    shape: tuple[int, ...]
    sqnr: float | None = None
    max_error: float | None = None
    mean_error: float | None = None
    cosine: float | None = None
    departs: bool = False


@dataclass
class Comparison:
    """What ``compare`` found; ``print`` shows a table, with a mark at the layers that depart.

    Attributes:
        layers: ``ComparedLayer`` rows, in the order of the calls; the model's own output comes last.
        notes: layer name -> why it has no row, or not as many as it has calls.
    """

    layers: list[ComparedLayer]
    notes: dict[str, str]

    @property
    def first(self) -> ComparedLayer | None:
        """The first row that departs; None: none does."""
        return next((row for row in self.layers if row.departs), None)

    def to_dict(self) -> dict[str, Any]:
        """Rows, notes and the name of the first layer that departs, as values that JSON knows; it raises nothing.

        JSON has no number for what is not finite: "inf", "-inf" and "nan" stand for these.
        """
        return {
            "layers": as_json([asdict(row) for row in self.layers]),
            "notes": self.notes,
            "first": None if self.first is None else self.first.name,
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON; it raises nothing."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        table = [["layer", "kind", "shape", "SQNR dB", "max error", "mean error", "cosine", ""]]
        for row in self.layers:
            numbers = zip(
                (row.sqnr, row.max_error, row.mean_error, row.cosine), (".1f", ".2g", ".2g", ".5f"), strict=True
            )
            cells = ["–" if value is None else format(value, spec) for value, spec in numbers]
            mark = "" if not row.departs else "<- first to depart" if row is self.first else "<- departs"
            table.append([self.label(row), row.kind, "x".join(map(str, row.shape)), *cells, mark])
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(
                cell.rjust(width) if 3 <= i < 7 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines += [f"note: {name or '(model)'}: {reason}" for name, reason in self.notes.items()]
        return "\n".join(lines)

    def label(self, row: ComparedLayer) -> str:
        """The layer's name, with the number of the call and the tensor where there are several; it raises nothing."""
        same = [other for other in self.layers if other.name == row.name]
        call = f" call {row.call + 1}" if any(other.call for other in same) else ""
        tensor = f" [{row.tensor}]" if any(other.tensor for other in same) else ""
        return f"{row.name or '(model)'}{call}{tensor}"


def compare(float_model: nn.Module, q_model: nn.Module, batch: Any) -> Comparison:
    """Runs both models on a batch and compares what their layers return, call by call.

    Layers are the modules that hold parameters or buffers of their own or that ``prepare`` quantized, and the model
    itself. A convolution whose BatchNorm is folded into it in q_model is compared with the float model's BatchNorm. A
    converted model runs layer by layer, as if it had no programs, with the numbers that it has with them (see
    ``convert``). The outputs of the float model's layers are kept until they are compared. Both models run in eval
    mode, with the same random numbers, and stay as they were.

    **Departing.** Errors add up from layer to layer, and narrow widths have large ones. A layer departs where its SQNR
    is both 6 dB below that of every tensor before it, so that the amplitude of the error doubles in one layer, and
    below 5·bits − 5 dB, at most 30 dB, for the narrowest width so far (8 bits: 30, 4 bits: 15, 2 bits: 5). One that
    returns NaN departs too.

    Args:
        float_model: the model before ``prepare``; or any other with the same names, such as a prepared model, beside
            which a converted one should show errors of rounding alone.
        q_model: from ``prepare``, after calibration, or from ``convert``.
        batch: one batch, as for ``calibrate``.

    Returns:
        A ``Comparison``: ``print`` shows its table, ``to_json`` gives it to programs, ``first`` is the first departure.

    Raises:
        TypeError: a model is no module, or the batch is none that ``calibrate`` takes.
        ValueError: the models have no layer in common or layers of other shapes, or come in the other order; lazy
            layers have not run yet; the batch has no samples.
        RuntimeError, TypeError, ValueError: what a model raises on the batch, with its layer, such as a quantizer of
            inputs that is not calibrated.
    """
    for argument, model in (("float_model", float_model), ("q_model", q_model)):
        check_module(model, "a torch.nn.Module", argument)
    if _is_quantized(float_model) and not _is_quantized(q_model):
        raise ValueError(
            "q_model: got a float model, and a quantized one for float_model; accepted: "
            "qk.compare(float_model, q_model, batch), in this order"
        )
    if is_empty(batch):
        raise ValueError("batch: got one without samples; accepted: a batch with samples")
    reference, model = _runnable(float_model), _runnable(q_model)
    pairs, notes = _pairs(reference, model)
    if len(pairs) == 1 and notes:
        raise ValueError(
            f"q_model: got one with none of the layers {listed(notes)}; accepted: a model made of float_model"
        )
    device = next((t.device for t in reference.parameters()), torch.device("cpu"))
    with uncompiled(), torch.no_grad(), random_state_kept(reference), random_state_kept(model):
        with eval_mode(reference), off_fused_paths(reference):
            kept: dict[str, list[list[Tensor]]] = {name: [] for name in pairs}
            seed(device)
            _run(reference, batch, "float_model", {name: _keeper(kept[name]) for name in pairs}, pairs, 0)
        with eval_mode(model), off_fused_paths(model):
            rows: list[ComparedLayer] = []
            counts = dict.fromkeys(pairs, 0)
            seed(device)
            _run(model, batch, "q_model", {name: _comparer(name, kept, counts, rows) for name in pairs}, pairs, 1)
    for name, calls in kept.items():
        if len(calls) != counts[name]:
            notes[name] = f"{len(calls)} calls in the float model, {counts[name]} in the other"
        elif not calls:
            notes[name] = "nothing called it on the batch"
    _mark(rows, {name: _bits(module) for name, (_, module) in pairs.items()})
    return Comparison(rows, notes)


def _runnable(model: nn.Module) -> nn.Module:
    """The model; if it has quantizers, which may start a scale in the run, a copy that shares all other tensors."""
    model = whole(unwrapped(model))
    check_shapes(model)
    return shadow_of(model) if any(isinstance(module, FakeQuantize) for module in model.modules()) else model


def _pairs(reference: nn.Module, model: nn.Module) -> tuple[dict[str, tuple[nn.Module, nn.Module]], dict[str, str]]:
    """The layers to compare by name, the model itself last; and notes on those that the other model lacks."""
    others = dict(model.named_modules(remove_duplicate=False))
    own = dict(reference.named_modules())
    folds = find_folds(reference).batch_norm_of
    folded = {conv: norm for conv, norm in folds.items() if not isinstance(others.get(norm), BatchNorm)}
    pairs, notes = {}, {}
    for name, module in own.items():
        inside = isinstance(module, FakeQuantize) or "parametrizations" in name.split(".")
        if not name or inside or name in folded.values():
            continue
        other = others.get(name)
        held = any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
        if not held and not isinstance(other, QATLayer):
            continue
        if other is not None:
            _check_alike(name, module, other)
        if other is None:
            notes[name] = "the other model has no layer of this name"
        else:
            pairs[name] = own[folded.get(name, name)], other
    pairs[""] = reference, model
    return pairs, notes


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, FakeQuantize | QuantizedLayer) for module in model.modules())


def _check_alike(name: str, module: nn.Module, other: nn.Module) -> None:
    """Refuses a layer of another model that has the same name; integers are stored in shapes of their own."""
    for key, own in module._parameters.items():
        given = other._parameters.get(key)
        if own is None or given is None or is_lazy(own) or not given.is_floating_point() or given.shape == own.shape:
            continue
        raise ValueError(
            f"q_model: its '{name}.{key}' has shape {list(given.shape)}; accepted: {list(own.shape)}, as in "
            "float_model, of which q_model is made"
        )


def _run(
    model: nn.Module,
    batch: Any,
    argument: str,
    hooks: dict[str, Hook],
    pairs: dict[str, tuple[nn.Module, nn.Module]],
    side: int,
) -> None:
    handles = [pairs[name][side].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        call_on(model, batch, f"batch, for {argument}")
    finally:
        for handle in handles:
            handle.remove()


def _floats(output: Any) -> list[Tensor]:
    return [t.detach() for t in tensors_in(output) if t.is_floating_point()]


def _keeper(calls: list[list[Tensor]]) -> Hook:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        calls.append([t.clone() for t in _floats(output)])  # the next layer may overwrite them

    return keep


def _comparer(
    name: str, kept: dict[str, list[list[Tensor]]], counts: dict[str, int], rows: list[ComparedLayer]
) -> Hook:
    def compare_call(module: nn.Module, args: Any, output: Any) -> None:
        at = counts[name]
        counts[name] += 1
        if at < len(kept[name]):
            pairs = zip(kept[name][at], _floats(output), strict=False)
            rows.extend(_row(name, module, at, i, *pair) for i, pair in enumerate(pairs))
            kept[name][at] = []

    return compare_call


def _row(name: str, module: nn.Module, at: int, tensor: int, x: Tensor, y: Tensor) -> ComparedLayer:
    row = ComparedLayer(name, type(module).__name__, at, tensor, tuple(x.shape))
    if x.shape != y.shape or not x.numel():
        return row
    row.sqnr = sqnr(x, y)
    x, y = x.double(), y.double()
    error = y - x
    row.max_error, row.mean_error = float(error.abs().amax()), float(error.mean())
    norms = float(x.square().sum().sqrt() * y.square().sum().sqrt())
    row.cosine = float((x * y).sum()) / norms if norms else None
    return row


def _bits(module: nn.Module) -> int | None:
    """The narrowest width in a layer; None: it computes in float."""
    widths: Iterator[Any] = (getattr(module, name, None) for name in ("weight_bits", "input_bits"))
    inside = [q.bits for q in module.children() if isinstance(q, FakeQuantize) and q.quantizes]
    return min([*inside, *(bits for bits in widths if isinstance(bits, int))], default=None)


def _mark(rows: list[ComparedLayer], bits: dict[str, int | None]) -> None:
    lowest, narrowest = math.inf, 8
    for row in rows:
        narrowest = min(narrowest, bits[row.name] or narrowest)
        if row.sqnr is not None:
            row.departs = not row.sqnr >= min(5 * narrowest - 5, 30, lowest - DOUBLED)  # NaN departs
            lowest = min(lowest, row.sqnr) if not math.isnan(row.sqnr) else lowest
