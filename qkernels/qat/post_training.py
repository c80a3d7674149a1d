"""PostTraining: scores, sizes and times of a float model that is quantized without training, by plans of widths."""

from __future__ import annotations

import contextlib
import glob
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .bias_correction import correct_bias
from .calibrate import calibrate, call
from .config import QConfig, Rule
from .convert import convert
from .copying import copy_of
from .gptq import gptq
from .latency import timed
from .layerwise import roundable
from .prepare import prepare
from .presets import presets
from .repeated_batches import seed
from .sensitivity import sensitivity
from .sensitivity_table import SensitivityRow
from .spec import QSpec

FLOAT = None  # the width of a tensor that stays in float
WIDEST = 8
CALLS = 10  # of which the median time is taken
Key = tuple[tuple[str, ...], str]  # layers, and "weight" or "input": a row of the sensitivity
Plan = Mapping[Key, int | None]  # the width of each row


@dataclass(frozen=True)
class Tried:
    """A plan, with the model that it makes and its score."""

    plan: Plan
    config: QConfig
    prepared: nn.Module
    steps: tuple[str, ...]
    score: float


class PostTraining:
    """A float model, which stays as it is, and what it is worth when it is quantized without training.

    Attributes:
        found: the sensitivity.
        rows: its rows, the most sensitive first.
        notes: what warnings said.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        evaluate: Callable[[nn.Module], Any],
        widths: Sequence[int],
        config: QConfig | str | None,
    ) -> None:
        self.model, self.batches, self.evaluate = model, batches, evaluate
        self.notes: list[str] = []
        with self._noting():
            self.found = sensitivity(model, batches, bits=sorted({*widths, WIDEST}, reverse=True), config=config)
        self.rows: dict[Key, SensitivityRow] = {(row.layers, row.tensor): row for row in self.found.worst_first()}
        if not any(kind == "weight" for _, kind in self.rows):
            raise ValueError(f"config: got {config!r}, which leaves all weights in float; accepted: one that does not")
        self.base = QConfig() if config is None else presets[config] if isinstance(config, str) else config
        self.modules = dict(model.named_modules())

    def score(self, model: nn.Module, what: str) -> float:
        """What ``evaluate`` says of a model in eval mode."""
        seed(next((t.device for t in self.model.parameters()), torch.device("cpu")))
        with torch.no_grad():
            value = self.evaluate(model.eval())
        return number_of(value, what)

    def shuffled_score(self) -> float:
        """Of the float model with the elements of each weight in another order; -inf: none that is finite."""
        model = copy_of(self.model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))
        try:
            return self.score(model, "shuffled weights")
        except ValueError:
            return -math.inf

    def uniform(self, width: int) -> Plan:
        """This width for all weights, or the next wider one that a layer takes; inputs have that of the config."""
        plan: dict[Key, int | None] = {}
        for key, row in self.rows.items():
            wider = [bits for bits in row.scores if bits >= width]
            plan[key] = self._input_bits(key) if key[1] == "input" else min(wider, default=max(row.scores))
        return plan

    def _input_bits(self, key: Key) -> int | None:
        specs = [kinds.get("input") for layer in key[0] for kinds in self.found.specs[layer].values()]
        return next((spec.bits for spec in specs if spec is not None), FLOAT)

    def bytes_of(self, plan: Plan) -> int:
        """Codes and scales of the weights in the converted model's file; of float ones their elements, in fp32."""
        return sum(4 * row.elements if (bits := plan[key]) is None else row.bytes.get(bits, 0)
                   for key, row in self.rows.items())  # fmt: skip

    def sensitivity_of(self, key: Key, bits: int | None) -> float:
        """The score of a row at a width; a width of inputs that was not tried counts as the next wider one tried."""
        if bits is None:
            return 0.0
        scores = self.rows[key].scores
        return max(scores[min((tried for tried in scores if tried >= bits), default=max(scores))], 0.0)

    def config(self, plan: Plan) -> QConfig:
        """The user's config with the plan's most usual width for weights, and rules for what differs from it."""
        weights = Counter(bits for (_, kind), bits in plan.items() if kind == "weight" and bits is not None)
        base = self.base
        if base.weight is not None and weights:
            base = replace(base, weight=replace(base.weight, bits=weights.most_common(1)[0][0]))
        rules: list[Rule] = [(glob.escape(name), None) for name in self.found.unreached]
        for layer, patterns in self.found.specs.items():
            wanted = {kind: bits for (layers, kind), bits in plan.items() if layer in layers}
            for pattern, specs in patterns.items():
                present = {kind: wanted[kind] for kind, spec in specs.items() if spec is not None and kind in wanted}
                rules += self._rule(base, pattern, self.modules[layer], present)
        return replace(base, rules=[*base.rules, *rules])

    @staticmethod
    def _rule(base: QConfig, name: str, module: nn.Module, wanted: Mapping[str, int | None]) -> list[Rule]:
        """The rule, if one is needed, that gives kinds of tensors of this module, or parameter, these widths."""
        deciding = base.rule_of(name, module)
        overrides: dict[str, Any] = {} if deciding is None else dict(deciding[1] or {})
        own = base.specs(name, module)
        changed: dict[str, Any] = {}
        for kind, bits in wanted.items():
            spec = own[kind]
            if bits is None:
                changed[kind] = FLOAT
            elif spec is None or spec.bits != bits:
                given = overrides.get(kind, {})
                changed[kind] = (
                    replace(given, bits=bits) if isinstance(given, QSpec) else {**(given or {}), "bits": bits}
                )
        return [(glob.escape(name), {**overrides, **changed})] if changed else []

    def tried(self, plan: Plan, enough: float) -> Tried:
        """The plan after ``calibrate``, and if that scores less than enough, after ``gptq`` and ``correct_bias``."""
        config = self.config(plan)
        with self._noting():
            prepared = prepare(self.model, config)
            calibrate(prepared, self.batches)
        score = self.score(prepared, "the quantized model")
        first = Tried(plan, config, prepared, ("calibrate",), score)
        names = [name for name in roundable(prepared) if name not in self.found.unreached]
        if score >= enough or not names:
            return first
        rounded = copy_of(prepared)
        with self._noting():
            gptq(rounded, self.batches, where=names)
            correct_bias(rounded, self.batches, where=names, float_model=self.model)
        score = self.score(rounded, "the quantized model")
        steps = ("calibrate", "gptq", "correct_bias")
        return Tried(plan, config, rounded, steps, score) if score > first.score else first

    def seconds(self, prepared: Sequence[nn.Module]) -> tuple[float, list[float | None]]:
        """Of a call of the float model, and of each of these models converted, on the first batch."""
        models: dict[int, nn.Module] = {-1: copy_of(self.model).eval()}
        for at, model in enumerate(prepared):
            try:
                models[at] = convert(model.eval())
            except ValueError as error:
                self._note(f"no time of the converted model, as it does not convert: {error}")
        with torch.no_grad():
            found = timed({at: self._calling(model) for at, model in models.items()}, CALLS)
        return found[-1], [found.get(at) for at in range(len(prepared))]

    def _calling(self, model: nn.Module) -> Callable[[], Any]:
        return lambda: call(model, self.batches[0])

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Keeps warnings as notes, each once: every plan would give them again."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        for warning in caught:
            self._note(str(warning.message))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def number_of(value: Any, what: str) -> float:
    """The number that ``evaluate`` returned, if it did."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    try:
        number = value if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        number = None
    if not isinstance(number, float):
        raise TypeError(f"evaluate: returned {value!r} for {what}; accepted: a number, higher for a better model")
    if not math.isfinite(number):
        raise ValueError(f"evaluate: returned {number} for {what}; accepted: a finite number")
    return number
