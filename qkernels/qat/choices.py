"""One choice for each of several items: the smallest sum of scores under a budget (the multiple-choice knapsack)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 1e-12  # relative: sums of costs in another order may differ in their last bits


@dataclass(frozen=True)
class Choice:
    """What an item costs, and how bad it is, if it is chosen so."""

    cost: float
    score: float


Options = Sequence[Sequence[Choice]]  # of each item
Picked = tuple[int, ...]  # the place of the choice of each item
Step = tuple[float, float, int, int]  # to a better choice: its cost, its gain, the item, the place of the choice


def total(options: Options, picked: Picked) -> tuple[float, float]:
    """The sums of costs and of scores."""
    chosen = [choices[at] for choices, at in zip(options, picked, strict=True)]
    return sum(choice.cost for choice in chosen), sum(choice.score for choice in chosen)


def cheapest(options: Options) -> Picked:
    """Each item as cheap as it gets; among equal costs with the best score."""
    return tuple(min(range(len(c)), key=lambda at: (c[at].cost, c[at].score)) for c in options)


def front(options: Options) -> list[Picked]:
    """The corners of the convex front of cost and score, from the cheapest to the best.

    No plan costs as little as one of these and has a better score. From each to the next one item changes, and to a
    better score. It is the order in which the relaxed problem (a share of a choice is allowed) takes its steps.
    """
    picked = list(cheapest(options))
    found = [tuple(picked)]
    for _, _, item, at in _steps(options):
        picked[item] = at
        found.append(tuple(picked))
    return found


def best(options: Options, budget: float) -> Picked | None:
    """The choices with the smallest sum of scores whose costs are within the budget; None: there are none.

    Exact, by dynamic programming over the items. It keeps the pairs of cost and score that no other pair beats in both,
    and of these only what may still beat the best plan known so far: the sum of a pair and the relaxed problem of the
    items left bounds what it can lead to.
    """
    limit = budget if math.isinf(budget) else budget + SLACK * abs(budget)
    first = cheapest(options)
    if total(options, first)[0] > limit:
        return None
    known = _filled(options, first, limit)
    bound = total(options, known)[1]
    spread = sum(max(c.score for c in choices) - min(c.score for c in choices) for choices in options)
    # Sums in another order differ in their last bits, also where each item has a single choice and the spread is 0.
    bound += 1e-9 * spread + SLACK * sum(max(abs(c.score) for c in choices) for choices in options)
    costs, scores = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    history: list[tuple[Tensor, Tensor]] = []
    steps = _steps(options)
    for item, choices in enumerate(options):
        more = torch.tensor([[choice.cost, choice.score] for choice in choices], dtype=torch.float64)
        costs, scores = ((sums[:, None] + more[:, column]).reshape(-1) for column, sums in ((0, costs), (1, scores)))
        places = torch.arange(len(costs))
        steps = [step for step in steps if step[2] > item]
        relaxed = _Relaxed(options[item + 1 :], steps)
        kept = scores + relaxed.least(limit - costs) <= bound
        costs, scores, places = costs[kept], scores[kept], places[kept]
        order = torch.argsort(scores, stable=True)
        order = order[torch.argsort(costs[order], stable=True)]
        costs, scores, places = costs[order], scores[order], places[order]
        lowest = torch.cummin(scores, 0).values
        unbeaten = torch.ones(len(scores), dtype=torch.bool)
        unbeaten[1:] = scores[1:] < lowest[:-1]
        costs, scores, places = costs[unbeaten], scores[unbeaten], places[unbeaten]
        history.append((places // len(choices), places % len(choices)))
    at, picked = len(costs) - 1, []  # scores fall as costs rise
    for parents, chosen in reversed(history):
        picked.append(int(chosen[at]))
        at = int(parents[at])
    return tuple(reversed(picked))


class _Relaxed:
    """The relaxed problem of the items that are left: the least sum of scores for a given rest of the budget."""

    def __init__(self, options: Options, steps: Sequence[Step]) -> None:
        self.cost, self.score = total(options, cheapest(options))
        table = torch.tensor([[0.0, 0.0]] + [[cost, gain] for cost, gain, _, _ in steps], dtype=torch.float64)
        self.costs, self.gains = table.cumsum(0).T.contiguous()

    def least(self, budget: Tensor) -> Tensor:
        left = budget - self.cost
        at = torch.searchsorted(self.costs, left.contiguous(), right=True).clamp(min=1) - 1
        after = (at + 1).clamp(max=len(self.costs) - 1)
        width = self.costs[after] - self.costs[at]
        share = torch.where(width > 0, (left - self.costs[at]) / width, 0).clamp(0, 1)
        gain = self.gains[at] + share * (self.gains[after] - self.gains[at])
        return torch.where(left >= -SLACK * budget.abs(), self.score - gain, torch.inf)


def _steps(options: Options) -> list[Step]:
    """The steps from the cheapest choices along each item's convex front, best first."""
    steps = []
    for item, choices in enumerate(options):
        corners = _corners(choices)
        for before, after in itertools.pairwise(corners):
            a, b = choices[before], choices[after]
            steps.append((b.cost - a.cost, a.score - b.score, item, after))
    return sorted(steps, key=lambda step: -step[1] / step[0])  # stable: an item's steps, ever less worth, stay in order


def _corners(choices: Sequence[Choice]) -> list[int]:
    """The choices on the convex front of one item, by cost."""
    found: list[int] = []
    for at in sorted(range(len(choices)), key=lambda at: (choices[at].cost, choices[at].score)):
        if found and choices[at].score >= choices[found[-1]].score:
            continue
        while len(found) > 1 and _slope(choices, found[-2], found[-1]) <= _slope(choices, found[-1], at):
            found.pop()
        found.append(at)
    return found


def _slope(choices: Sequence[Choice], before: int, after: int) -> float:
    """By how much the score falls for a unit of cost."""
    a, b = choices[before], choices[after]
    return (a.score - b.score) / (b.cost - a.cost)


def _filled(options: Options, picked: Picked, limit: float) -> Picked:
    """A good plan to begin with: the steps of the relaxed problem that fit, one after the other."""
    now = list(picked)
    for _, _, item, at in _steps(options):
        tried = (*now[:item], at, *now[item + 1 :])
        if total(options, tried)[0] <= limit and options[item][at].score < options[item][now[item]].score:
            now = list(tried)
    return tuple(now)
