"""Sensitivity: the table that ``sensitivity`` makes and ``assign`` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_json import plain, spec_of
from .spec import QSpec, check_keys, listed

METRICS = ("sqnr", "kl", "loss", "fisher", "hessian")
Specs = Mapping[str, QSpec | None]


@dataclass(frozen=True)
class SensitivityRow:
    """The scores of one or more layers whose weights, or whose inputs, have one width.

    Attributes:
        layers: their names.
        tensor: "weight" or "input".
        scores: bits -> score; the larger, the worse.
        elements: of the weights, a tied one counted once; 0 for inputs.
        bytes: bits -> bytes of the weights' codes and scales in a file of the converted model; 0 for inputs.
        multiplications: by the layers' weights, of one sample; None: not known.
    """

    layers: tuple[str, ...]
    tensor: str
    scores: Mapping[int, float]
    elements: int = 0
    bytes: Mapping[int, int] = field(default_factory=dict)
    multiplications: float | None = 0.0


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """What quantization costs, for each layer and width; ``print`` shows a table, the worst layer first.

    Attributes:
        metric: of the scores.
        rows: a ``SensitivityRow`` for the weights, and one for the inputs, of each layer or group of layers.
        specs: layer -> pattern of a rule for it -> kind of tensor -> the QSpec that it had (None: float).
        unreached: layers that no batch reached. They have no scores.
        adapters: that field of the QConfig.
    """

    metric: str
    rows: tuple[SensitivityRow, ...]
    specs: Mapping[str, Mapping[str, Specs]]
    unreached: tuple[str, ...] = ()
    adapters: str = "base"

    def worst_first(self) -> list[SensitivityRow]:
        """The rows in the order of their largest score; it raises nothing."""
        return sorted(self.rows, key=lambda row: (-max(row.scores.values()), row.layers, row.tensor))

    def to_dict(self) -> dict[str, Any]:
        """The table as values that JSON knows, of which ``from_dict`` makes an equal one; it raises nothing."""
        rows = [
            {
                "layers": list(row.layers),
                "tensor": row.tensor,
                "scores": {str(bits): score for bits, score in row.scores.items()},
                "elements": row.elements,
                "bytes": {str(bits): size for bits, size in row.bytes.items()},
                "multiplications": row.multiplications,
            }
            for row in self.rows
        ]
        specs = {
            name: {pattern: {kind: plain(spec) for kind, spec in kinds.items()} for pattern, kinds in rules.items()}
            for name, rules in self.specs.items()
        }
        return {
            "metric": self.metric,
            "rows": rows,
            "specs": specs,
            "unreached": list(self.unreached),
            "adapters": self.adapters,
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON; it raises nothing."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The table that ``to_dict`` wrote.

        Raises:
            ValueError: an unknown or a missing key.
        """
        check_keys("values", values, ("metric", "rows", "specs", "unreached", "adapters"))
        try:
            rows = tuple(
                SensitivityRow(
                    tuple(row["layers"]),
                    row["tensor"],
                    {int(bits): float(score) for bits, score in row["scores"].items()},
                    row["elements"],
                    {int(bits): size for bits, size in row["bytes"].items()},
                    row["multiplications"],
                )
                for row in values["rows"]
            )
            specs = {
                name: {
                    pattern: {kind: spec_of(spec) for kind, spec in kinds.items()} for pattern, kinds in rules.items()
                }
                for name, rules in values["specs"].items()
            }
            return cls(values["metric"], rows, specs, tuple(values["unreached"]), values["adapters"])
        except KeyError as error:
            raise ValueError(f"values: got none for {error}; accepted: what to_dict returns") from None

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The table that ``to_json`` wrote.

        Raises:
            ValueError: no JSON, or as ``from_dict``.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: got no JSON ({error}); accepted: what to_json returns") from None
        return cls.from_dict(values)

    def __repr__(self) -> str:
        widths = sorted({bits for row in self.rows for bits in row.scores}, reverse=True)
        unit = " (dB)" if self.metric == "sqnr" else ""
        table = [["layer", "tensor", *(f"{bits} bits{unit}" for bits in widths), "weights"]]
        for row in self.worst_first():
            cells = [self._cell(row.scores[bits]) if bits in row.scores else "–" for bits in widths]
            table.append([listed(row.layers), row.tensor, *cells, str(row.elements or "–")])
        lengths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(
                cell.ljust(n) if i < 2 else cell.rjust(n) for i, (cell, n) in enumerate(zip(line, lengths, strict=True))
            ).rstrip()
            for line in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        head = f"Sensitivity, metric {self.metric!r}" + ("" if self.metric == "sqnr" else " (larger is worse)")
        notes = [f"no batch reached {', '.join(self.unreached)}"] if self.unreached else []
        return "\n".join([head, *lines, *notes])

    def _cell(self, score: float) -> str:
        if self.metric != "sqnr":
            return f"{score:.3g}"
        return "inf" if score <= 0 else f"{-10 * math.log10(score):.1f}"
