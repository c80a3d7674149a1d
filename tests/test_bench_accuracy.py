"""`bench accuracy`: all of a seed see the same steps, no run is repeated, and the pages show the raw results."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import qkernels as qk
from qkernels.demo import Data

pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs a source checkout")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench("name"): that file of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


@pytest.fixture
def data() -> Data:
    """Stripes that lie or stand, under noise: learned in a few steps."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (1600,), generator=generator)
    stripes = (torch.arange(28) % 4 < 2).float().expand(28, 28)
    images = torch.where(labels[:, None, None].bool(), stripes, stripes.t()).unsqueeze(1)
    images = images + torch.rand(images.shape, generator=generator)
    return Data("stripes", (images[:1100], labels[:1100]), (images[1100:], labels[1100:]))


def test_float_and_qat_see_the_same_steps(bench: Any, data: Data) -> None:
    runs = bench("accuracy_runs")
    study = runs.Study(data, depthwise=False, seed=1, steps=12)
    apart = copy.deepcopy(study.half)
    runs.train(apart, data, 1, range(6, 12), study.rate)
    for a, b in zip(apart.state_dict().values(), study.full.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    # Quantizers that are off leave the float model: the second half of QAT then is that of the float training.
    made = study.prepared(study.half, runs.config(4, 4))
    qk.enable_fake_quant(made, False)
    study.trained(made)
    x = data.test[0][:8]
    torch.testing.assert_close(made.eval()(x), study.full.eval()(x), rtol=1e-3, atol=1e-3)
    assert study.rate(0) == runs.LEARNING_RATE
    assert study.rate(12) == 0


def test_every_run_has_a_name_and_every_comparison_its_runs(bench: Any) -> None:
    keys = [run[:3] for run in bench("accuracy").runs()]
    assert len(set(keys)) == len(keys)
    keys += [(*key, f"{method}, running statistics") for *key, method in keys if key[0] == "depthwise"]
    keys += [(*key, f"{method}, before") for *key, method in keys if "100 steps of its scales" in method]
    for title, net, widths, method, plain in bench("accuracy_report").COMPARED:
        assert {(net, widths, method), (net, widths, plain)} <= set(keys), title


@pytest.mark.parametrize(
    ("net", "widths", "method"),
    [
        ("cnn", "W2A4", "QAT"),
        ("cnn", "W2A2", "QAT, falling 4 to 2"),
        ("depthwise", "W3A3", "QAT, dampening"),
        pytest.param("cnn", "W3A3 everywhere", "PTQ, mixed at equal bitops", marks=pytest.mark.nightly),
        pytest.param("cnn", "W3A8 everywhere", "hybrid of 100 steps", marks=pytest.mark.nightly),
        pytest.param("cnn", "W2A2", "QAT, distillation", marks=pytest.mark.nightly),
        pytest.param("depthwise", "W4A4", "QAT, freezing", marks=pytest.mark.nightly),
    ],
)
def test_runs_learn(bench: Any, data: Data, net: str, widths: str, method: str) -> None:
    (run,) = [run for *key, run in bench("accuracy").runs() if key == [net, widths, method]]
    study = bench("accuracy_runs").Study(data, net == "depthwise", seed=0, steps=24)
    figures = run(study)
    assert figures["accuracy"] > 75
    if method == "QAT":
        assert figures["converted"] == pytest.approx(figures["accuracy"], abs=1)
    if "mixed" in method:
        plan = study.plan("full", "bitops")
        assert figures["cost"] <= plan.uniform[3][0]


def test_a_run_is_not_repeated(bench: Any, data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, laps = bench("accuracy"), bench("laps")
    for module in (program, laps):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(program, "STEPS", 4)
    monkeypatch.setattr(program.demo, "FASHION_MNIST", tmp_path)
    monkeypatch.setattr(program.demo, "load_idx", lambda folder: data)
    for accuracy, seeds in ((1.0, ["0"]), (2.0, ["0", "1"])):
        runs = [("cnn", "W8A8", "PTQ", lambda study, accuracy=accuracy: {"accuracy": accuracy})]
        monkeypatch.setattr(program, "runs", lambda runs=runs: runs)
        assert program.main(["--seeds", *seeds]) == 0
    (path,) = tmp_path.rglob("*-accuracy.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["seed"], row["figures"]["accuracy"]) for row in rows] == [(0, 1.0), (1, 2.0)]
    assert [row["case"] for row in rows] == ["cnn, W8A8: PTQ; seed 0", "cnn, W8A8: PTQ; seed 1"]


def test_the_pages_show_the_raw_results(bench: Any) -> None:
    report = bench("accuracy_report")
    found = report.accuracies(report.newest())
    widths, compared = report.tables(found)
    assert widths in (ROOT / "README.md").read_text(), "README.md is not what bench/accuracy_report.py prints"
    page = (ROOT / "docs" / "accuracy.md").read_text()
    assert widths in page
    assert compared in page, "docs/accuracy.md is not what bench/accuracy_report.py prints"


def test_means_spreads_and_differences(bench: Any) -> None:
    report = bench("accuracy_report")
    a, b = {0: 80.0, 1: 82.0}, {0: 79.0, 1: 78.0, 2: 1.0}
    assert report.shown(a) == "81.0 ± 1.0"
    assert report.signed(report.minus(a, b)) == "+2.50 (+1.00 to +4.00)"
    found = {("cnn", "float", "float"): a, ("cnn", "W4A8", "PTQ"): b, ("cnn", "W4A8", "QAT"): {0: 81.0, 1: 82.5}}
    assert "| W4A8 | 52.7 ± 51.7 | 81.8 ± 0.8 | +0.8 |" in report.widths_table(found)
    assert report.signed({0: -1.0}) == "−1.00 (−1.00 to −1.00)"
