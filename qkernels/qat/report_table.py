"""Report: the table that ``report`` makes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .files import replacing
from .weight_histograms import WeightHistogram


@dataclass
class LayerRow:
    """A layer with weights: quantized, or float because a rule, its kind or its module keeps it so.

    Bits of None mean float. SQNR is in dB and clipped is a share of the elements; None: not known, or not comparable.
    Bytes count the tensors that the layer adds to the model: a shared weight counts in the first row that holds it.
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
    """Rows per layer, totals for the model, and notes, such as why a layer or BatchNorm stays float.

    quantized_bytes counts the tensors in the state_dict of the converted model, each storage once; a file of it takes
    as much, plus its header. float_bytes counts the float model in the same way. Both totals include tensors that are
    in no row: norms, and parameters and buffers of less than two dims.

    Attributes:
        layers: a row for each layer with weights.
        float_bytes, quantized_bytes: bytes of the whole model; ``ratio`` is the first over the second.
        notes: layer name -> why the layer is float, or another remark.
        accuracy: the number that ``report`` got.
        histograms: layer name -> of its weights, for ``html``; ``to_dict`` leaves them out.
    """

    layers: list[LayerRow]
    float_bytes: int
    quantized_bytes: int
    notes: dict[str, str]
    accuracy: float | None = None
    histograms: dict[str, WeightHistogram] = field(default_factory=dict, repr=False)

    @property
    def ratio(self) -> float:
        return self.float_bytes / max(self.quantized_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["histograms"]
        return {**values, "ratio": self.ratio}

    def html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Quantization report",
        accuracies: Mapping[str, Mapping[float, float]] | None = None,
        latency: Mapping[str, Any] | None = None,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        """Writes the report as one page: plots, the table and the notes, with all that they need in the file.

        The page holds the clipped share and SQNR of each layer, bits and sizes, and each quantized weight as a
        histogram on its grid, the worst layers first; and as JSON what ``to_dict`` gives. It has no scripts and asks
        for nothing from a network. A file that was at ``path`` stays until the new one is whole.

        Args:
            path: of the file.
            title: of the page.
            accuracies: what was measured elsewhere, by a name for each series: bits -> accuracy (0 to 1), such as
                ``{"fp32": {32: 0.93}, "PTQ": {8: 0.93, 4: 0.71}, "QAT": {8: 0.93, 4: 0.92}}``. A series of one point is
                drawn as a level.
            latency: seconds by the name of a model (``{"fp32": 0.012, "int8": 0.004}``), or what ``measure_latency``
                returns.
            log: a CSV file of ``TrainingLog``, for the losses, widths, changes of codes and clipped shares by step.

        Raises:
            ImportError: matplotlib is missing.
            TypeError, ValueError: accuracies or latency hold something else; log is another file; path is no path.
            OSError: a file cannot be read or written; the text names argument and file.
        """
        from .report_page import page  # which imports this file

        text = page(self, title, accuracies, latency, log)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")

    def table(self) -> list[list[str]]:
        """The cells that ``print`` shows: a line of headings, and one for each layer; it raises nothing."""
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
        return [header] + [
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

    def __str__(self) -> str:
        table = self.table()
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
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


def _cell(value: float | None, spec: str, missing: str = "–") -> str:
    return missing if value is None else format(value, spec)
