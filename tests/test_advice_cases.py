"""The cases of bench/advice.py: some from training to verdict, how a verdict is judged, and the outliers and folds."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs a source checkout")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench("name"): that file of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "verdict"), [("perceptron W8A8", "ptq"), ("gru W2A8", "qat"), ("raw features W8A8", "more bits")]
)
def test_verdicts_hold_on_unseen_data(bench: Any, name: str, verdict: str) -> None:
    """Of cases whose answer is clear."""
    pytest.importorskip("sklearn")
    (case,) = (case for case in bench("advice_cases").CASES if case.name == name)
    row = bench("advice").result_of(dataclasses.replace(case, float_steps=300, qat_steps=100))
    assert row["verdict"] == verdict
    unseen, tolerance = row["figures"], row["tolerance"]
    if verdict == "ptq":
        assert unseen["float"] - unseen["equal"] < 2 * tolerance
    else:
        assert unseen["float"] - unseen["equal"] > 3 * tolerance
        better = unseen["advised" if verdict == "more bits" else "qat"]
        assert better - unseen["equal"] > 0.5 * (unseen["float"] - unseen["equal"])


@pytest.mark.parametrize(
    ("verdict", "equal", "advised", "qat", "right"),
    [
        ("ptq", 0.98, 0.98, 0.5, True),
        ("ptq", 0.9, 0.9, 1.0, False),
        ("more bits", 0.9, 1.0, 1.0, True),
        ("more bits", 0.9, 0.95, 1.0, False),
        ("more bits", 0.985, 1.0, 1.0, False),
        ("qat", 0.9, 0.9, 0.96, True),
        ("qat", 0.9, 0.9, 0.93, False),
        ("qat", 0.985, 0.9, 1.0, False),
    ],
)
def test_what_is_right(bench: Any, verdict: str, equal: float, advised: float, qat: float, right: bool) -> None:
    """The float score is 0.985, of which 1 % may be lost."""
    scores = {"float": 0.985, "equal": equal, "advised": advised, "qat": qat, "qat_seconds": 1.0}
    assert bench("advice").right(verdict, 0.00985, **scores) is right


def test_prepared_models_compute_the_same(bench: Any) -> None:
    """Channels of other ranges, and a normalization folded into the first layer."""
    cases = bench("advice_cases")
    for build, after, x in (
        (cases.depthwise_cnn, cases.with_outliers, torch.randn(4, 1, 14, 14)),
        (lambda: cases.normalized(6, 8, 3), cases.normalization_folded, 100 * torch.randn(9, 6) + 50),
    ):
        model = build()
        model(x)
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(norm.bias)
        expected = model.eval()(x)
        changed = after(model)
        torch.testing.assert_close(changed.eval()(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in changed.modules())
    weights = cases.with_outliers(cases.depthwise_cnn())
    ranges = weights[1].weight.abs()
    assert ranges.max() / ranges.min() >= 16
