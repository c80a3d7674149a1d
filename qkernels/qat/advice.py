"""Advice: what ``advise`` measured and says, as a table, as code to paste, and as JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import QConfig
from .sensitivity_table import Sensitivity
from .spec import listed

PTQ, MORE_BITS, QAT = "ptq", "more bits", "qat"


@dataclass(frozen=True)
class WidthAdvice:
    """What to do for weights of one width, with the plan that it is about.

    Attributes:
        bits: the width; None: the best widths under the budget.
        verdict: "ptq", "more bits" or "qat".
        layers: "more bits": the tensors to widen, such as "conv1 weight"; "qat": the layers to train; "ptq": none.
        every_layer: whether ``layers`` is every layer with quantized weights.
        config: of the plan.
        steps: what made the score: "calibrate", and where it helped "gptq" and "correct_bias".
        score: of the plan, after these steps and without training.
        plain_score: of equal widths (of the plan under the budget) after these steps; ``score`` but for "more bits".
        bytes: codes and scales of the plan's weights in the converted model's file.
        seconds: of a call of the converted plan on the first batch; None: it does not convert (``Advice.notes``).
    """

    bits: int | None
    verdict: str
    layers: tuple[str, ...]
    every_layer: bool
    config: QConfig
    steps: tuple[str, ...]
    score: float
    plain_score: float
    bytes: int
    seconds: float | None


@dataclass(frozen=True, repr=False)
class Advice:
    """What ``advise`` found; ``print`` shows the table, the verdict and the code.

    Attributes:
        widths: a ``WidthAdvice`` for each width, the widest first, and last the one under the budget, if one was given.
        chosen: the one to follow: under the budget, or else the smallest that needs no training; if all need some, the
            widest.
        float_score, float_bytes, float_seconds: of the float model; bytes of the weights that are quantized.
        shuffled_score: of the float model with the elements of each weight in another order: what chance gives; -inf:
            it was not finite.
        tolerance: the loss of score that is accepted.
        step_seconds: of one step of QAT; None: there was no ``loss``.
        training_steps: the steps that QAT is taken to need.
        sensitivity: the scores of each layer's weights and inputs.
        notes: what else there is to know.
    """

    widths: tuple[WidthAdvice, ...]
    chosen: WidthAdvice
    float_score: float
    float_bytes: int
    float_seconds: float
    shuffled_score: float
    tolerance: float
    step_seconds: float | None
    training_steps: int
    sensitivity: Sensitivity
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Of ``chosen``: "ptq", "more bits" or "qat"."""
        return self.chosen.verdict

    @property
    def config(self) -> QConfig:
        """Of ``chosen``, for ``prepare``."""
        return self.chosen.config

    @property
    def qat_seconds(self) -> float | None:
        """The estimated time of QAT: ``training_steps`` times ``step_seconds``."""
        return None if self.step_seconds is None else self.training_steps * self.step_seconds

    def at(self, bits: int | None) -> WidthAdvice:
        """The advice for one width; None: under the budget.

        Raises:
            ValueError: a width that was not tried.
        """
        found = next((each for each in self.widths if each.bits == bits), None)
        if found is None:
            tried = ", ".join(str(each.bits) for each in self.widths)
            raise ValueError(f"bits: got {bits!r}; accepted: {tried}")
        return found

    @property
    def code(self) -> str:
        """Python that follows the advice, where ``model`` and ``batches`` are what ``advise`` got."""
        names = sorted({"QConfig", *re.findall(r"\b(QSpec|Per\w+)\(", repr(self.config))})
        types = [pattern for pattern, _ in self.config.rules if isinstance(pattern, type)]
        modules = {"torch" if getattr(nn, kind.__name__, None) is kind else kind.__module__ for kind in types}
        lines = [
            *(f"import {module}" for module in sorted(modules)),
            "import qkernels as qk",
            f"from qkernels import {', '.join(names)}",
            "",
            f"config = {self.config!r}",
        ]
        lines += ["prepared = qk.prepare(model, config)", "qk.calibrate(prepared, batches)"]
        # Training starts from unrounded weights: it moves them, and rounded ones have fixed scales.
        for step in self.chosen.steps[1:] if self.verdict != QAT else ():
            lines.append(f"qk.{step}(prepared, batches{', float_model=model' if step == 'correct_bias' else ''})")
        if self.verdict == QAT:
            if not self.chosen.every_layer:
                lines += ["prepared.requires_grad_(False)", f"for name in {list(self.chosen.layers)!r}:"]
                lines.append("    prepared.get_submodule(name).requires_grad_(True)")
            lines.append("# now train prepared.train() with torch.optim.AdamW(qk.parameter_groups(prepared, lr))")
        return "\n".join([*lines, "converted = qk.convert(prepared.eval())"])

    def to_dict(self) -> dict[str, Any]:
        """All figures as values that JSON knows; configs as ``QConfig.to_json`` writes them. It raises nothing."""
        return {
            "verdict": self.verdict,
            "chosen": self.widths.index(self.chosen),
            "code": self.code,
            "float": {"score": self.float_score, "bytes": self.float_bytes, "seconds": self.float_seconds},
            "shuffled_score": self.shuffled_score if math.isfinite(self.shuffled_score) else None,
            "tolerance": self.tolerance,
            "widths": [
                {**vars(each), "config": json.loads(each.config.to_json()), "layers": list(each.layers),
                 "steps": list(each.steps)}
                for each in self.widths
            ],
            "step_seconds": self.step_seconds,
            "training_steps": self.training_steps,
            "qat_seconds": self.qat_seconds,
            "sensitivity": self.sensitivity.to_dict(),
            "notes": list(self.notes),
        }  # fmt: skip

    def __repr__(self) -> str:
        table = [["weights", "score", "loss", "kB", "ms", "advice"]]
        table.append(["float", f"{self.float_score:.4g}", "", _kb(self.float_bytes), _ms(self.float_seconds), ""])
        for each in self.widths:
            loss = self.float_score - each.plain_score
            cells = ["budget" if each.bits is None else f"{each.bits} bits", f"{each.plain_score:.4g}", f"{loss:.3g}"]
            table.append([*cells, _kb(each.bytes), _ms(each.seconds), self._advice(each)])
        lengths = [max(len(line[column]) for line in table) for column in range(5)]
        lines = [
            "  ".join([line[0].ljust(lengths[0]), *(c.rjust(n) for c, n in zip(line[1:5], lengths[1:], strict=True))])
            + f"  {line[5]}".rstrip()
            for line in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(
            f"accepted loss: {self.tolerance:.3g}; score of shuffled weights: {self.shuffled_score:.4g}; score and "
            "loss without training, kB and ms of what is advised"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", self._summary(), "", self.code])

    def _advice(self, each: WidthAdvice) -> str:
        if each.verdict == PTQ:
            return f"PTQ is enough ({', '.join(each.steps)})"
        if each.verdict == MORE_BITS:
            return f"more bits for {listed(each.layers)}: {each.score:.4g} ({', '.join(each.steps)})"
        return f"QAT of {'all layers' if each.every_layer else listed(each.layers)}"

    def _summary(self) -> str:
        name = "under the budget" if self.chosen.bits is None else f"{self.chosen.bits} bits"
        text = f"Follow: {name}: {self._advice(self.chosen)}."
        seconds = self.qat_seconds
        if seconds is not None and any(each.verdict == QAT for each in self.widths):
            text += f" QAT takes about {_time(seconds)}: {self.training_steps} steps of {_ms(self.step_seconds)} ms."
        return text


def _kb(count: int) -> str:
    return f"{count / 1e3:.1f}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.3g}"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"
