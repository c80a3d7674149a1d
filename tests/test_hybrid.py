"""hybrid: sensitive layers train, the others are rounded and stay; the float model is not changed."""

from __future__ import annotations

import pytest
import torch
from qat_models import ConvNet, assert_unchanged, images, snapshot
from torch import nn

import qkernels as qk


class Wide(nn.Module):
    """A layer that matters, then branches that matter ever less."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.branches = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 6)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(x + sum(0.1**at * branch(x.roll(at, -1)) for at, branch in enumerate(self.branches, 1)))


def distilled(model, teacher, x, steps=60):
    optimizer = torch.optim.AdamW(qk.parameter_groups(model.train(), lr=3e-3))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - teacher(x).detach()).square().mean().backward()
        optimizer.step()


def error(model, quantized, x):
    with torch.no_grad():
        return float((quantized.eval()(x) - model.eval()(x)).square().mean())


def test_sensitive_layers_train_and_the_others_stay() -> None:
    model, x = Wide(), torch.randn(256, 24)
    before = snapshot(model)
    found = qk.hybrid(model, [x], 2, cost="bits", bits=(2,), config="weight-only")
    assert_unchanged(model, before)
    assert {*found.trained, *found.frozen} == {"first", "head", *(f"branches.{at}" for at in range(4))}
    assert found.plan.cost == pytest.approx(2)
    assert "branches.3" in found.frozen
    assert "first" in found.trained
    scores = {row.layers[0]: row.scores[found.plan.bits[row.layers[0]]["weight"]] for row in found.sensitivity.rows}
    held = sum(scores[name] for name in found.trained)
    assert held >= 0.8 * sum(scores.values())
    assert held - scores[found.trained[-1]] < 0.8 * sum(scores.values())
    assert f"frozen: {found.frozen[0]} (W" in repr(found)

    start = error(model, found.model, x)
    kept = {
        name: {k: t.clone() for k, t in found.model.get_submodule(name).state_dict().items()} for name in found.frozen
    }
    moved = {name: found.model.get_submodule(name).weight.detach().clone() for name in found.trained}
    distilled(found.model, model, x)
    assert error(model, found.model, x) < 0.8 * start
    for name, state in kept.items():
        for key, value in found.model.get_submodule(name).state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    assert all(not torch.equal(found.model.get_submodule(name).weight, weight) for name, weight in moved.items())
    assert error(found.model, qk.convert(found.model), x) < 1e-9


def test_frozen_layers_are_rounded_by_gptq() -> None:
    model, x = Wide(), torch.randn(256, 24) @ (torch.randn(24, 24) / 5)
    found = qk.hybrid(model, [x], 2.2, cost="bits", share=0)
    assert found.trained == ()
    nearest = qk.prepare(model, found.plan.config)
    qk.calibrate(nearest, [x])
    assert error(model, found.model, x) < 0.9 * error(model, nearest, x)
    assert not any(p.requires_grad for p in found.model.parameters())


def test_share_and_inputs() -> None:
    """BitOPs narrow inputs too; all layers train at a share of 1."""
    model, x = ConvNet(), images(16)
    model.train()
    found = qk.hybrid(model, [x], 2e6, cost="bitops", share=1.0)
    assert found.frozen == ()
    assert model.training
    assert all("input" in bits for bits in found.plan.bits.values())
    half = qk.hybrid(model, [x], 2e6, cost="bitops", share=0.5)
    assert half.trained == found.trained[: len(half.trained)]
    frozen = half.model.get_submodule(half.frozen[0])
    before = frozen.input_fake_quant.scale.clone()
    half.model.train()(10 * x)
    assert torch.equal(frozen.input_fake_quant.scale, before)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"share": 2}, ValueError, "share: got 2; accepted: 0 to 1"),
        ({"share": "all"}, ValueError, "share: got 'all'"),
        ({"budget": 1}, ValueError, "budget: got 1 bytes; accepted: at least"),
        ({"batches": []}, ValueError, "batches: got none"),
        ({"metric": "kll"}, ValueError, "metric: got 'kll'"),
        ({"model": 3}, TypeError, "model: got a int"),
    ],
    ids=["share", "type", "budget", "batches", "metric", "model"],
)
def test_refusals(change, error, text) -> None:
    model = Wide()
    before = snapshot(model)
    arguments = {"model": model, "batches": [torch.randn(9, 24)], "budget": 1e6, **change}
    with pytest.raises(error, match=text):
        qk.hybrid(**arguments)
    assert_unchanged(model, before)


def test_prepared_models_are_refused() -> None:
    with pytest.raises(ValueError, match="model: got one that is prepared; accepted: a float model"):
        qk.hybrid(qk.prepare(Wide()), [torch.randn(9, 24)], 1e6)


def test_computed_weights_are_frozen_too() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(24, 24)), nn.Linear(24, 6))
    found = qk.hybrid(torch.compile(model, backend="eager"), [torch.randn(9, 24)], 4, cost="bits", share=0)
    assert {*found.frozen} == {"0", "1"}
    assert not any(p.requires_grad for p in found.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
