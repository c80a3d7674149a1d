"""OscillationTracker: frequencies by their formula, weights that stay frozen, and resumed runs."""

from __future__ import annotations

import copy

import pytest
import torch
from loop_models import assert_same, batches_of, loss_of, prepared, state_of
from named_quantizers import WEIGHTS, width
from qat_models import assert_unchanged, config, snapshot
from torch import nn
from torch.nn.utils import parametrizations

import qkernels as qk
from qkernels.qat.quantized_weights import codes_of, rounded, scales_of, values_of

GRANULARITIES = {"tensor": qk.PerTensor(), "channel": qk.PerChannel(), "group": qk.PerGroup(4)}


def layer(bits: int = 3, quantizer: str = "lsq", granularity: str = "channel") -> nn.Module:
    torch.manual_seed(0)
    spec = qk.QSpec(bits, GRANULARITIES[granularity], quantizer=quantizer)
    return qk.prepare(nn.Sequential(nn.Linear(16, 8, bias=False)), qk.QConfig(spec, None))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("quantizer", [name for name in WEIGHTS if name not in ("dorefa", "kmeans")])
def test_codes_stand_for_the_values_of_the_quantizer(quantizer: str, granularity: str) -> None:
    model = layer(width(quantizer, 3), quantizer, granularity).eval()
    w, quantize = model[0].weight.detach(), model[0].weight_fake_quant
    scales = scales_of(quantize, w)
    codes, count = codes_of(quantize, w, scales)
    assert torch.equal(rounded(quantize, w, scales), quantize(w))
    assert int(codes.max()) < count
    assert torch.equal(values_of(quantize, codes, scales, w.dtype), quantize(w))
    order = codes[:1].reshape(-1).argsort(), quantize(w)[:1].detach().reshape(-1).argsort()
    if granularity != "group":  # within a scale, larger codes stand for larger values
        values = quantize(w)[:1].detach().reshape(-1)
        assert torch.equal(values[order[0]], values[order[1]])


def test_frequencies_follow_the_formula() -> None:
    """A random walk of the weights, and the formula for one element at a time."""
    model, momentum = layer(), 0.2
    qk.freeze_observers(model)
    w, quantize = model[0].weight, model[0].weight_fake_quant
    tracker = qk.OscillationTracker(model, momentum=momentum)
    n = w.numel()
    code = codes_of(quantize, w, scales_of(quantize, w))[0].reshape(-1).tolist()
    frequency, average, last = [0.0] * n, [float(c) for c in code], [0] * n
    for _ in range(30):
        with torch.no_grad():
            w += 0.3 * torch.randn_like(w) * quantize.scale
        before = state_of(model)
        tracker.step()
        assert_same(state_of(model), before)  # without a threshold nothing is written
        for i, now in enumerate(codes_of(quantize, w, scales_of(quantize, w))[0].reshape(-1).tolist()):
            change = (now > code[i]) - (now < code[i])
            turned = change != 0 and change == -last[i]
            frequency[i] = momentum * turned + (1 - momentum) * frequency[i]
            average[i] = momentum * now + (1 - momentum) * average[i]
            last[i], code[i] = change or last[i], now
    state = tracker.state_dict()["weights"]["0.weight"]
    assert max(frequency) > 0.3
    torch.testing.assert_close(state["frequency"].reshape(-1), torch.tensor(frequency))
    torch.testing.assert_close(state["average"].reshape(-1), torch.tensor(average))
    assert state["codes"].reshape(-1).tolist() == code
    shares = tracker.oscillating(0.1)["0.weight"]
    assert shares == pytest.approx(sum(f > 0.1 for f in frequency) / n)
    assert tracker.frozen() == {"0.weight": 0.0}


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "midrise", "dynamic"])
def test_frozen_weights_keep_their_code_while_all_else_learns(quantizer: str) -> None:
    torch.manual_seed(0)
    model = layer(width(quantizer, 3), quantizer)
    x = torch.randn(256, 16)
    target = x @ torch.randn(16, 8)
    weight, quantize = model[0].weight, model[0].weight_fake_quant
    tracker = qk.OscillationTracker(model, momentum=0.1, threshold=lambda step: None if step < 20 else 0.15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    held: dict[int, int] = {}
    for step in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        tracker.step()
        if step < 20:
            assert tracker.frozen()["0.weight"] == 0
        state = tracker.state_dict()["weights"]["0.weight"]
        frozen, codes = (
            state["frozen"].reshape(-1),
            codes_of(quantize, weight, scales_of(quantize, weight))[0].reshape(-1),
        )
        assert torch.equal(codes[frozen], state["codes"].reshape(-1)[frozen])
        for i in frozen.nonzero().reshape(-1).tolist():
            assert held.setdefault(i, int(codes[i])) == int(codes[i])
    assert 0.02 < tracker.frozen()["0.weight"] < 1
    model.eval()
    at_level = (quantize(weight) - weight).abs() <= 1e-3 * quantize(weight).abs().amax()
    assert at_level[state["frozen"]].all()
    assert not at_level[~state["frozen"]].all()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


def test_freezing_ends_the_oscillation() -> None:
    counts = []
    for threshold in (None, lambda step: 0.03 if step >= 75 else None, 0.03):
        torch.manual_seed(0)
        x = torch.randn(256, 16)
        target = x @ torch.randn(16, 8)
        model = layer()
        tracker = qk.OscillationTracker(model, momentum=0.05, threshold=threshold)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            tracker.step()
        counts.append((tracker.oscillating()["0.weight"], loss.item()))
    assert counts[0][0] > 0.05
    assert counts[1][0] < counts[0][0] / 2
    assert counts[1][1] < 1.5 * counts[0][1]
    # Frozen from the start: a scale that followed its weights, which follow the scale, would soon be infinite.
    assert counts[2][1] < 4 * counts[0][1]


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped() -> None:
    def run(model, tracker, optimizer, batches) -> None:
        for x in batches:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
            tracker.step()

    def made(seed: int):
        model = prepared("mlp", bits=3, seed=seed)
        return (
            model,
            qk.OscillationTracker(model, momentum=0.5, threshold=0.3),
            torch.optim.SGD(model.parameters(), 0.5),
        )

    batches = batches_of("mlp", 12)
    model, tracker, optimizer = made(0)
    run(model, tracker, optimizer, batches[:8])
    assert sum(tracker.frozen().values()) > 0
    resumed, again, other = made(1)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(tracker.state_dict()))
    run(model, tracker, optimizer, batches[8:])
    run(resumed, again, other, batches[8:])
    assert_same(state_of(resumed), state_of(model))
    for name, entry in tracker.state_dict()["weights"].items():
        assert_same(
            {key: t for key, t in again.state_dict()["weights"][name].items() if key != "bits"},
            {key: t for key, t in entry.items() if key != "bits"},
        )
    with pytest.raises(
        ValueError, match=r"^state: got one of other weights \(0.weight\); accepted: that of 0.weight, …"
    ):
        again.load_state_dict(qk.OscillationTracker(layer()).state_dict())


def test_another_width_starts_anew() -> None:
    model = layer()
    tracker = qk.OscillationTracker(model, momentum=1.0, threshold=0.5)
    quantize = model[0].weight_fake_quant
    for sign in (1, -1, 1):
        with torch.no_grad():
            model[0].weight += sign * quantize.scale
        tracker.step()
    assert tracker.frozen()["0.weight"] > 0.1
    qk.set_bits(model, 4)
    tracker.step()
    assert tracker.frozen() == {"0.weight": 0.0}
    assert tracker.state_dict()["weights"]["0.weight"]["bits"] == 4


def test_weights_of_few_bits_are_tracked_unless_others_are_named() -> None:
    model = qk.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config(8))
    qk.set_bits(model, 4, "1.*")
    assert list(qk.OscillationTracker(model).frozen()) == ["1.weight"]
    for where in ("*", ["1.*", "0.weight"]):
        assert list(qk.OscillationTracker(model, where=where).frozen()) == ["0.weight", "1.weight"]
    parametrizations.weight_norm(model[1])
    assert list(qk.OscillationTracker(model).frozen()) == ["1.weight"]
    with pytest.raises(ValueError, match=r"^where: got '1.weight', which is computed from other tensors"):
        qk.OscillationTracker(model, threshold=0.1)


def test_bad_arguments_are_refused_by_name() -> None:
    model = layer()
    before = snapshot(model)
    for options, error, text in (
        ({"momentum": 0}, ValueError, r"^momentum: got 0; accepted: above 0, at most 1"),
        ({"momentum": 1.5}, ValueError, r"^momentum: got 1.5"),
        (
            {"threshold": -0.1},
            ValueError,
            r"^threshold: got -0.1; accepted: a number of at least 0, None, or a function",
        ),
        ({"threshold": "0.1"}, TypeError, r"^threshold: got '0.1'"),
        ({"where": 0}, TypeError, r"^where: got 0; accepted: a glob, or a list of globs, on the names of weights"),
        ({"where": []}, ValueError, r"^where: got \[\]; accepted: a glob"),
        ({"where": "fc.*"}, ValueError, r"^where: got 'fc.\*'; accepted: .*: '0.weight'"),
    ):
        with pytest.raises(error, match=text):
            qk.OscillationTracker(model, **options)
    tracker = qk.OscillationTracker(model, threshold=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"^threshold, at step 0: got -1.0"):
        tracker.step()
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"^model: got one without quantizers"):
        qk.OscillationTracker(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"^model: got a int"):
        qk.OscillationTracker(3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^where: got None for a model without weights of at most 4 bits; accepted: .* 0.weight"
    ):
        qk.OscillationTracker(layer(8))
    for quantizer in ("dorefa", "kmeans"):
        with pytest.raises(ValueError, match=rf"^where: got '0.weight' with quantizer=\"{quantizer}\""):
            qk.OscillationTracker(layer(3, quantizer))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert list(qk.OscillationTracker(qk.prepare(tied, config(4)), threshold=0.1).frozen()) == ["0.weight"]
    differing = qk.prepare(tied, qk.QConfig(qk.QSpec(4), None, rules=[("1", {"weight": {"bits": 3}})]))
    with pytest.raises(ValueError, match=r"^where: got '0.weight', which has several quantizers"):
        qk.OscillationTracker(differing, threshold=0.1)
