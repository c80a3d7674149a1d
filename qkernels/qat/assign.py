"""assign: the widths of all layers whose summed score is smallest under a budget."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..nn.quantizer_rules import nearest
from .choices import Choice, Picked, best, cheapest, front, total
from .config import QConfig, Rule
from .sensitivity_table import Sensitivity, SensitivityRow
from .spec import listed

COSTS = ("bytes", "bits", "bitops")
FLOAT_BITS = 32  # of the side of a product that is not quantized
Costs = Mapping[str, Mapping[int, float]]  # layer -> bits of its weights -> cost


@dataclass(frozen=True, repr=False)
class Widths:
    """A width for each layer, what it costs, and its summed score.

    Attributes:
        bits: layer -> "weight" or "input" -> bits, for those that the sensitivity has scores of.
        cost: in the unit of the budget.
        score: the sum of the scores.
    """

    bits: Mapping[str, Mapping[str, int]]
    cost: float
    score: float
    sensitivity: Sensitivity

    @property
    def config(self) -> QConfig:
        """The QConfig with a rule for each layer, for ``prepare`` of the float model."""
        rules: list[Rule] = []
        for layer, patterns in self.sensitivity.specs.items():
            for pattern, specs in patterns.items():
                overrides = {
                    kind: spec if spec is None else replace(spec, bits=self.bits.get(layer, {}).get(kind, spec.bits))
                    for kind, spec in specs.items()
                }
                rules.append((glob.escape(pattern), overrides))
        return QConfig(weight=None, input=None, rules=rules, adapters=self.sensitivity.adapters)


@dataclass(frozen=True, repr=False)
class Assignment(Widths):
    """The best widths under a budget; ``print`` shows them, and what equal widths everywhere cost and score.

    Attributes:
        bits, cost, score, config: as in ``Widths``.
        budget, unit: what was asked for.
        front: ``Widths`` from the cheapest to the best: the corners of the convex front of cost and score.
        uniform: bits -> (cost, score) of the plan with that width everywhere, or the next wider one that a layer takes.
    """

    budget: float = math.inf
    unit: str = ""
    front: tuple[Widths, ...] = ()
    uniform: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        names = [layer or "(model)" for layer in self.bits]
        length = max(map(len, ["layer", *names]))
        lines = [f"{'layer'.ljust(length)}  weight  input"]
        for name, own in zip(names, self.bits.values(), strict=True):
            weight, given = (str(own.get(kind, "–")) for kind in ("weight", "input"))
            lines.append(f"{name.ljust(length)}  {weight.rjust(6)}  {given.rjust(5)}")
        lines.append(f"{self.cost:.6g} of {self.budget:.6g} {self.unit}, score {self.score:.3g}")
        for bits, (cost, score) in self.uniform.items():
            lines.append(f"{bits} bits everywhere: {cost:.6g} {self.unit}, score {score:.3g}")
        return "\n".join(lines)


@dataclass
class _Item:
    """A group of layers, and the widths that it can have, with the cost and score of each."""

    layers: tuple[str, ...]
    widths: list[dict[str, int]]
    choices: list[Choice]


def assign(sensitivity: Sensitivity, budget: float, *, cost: str | Costs = "bytes") -> Assignment:
    """The widths of all layers with the smallest summed score whose summed cost is within the budget.

    Exact: no other widths within the budget have a smaller sum, so none is worse than the uniform plan of equal cost.
    A wider width never counts as worse than a narrower one, where chance made its score so. The sum of scores stands
    for the model's error only while the scores are small: measure the plans that you mean to use.

    Args:
        sensitivity: from ``sensitivity``; layers that are not in it have no part in the cost.
        budget: the most that the layers may cost together, in the unit of ``cost``.
        cost: what the budget limits.
            - "bytes": the weights' codes and scales in the converted model's file, where 5 to 8 bits take a byte.
            - "bits": the mean width of a weight.
            - "bitops": multiplications of one sample times the bits of both factors (a float one: 32); this one alone
              narrows inputs too.
            - a mapping layer -> bits of its weights -> cost, of which a group of layers pays the sum: what
              ``measure_latency`` returns, in seconds, or any table of your own.

    Returns:
        An ``Assignment``: ``qk.prepare(model, found.config)`` makes the model; ``found.front`` holds cheaper and better
        plans.

    Raises:
        ValueError: a budget that no widths meet (the text names the smallest that can be met), an unknown cost, or one
            that is not known for a layer.
        TypeError: another type of an argument.
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(f"sensitivity: got a {type(sensitivity).__name__}; accepted: what qk.sensitivity returns")
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget: got {budget!r}; accepted: a number")
    if math.isnan(budget):
        raise ValueError("budget: got nan; accepted: a number")
    if not isinstance(cost, str | Mapping):
        raise TypeError(f"cost: got a {type(cost).__name__}; accepted: {', '.join(COSTS)}, a mapping")
    if isinstance(cost, str) and cost not in COSTS:
        raise ValueError(f"cost: got {cost!r}; accepted: {', '.join(COSTS)}, a mapping{nearest(cost, COSTS)}")
    items = _items(sensitivity, cost)
    options = [item.choices for item in items]
    unit = "mean bits" if cost == "bits" else cost if isinstance(cost, str) else "in total"
    least = total(options, cheapest(options))[0]
    picked = best(options, budget)
    if picked is None:
        raise ValueError(f"budget: got {budget:.6g} {unit}; accepted: at least {least:.10g}, the least that can be met")

    def widths_of(picked: Picked) -> Widths:
        bits = {layer: item.widths[at] for item, at in zip(items, picked, strict=True) for layer in item.layers}
        in_order = {layer: bits[layer] for layer in sensitivity.specs if layer in bits}
        return Widths(in_order, *total(options, picked), sensitivity)

    tried = sorted({bits for row in sensitivity.rows for bits in row.scores}, reverse=True)
    uniform = {bits: total(options, tuple(_uniform(item, bits) for item in items)) for bits in tried}
    return Assignment(
        **vars(widths_of(picked)),
        budget=budget,
        unit=unit,
        front=tuple(map(widths_of, front(options))),
        uniform=uniform,
    )


def _items(sensitivity: Sensitivity, cost: str | Costs) -> list[_Item]:
    rows: dict[tuple[str, ...], dict[str, SensitivityRow]] = {}
    for row in sensitivity.rows:
        rows.setdefault(row.layers, {})[row.tensor] = row
    elements = sum(row.elements for row in sensitivity.rows)
    items = []
    for layers, of in rows.items():
        weight = of.get("weight")
        if weight is None and cost != "bitops":
            continue
        inputs = of.get("input") if cost == "bitops" else None
        item = _Item(layers, [], [])
        for wide, bad in _scores(weight):
            for given, worse in _scores(inputs):
                price = _price(cost, layers, of, wide, given, elements)
                pair = {"weight": wide, "input": given}
                item.widths.append({kind: bits for kind, bits in pair.items() if bits is not None})
                item.choices.append(Choice(price, bad + worse))
        items.append(item)
    if not items:
        raise ValueError(f"cost: got {cost!r} for a sensitivity without weights; accepted: 'bitops'")
    return items


def _scores(row: SensitivityRow | None) -> list[tuple[int | None, float]]:
    """Widths and scores from the widest on, none of which is smaller than those before."""
    if row is None:
        return [(None, 0.0)]
    found: list[tuple[int | None, float]] = []
    worst = -math.inf
    for bits in sorted(row.scores, reverse=True):
        worst = max(worst, row.scores[bits])
        found.append((bits, worst))
    return found


def _price(
    cost: str | Costs,
    layers: tuple[str, ...],
    rows: Mapping[str, SensitivityRow],
    weight: int | None,
    given: int | None,
    elements: int,
) -> float:
    row = rows.get("weight") or rows["input"]
    if cost == "bitops":
        if row.multiplications is None:
            raise ValueError(
                f"cost: got 'bitops', but the products of {listed(layers)} are not known; accepted: 'bytes', 'bits', "
                "or a sensitivity of a model whose config leaves these in float"
            )
        return row.multiplications * (weight or FLOAT_BITS) * (given or FLOAT_BITS)
    assert weight is not None
    if cost == "bits":
        return row.elements * weight / elements
    if cost == "bytes":
        return row.bytes[weight]
    assert not isinstance(cost, str)
    return sum(_of_layer(cost, layer, weight) for layer in layers)


def _of_layer(cost: Costs, layer: str, bits: int) -> float:
    of_layer = cost.get(layer, {})
    if not isinstance(of_layer, Mapping):
        raise TypeError(f"cost: got {of_layer!r} for {layer!r}; accepted: a mapping from bits to costs")
    value: Any = of_layer.get(bits)
    if value is None:
        raise ValueError(f"cost: got none for {layer!r} at {bits} bits; accepted: one for each width that was tried")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"cost: got {value!r} for {layer!r} at {bits} bits; accepted: a finite number")
    return value


def _uniform(item: _Item, bits: int) -> int:
    """The choice with this width, or the next wider one (of those that the item has)."""

    def distance(at: int) -> Any:
        return [(width < bits, abs(width - bits)) for width in item.widths[at].values()]

    return min(range(len(item.widths)), key=distance)
