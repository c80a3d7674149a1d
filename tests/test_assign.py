"""assign: the best plan of all under a budget, beside brute force; configs that prepare takes; measured latencies."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, quantizers, snapshot
from torch import nn

import qkernels as qk
from qkernels.qat import QSpec, Sensitivity, SensitivityRow, Widths
from qkernels.qat.choices import Choice, best, cheapest, front, total

WIDTHS = (8, 4, 3, 2)


def table(scores, elements, inputs=None) -> Sensitivity:
    """A sensitivity of layers "0", "1", … with these scores for each of WIDTHS."""
    rows, specs = [], {}
    for at, (of, n) in enumerate(zip(scores, elements, strict=True)):
        name = str(at)
        sizes = {bits: n * bits // 8 for bits in WIDTHS}
        rows.append(SensitivityRow((name,), "weight", dict(zip(WIDTHS, of, strict=True)), n, sizes, 10 * n))
        if inputs:
            rows.append(SensitivityRow((name,), "input", dict(zip(WIDTHS, inputs[at], strict=True)), 0, {}, 10 * n))
        specs[name] = {name: {"weight": QSpec(8), "input": QSpec(8, symmetric=False), "output": None}}
    return Sensitivity("sqnr", tuple(rows), specs)


def random_table(seed: int, layers: int, inputs: bool = False) -> Sensitivity:
    draw = random.Random(seed)

    def scores():
        return sorted(draw.random() ** 3 for _ in WIDTHS)

    given = [scores() for _ in range(layers)] if inputs else None
    return table([scores() for _ in range(layers)], [8 * draw.randint(1, 500) for _ in range(layers)], given)


@pytest.mark.parametrize("seed", range(60))
def test_best_and_front_beside_brute_force(seed: int) -> None:
    """With ties, equal costs and negative scores among them."""
    draw = random.Random(seed)

    def number(most):
        return draw.randint(0, most) if seed % 2 else draw.uniform(-1, most)

    options = [[Choice(number(9), number(6)) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 5))]
    every = [total(options, picked) for picked in itertools.product(*(range(len(choices)) for choices in options))]
    lowest, highest = min(cost for cost, _ in every), max(cost for cost, _ in every)
    assert best(options, lowest - 1e-6) is None
    for budget in (lowest, highest, *(draw.uniform(lowest, highest) for _ in range(5))):
        picked = best(options, budget)
        cost, score = total(options, picked)
        within = [plan for plan in every if plan[0] <= budget + 1e-9]
        assert cost <= budget + 1e-9
        assert score == pytest.approx(min(each for _, each in within), abs=1e-9)
        equal = [each for each, of in within if of <= score + 1e-12]
        assert cost <= min(equal) + 1e-9, "among the best plans, the cheapest"
    corners = [total(options, picked) for picked in front(options)]
    assert corners[0] == total(options, cheapest(options))
    assert corners[-1][1] == pytest.approx(min(score for _, score in every))
    for before, after in itertools.pairwise(corners):
        assert before[0] < after[0]
        assert before[1] > after[1]
    for cost, score in corners:
        assert not any(other <= cost + 1e-12 and less < score - 1e-9 for other, less in every)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cost", ["bytes", "bits", "bitops"])
def test_never_worse_than_uniform(seed: int, cost: str) -> None:
    found = random_table(seed, 30, inputs=True)
    everywhere = qk.assign(found, 1e12, cost=cost).uniform
    assert list(everywhere) == list(WIDTHS)
    for bits, (budget, score) in everywhere.items():
        plan = qk.assign(found, budget, cost=cost)
        assert plan.cost <= budget * (1 + 1e-9)
        assert plan.score <= score * (1 + 1e-9), bits
    assert qk.assign(found, everywhere[4][0], cost=cost).score < 0.9 * everywhere[4][1]


def test_plan_beside_brute_force() -> None:
    found = random_table(3, 4, inputs=True)
    weights = [row for row in found.rows if row.tensor == "weight"]
    inputs = [row for row in found.rows if row.tensor == "input"]
    pairs = list(itertools.product(WIDTHS, WIDTHS))
    plans = []
    for picked in itertools.product(pairs, repeat=4):
        cost = sum(row.multiplications * w * a for row, (w, a) in zip(weights, picked, strict=True))
        score = sum(row.scores[w] for row, (w, _) in zip(weights, picked, strict=True))
        plans.append((cost, score + sum(row.scores[a] for row, (_, a) in zip(inputs, picked, strict=True))))
    budget = 0.4 * max(cost for cost, _ in plans)
    plan = qk.assign(found, budget, cost="bitops")
    assert plan.score == pytest.approx(min(score for cost, score in plans if cost <= budget))
    assert plan.cost <= budget


def test_wider_never_counts_as_worse() -> None:
    """Chance made 8 bits worse than 4: the plan may take 4, but 8 costs no score."""
    found = table([[0.5, 0.1, 0.6, 0.9], [0.1, 0.2, 0.3, 0.4]], [80, 80])
    plan = qk.assign(found, 8, cost="bits")
    assert plan.score == pytest.approx(0.5 + 0.1)
    assert plan.bits["0"]["weight"] == 4
    for cheap, better in itertools.pairwise(plan.front):
        assert all(cheap.bits[name]["weight"] <= better.bits[name]["weight"] for name in cheap.bits)


def test_smallest_budget_is_named() -> None:
    found = random_table(0, 5)
    least = sum(row.bytes[2] for row in found.rows)
    with pytest.raises(ValueError, match=rf"budget: got {least - 1} bytes; accepted: at least {least}, the least"):
        qk.assign(found, least - 1)
    assert qk.assign(found, least).cost == least
    with pytest.raises(ValueError, match=r"budget: got 1\.5 mean bits; accepted: at least 2, the least"):
        qk.assign(found, 1.5, cost="bits")


def test_infinite_budgets() -> None:
    found = random_table(0, 5)
    assert qk.assign(found, float("inf")).score == pytest.approx(qk.assign(found, 1e12).score)
    with pytest.raises(ValueError, match="budget: got -inf bytes; accepted: at least"):
        qk.assign(found, float("-inf"))


def test_units_of_cost() -> None:
    found = table([[0.0, 0.1, 0.2, 0.3]] * 2, [80, 240], [[0.0, 0.1, 0.2, 0.3]] * 2)
    assert qk.assign(found, 4, cost="bits").cost == pytest.approx(4)
    assert qk.assign(found, 160).cost == 160  # bytes
    operations = qk.assign(found, 1e9, cost="bitops")
    assert operations.cost == 10 * (80 + 240) * 64
    assert operations.bits["1"] == {"weight": 8, "input": 8}
    seconds = {"0": {8: 1.0, 4: 0.5, 3: 0.5, 2: 0.5}, "1": {8: 1.0, 4: 2.0, 3: 2.0, 2: 2.0}}
    plan = qk.assign(found, 1.5, cost=seconds)
    assert {name: bits["weight"] for name, bits in plan.bits.items()} == {"0": 4, "1": 8}
    assert plan.cost == 1.5


def test_config_prepares_the_model() -> None:
    model, batches = ConvNet(), [images(8), images(8)]
    found = qk.sensitivity(model, batches)
    plan = qk.assign(found, 3.5, cost="bits")
    widths = {layer: bits["weight"] for layer, bits in plan.bits.items()}
    assert len(set(widths.values())) > 1
    prepared = qk.prepare(model, plan.config)
    assert {name: prepared.get_submodule(name).weight_fake_quant.bits for name in widths} == widths
    assert prepared.conv2.input_fake_quant.bits == 8
    assert qk.QConfig.from_json(plan.config.to_json()) == plan.config
    qk.calibrate(prepared, batches)
    sizes = {row.name: row.weight_bits for row in qk.report(qk.convert(prepared)).layers}
    assert sizes == widths
    text = repr(plan)
    assert "4 bits everywhere" in text
    assert "mean bits" in text


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", ["recurrent", "attention", "parameter", "tied"])
def test_config_of_the_same_widths_is_the_same(kind: str) -> None:
    """At the widths that a model had, the plan's config prepares it as its own config did."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x @ self.weight)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    x = torch.randn(2, 3, 8)
    model, x, config = {
        "recurrent": lambda: (
            nn.Sequential(nn.LSTM(8, 8)), x, qk.QConfig(rules=[("0", {"hidden": {}, "weight": {"bits": 4}})])),
        "attention": lambda: (
            nn.TransformerEncoderLayer(8, 2, 16), x, qk.QConfig(rules=[("*_attn", {"attention": {}})])),
        "parameter": lambda: (Holder(), x, qk.QConfig(rules=[("weight", {"weight": {"bits": 5}})])),
        "tied": lambda: (Tied(), torch.randint(0, 9, (2, 3)), qk.QConfig()),
    }[kind]()  # fmt: skip
    prepared = qk.prepare(model, config)
    found = qk.sensitivity(model, [x], bits=(8, 5, 4), config=config)
    again = qk.prepare(model, Widths({}, 0.0, 0.0, found).config)

    def described(model):
        return {name: (q.bits, repr(q), q.name, q.straight_through) for name, q in quantizers(model).items()}

    assert described(again) == described(prepared)


def test_measured_latency() -> None:
    model, x = ConvNet(), images(8)
    before = snapshot(model)
    seconds = qk.measure_latency(model, x, bits=(8, 4), calls=2)
    assert_unchanged(model, before)
    assert list(seconds) == ["conv1", "conv2", "fc"]
    assert all(list(of) == [8, 4] and min(of.values()) > 0 for of in seconds.values())
    found = qk.sensitivity(model, [x], bits=(8, 4))
    most = sum(max(of.values()) for of in seconds.values())
    assert qk.assign(found, most, cost=seconds).score <= qk.assign(found, most, cost=seconds).uniform[8][1]
    with pytest.raises(ValueError, match="calls: got 0"):
        qk.measure_latency(model, x, calls=0)
    with pytest.raises(TypeError, match="calls: got 'x'"):
        qk.measure_latency(model, x, calls="x")


def test_mixed_model_beats_the_uniform_one() -> None:
    """The error of the whole model, not the sum of scores: at the size of 3 bits everywhere."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

        def forward(self, x):
            return sum(0.5**at * branch(x.roll(at, -1)) for at, branch in enumerate(self.branches))

    model, batches = Branches(), [torch.randn(64, 32)]
    plan = qk.assign(qk.sensitivity(model, batches), 3, cost="bits")

    def error(config):
        prepared = qk.prepare(model, config)
        qk.calibrate(prepared, batches)
        with torch.no_grad():
            return float((prepared.eval()(batches[0]) - model(batches[0])).square().sum())

    assert plan.cost <= 3
    assert error(plan.config) < 0.5 * error(qk.QConfig(qk.QSpec(3)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("x", 3), TypeError, "sensitivity: got a str"),
        ((None, "3"), TypeError, "budget: got '3'"),
        ((None, True), TypeError, "budget: got True"),
        ((None, float("nan")), ValueError, "budget: got nan"),
        ((None, 3, 7), TypeError, "cost: got a int"),
        ((None, 3, "bites"), ValueError, "cost: got 'bites'; accepted: bytes, bits, bitops.*did you mean 'bits'"),
        ((None, 3, {}), ValueError, "cost: got none for '0' at 8 bits"),
        ((None, 3, {"0": 5}), TypeError, "cost: got 5 for '0'; accepted: a mapping from bits"),
        ((None, 3, {"0": dict.fromkeys(WIDTHS, "a")}), ValueError, "cost: got 'a' for '0' at 8 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(arguments, error, text) -> None:
    found, budget, *cost = arguments
    with pytest.raises(error, match=text):
        qk.assign(found or random_table(0, 2), budget, **({"cost": cost[0]} if cost else {}))


def test_unknown_products_are_refused_for_bitops() -> None:
    row = SensitivityRow(("a",), "weight", {8: 0.1}, 8, {8: 8}, None)
    with pytest.raises(ValueError, match="cost: got 'bitops', but the products of a are not known"):
        qk.assign(Sensitivity("sqnr", (row,), {}), 1e9, cost="bitops")
    row = SensitivityRow(("a",), "input", {8: 0.1})
    with pytest.raises(ValueError, match="cost: got 'bits' for a sensitivity without weights"):
        qk.assign(Sensitivity("sqnr", (row,), {}), 8, cost="bits")
