"""TrainingLog: scales, changes of codes and clipped shares of a model in training, written to CSV or TensorBoard."""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..ops.statistics import histogram
from .calibrate import call_on, check_module, quantizers_of, quantizers_replaced, unwrapped
from .files import named
from .fold import eval_mode
from .quant_loss import steps_of
from .quantized_weights import Scales, codes_of, quantized_weights, scales_of
from .repeated_batches import random_state_kept
from .spec import check_type

COLUMNS = ("step", "name", "bits", "scale", "scale_min", "scale_max", "flipped", "clipped", "value")
Figures = dict[str, Any]  # column -> a number, a tensor of one element, or None


@dataclass
class _Codes:
    """The codes of a weight when it was last logged."""

    codes: Tensor  # uint8
    bits: int


class TrainingLog:
    """Writes what quantization does while a prepared model trains: widths, scales, changes of codes, clipped shares.

    ```
    log = qk.TrainingLog(prepared, "log.csv", every=100)
    for x, target in batches:
        ...
        optimizer.step()
        log.step(x, loss=loss)
    ```

    At every n-th step each quantizer that keeps a scale gets a row, by its name, and each loss one. The columns:

    - bits: the width.
    - scale, scale_min, scale_max: its mean and extremes over channels or groups.
    - flipped: the share of a weight's codes that have changed since its last row; for the first row since the log was
      made. Empty where the width has changed.
    - clipped: the share of the elements whose code lies outside the range; of inputs only where ``step`` gets inputs.
    - value: of a loss.

    A CSV file that exists is gone on with: rows are appended, and steps go on after its last one, or where
    ``load_state_dict`` says. Where a run was resumed from before its end, steps come twice; the later rows count. A
    last line that is cut off, as a process leaves it that is killed while it writes, is dropped with a warning. In
    TensorBoard the tags are ``scale/<name>`` and so on.

    **Cost.** A step that is not written costs nothing. One that is takes four passes over the weights, one wait for the
    device, and with inputs a forward pass; the log keeps a byte for each weight. Of DDP's processes one should log.

    Args:
        model: from ``prepare``, under any wrapper.
        to: the path of a CSV file, ending in .csv; or a ``torch.utils.tensorboard.SummaryWriter``, or anything with
            its ``add_scalar``.
        every: how many steps there are from row to row.

    Raises:
        ValueError: the model has no quantizers or lazy layers that have not run, the file does not end in .csv, has
            other columns or a line that is no row, or every is below 1.
        TypeError: an argument of another type.
        RuntimeError: weights under ``fully_shard``.
        OSError: the file cannot be written.
    """

    def __init__(self, model: nn.Module, to: Any, *, every: int = 1) -> None:
        check_module(model)
        check_type("every", every, int, "a whole number of at least 1")
        if every < 1:
            raise ValueError(f"every: got {every}; accepted: a whole number of at least 1")
        self.model, self.every = unwrapped(model), every
        self._names = {quantizer: name for name, quantizer in quantizers_of(self.model).items()}
        self._last: dict[str, _Codes] = {}
        with torch.no_grad(), eval_mode(self.model):
            for _, weight, quantizer in self._weights():
                scales = scales_of(quantizer, weight)
                if bool(scales[0].isfinite().all()):
                    self._flipped(quantizer, weight, scales)
        self._to = _Csv(Path(to)) if isinstance(to, str | os.PathLike) else _Board(to)
        self.steps = self._to.steps  # how often ``step`` was called

    def step(self, inputs: Any = None, **losses: Any) -> None:
        """Counts a step and writes at every n-th; to be called after a step of the optimizer.

        Args:
            inputs: a batch, as for ``calibrate``, on which the clipped shares of inputs are measured, in eval mode;
                call ``step`` under the autocast of the training. None: they are left out.
            losses: numbers or tensors of one element, by name, such as ``loss=loss, **penalty.values``.

        Raises:
            TypeError, ValueError: a loss that is no number; inputs that the model does not take. Nothing is written.
            OSError: the file cannot be written.
        """
        for name, value in losses.items():
            if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
                raise TypeError(f"{name}: got {value!r}; accepted: a number, or a tensor of one element")
        if self.steps % self.every == 0:
            last = dict(self._last)
            try:
                rows = self._rows(inputs)
                taken = ", ".join(sorted(rows.keys() & losses.keys()))
                if taken:
                    raise ValueError(f"{taken}: got a loss of this name; accepted: names that no quantizer has")
                rows.update({name: {"value": value} for name, value in losses.items()})
                self._to.write(self.steps, _on_host(rows))
            except BaseException:
                self._last = last
                raise
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        """The step, to go on from in a resumed run; it raises nothing."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the step of a ``state_dict``; make the log when the model has its weights.

        Raises:
            ValueError: state holds no number of steps.
        """
        self.steps = steps_of(state)

    def _weights(self) -> Iterable[tuple[str, Tensor, FakeQuantize]]:
        for weight in quantized_weights(self.model):
            yield self._names[weight.quantizer], weight.value.detach(), weight.quantizer

    @torch.no_grad()
    def _rows(self, inputs: Any) -> dict[str, Figures]:
        rows: dict[str, Figures] = {}
        with eval_mode(self.model):
            for name, weight, quantizer in self._weights():
                scales = scales_of(quantizer, weight)
                rows[name] = {**_scales(quantizer, scales[0]), "flipped": self._flipped(quantizer, weight, scales)}
                if quantizer.integer_codes:
                    rows[name]["clipped"] = _outside(quantizer, weight, scales) / max(weight.numel(), 1)
            for quantizer, name in self._names.items():
                if not quantizer.is_weight and quantizer.quantizer != "dynamic":
                    rows[name] = _scales(quantizer, quantizer.qparams()[0])
            if inputs is not None:
                for quantizer, share in self._clipped_inputs(inputs).items():
                    rows[self._names[quantizer]]["clipped"] = share
        return {name: rows[name] for name in self._names.values() if name in rows}

    def _flipped(self, quantizer: FakeQuantize, weight: Tensor, scales: Scales) -> Tensor | None:
        codes, _ = codes_of(quantizer, weight, scales)
        name = self._names[quantizer]
        before, self._last[name] = self._last.get(name), _Codes(codes, quantizer.bits)
        if before is None or before.bits != quantizer.bits or before.codes.shape != codes.shape:
            return None
        return torch.count_nonzero(before.codes != codes) / max(codes.numel(), 1)  # .sum() takes many times as long

    def _clipped_inputs(self, inputs: Any) -> dict[FakeQuantize, Tensor]:
        counts: dict[FakeQuantize, list[Any]] = {}

        def measure(quantizer: FakeQuantize, x: Tensor) -> Tensor:
            if not quantizer.is_weight and quantizer.quantizer != "dynamic" and quantizer.integer_codes:
                outside, elements = counts.setdefault(quantizer, [0, 0])
                counts[quantizer] = [outside + _outside(quantizer, x, quantizer.qparams()), elements + x.numel()]
            return type(quantizer).forward(quantizer, x)

        with quantizers_replaced(self.model, measure), random_state_kept(self.model):
            call_on(self.model, inputs, "inputs")
        return {quantizer: outside / max(elements, 1) for quantizer, (outside, elements) in counts.items()}


def _scales(quantizer: FakeQuantize, scale: Tensor) -> Figures:
    return {"bits": quantizer.bits, "scale": scale.mean(), "scale_min": scale.amin(), "scale_max": scale.amax()}


def _outside(quantizer: FakeQuantize, x: Tensor, scales: Scales) -> Tensor:
    """How many elements of x have a code outside the range: they are more than half a step beyond its ends."""
    scale, zero_point = scales
    zero = 0 if zero_point is None else zero_point
    low, high = (quantizer.quant_min - zero - 0.5) * scale, (quantizer.quant_max - zero + 0.5) * scale
    _, outside = histogram(x, low.to(scale.dtype), high.to(scale.dtype), bins=1)
    return outside[..., :2].sum()


def _on_host(rows: dict[str, Figures]) -> dict[str, Figures]:
    """The rows with numbers in place of tensors, in one wait for each device; no row where the scale is NaN."""
    places = [(figures, key) for figures in rows.values() for key in figures if isinstance(figures[key], Tensor)]
    found = [figures[key].detach().double().reshape(()) for figures, key in places]
    by_device: dict[torch.device, list[int]] = {}
    for at, t in enumerate(found):
        by_device.setdefault(t.device, []).append(at)
    for each in by_device.values():
        for at, value in zip(each, torch.stack([found[at] for at in each]).tolist(), strict=True):
            figures, key = places[at]
            figures[key] = value
    return {name: figures for name, figures in rows.items() if not math.isnan(figures.get("scale", 0.0))}


class _Csv:
    """A file of rows.

    Attributes:
        steps: the step after the last one in the file.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".csv":
            raise ValueError(
                f"to: got {str(path)!r}; accepted: a file that ends in .csv, or a SummaryWriter of "
                "torch.utils.tensorboard (pip install tensorboard)"
            )
        self.path, self.steps = path, 0
        with named("to", path):
            if path.exists():
                for row in deque(read_log(path), maxlen=1):
                    self.steps = row["step"] + 1
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without a line that is cut off
            if not path.exists() or not path.stat().st_size:
                self._append([COLUMNS])

    def write(self, step: int, rows: dict[str, Figures]) -> None:
        with named("to", self.path):
            self._append([step, name, *(_cell(row.get(key)) for key in COLUMNS[2:])] for name, row in rows.items())

    def _append(self, rows: Iterable[Iterable[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())


class _Board:
    steps = 0

    def __init__(self, writer: Any) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"to: got a {type(writer).__name__}; accepted: a path that ends in .csv, or a SummaryWriter of "
                "torch.utils.tensorboard (pip install tensorboard)"
            )
        self.writer = writer

    def write(self, step: int, rows: dict[str, Figures]) -> None:
        for name, row in rows.items():
            for key, value in row.items():
                if value is not None:
                    self.writer.add_scalar(f"{'loss' if key == 'value' else key}/{name}", value, step)


def _cell(value: Any) -> str:
    return "" if value is None else format(value, ".6g")


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a CSV file of a ``TrainingLog``: step, name, and the numbers of the other columns or None.

    A last line without an end, as a process leaves it that is killed while it writes, is left out with a warning.

    Raises:
        ValueError: the file has other columns, or a line that is no row.
        OSError: it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    *whole, last = text.split("\n")
    head = whole[0] if whole else last
    if tuple(head.split(",")) != COLUMNS and (whole or not ",".join(COLUMNS).startswith(head)):
        raise ValueError(f"{path}: got the columns {', '.join(head.split(','))}; accepted: {', '.join(COLUMNS)}")
    if last:
        warnings.warn(
            f"{path}, line {len(whole) + 1}: got {last!r}, which is cut off, as where a process was killed while it "
            "wrote; it is left out",
            stacklevel=2,
        )
    rows = []
    for number, line in enumerate(whole[1:], 2):
        try:
            step, name, *rest = next(csv.reader([line]))
            numbers = {k: float(v) if v else None for k, v in zip(COLUMNS[2:], rest, strict=True)}
            rows.append({"step": int(step), "name": name, **numbers})
        except (ValueError, StopIteration):
            accepted = f"a whole step, a name and {len(COLUMNS) - 2} numbers or empty cells, so take the line out"
            raise ValueError(f"{path}, line {number}: got {line!r}; accepted: {accepted}") from None
    return rows
