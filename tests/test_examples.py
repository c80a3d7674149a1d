"""The programs of examples/ run with little data, and what they assert holds."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "shared")
SHORT = {  # what takes longer as it is
    "character_models": ["--quick"],
    "fashion_mnist": ["--steps", "60", "--test-images", "1000"],
    "smartwatch_exercises": ["--quick"],
    "tabular_regression": ["--quick"],
}
NEEDS = {"smartwatch_exercises": "seglearn", "tabular_regression": "sklearn"}


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program finds what stands beside it, as where python runs it."""
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_runs(example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(NEEDS.get(example.stem, "torch")) is None:
        pytest.skip(f"{NEEDS[example.stem]} is not installed")
    monkeypatch.setattr(sys, "argv", [str(example), *SHORT.get(example.stem, [])])
    torch._dynamo.reset()
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out, "an example says what it found"


def test_fashion_mnist_falls_back_to_the_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    program = runpy.run_path(str(ROOT / "examples" / "fashion_mnist.py"))
    monkeypatch.setitem(program["load"].__globals__, "FASHION_MNIST", tmp_path / "missing")
    assert program["load"]().name == "digits"
    assert "Fashion-MNIST is not installed" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.parametrize("example", [name for name, arguments in SHORT.items() if arguments == ["--quick"]])
@pytest.mark.parametrize("seed", range(3))
def test_claims_hold(example: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(NEEDS.get(example, "torch")) is None:
        pytest.skip(f"{NEEDS[example]} is not installed")
    monkeypatch.setattr(sys, "argv", [example, "--seed", str(seed)])
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")


def test_the_gru_of_character_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["character_models.py", "--model", "gru", "--quick"])
    runpy.run_path(str(ROOT / "examples" / "character_models.py"), run_name="__main__")
    assert "gru: perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("example", sorted(NEEDS))
def test_names_the_package_that_is_missing(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [example, "--quick"])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"qkernels\[examples\]"):
        runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("example", "arguments", "text"),
    [
        ("fashion_mnist", ["--steps", "1"], "argument --steps: got 1; accepted: a whole number of at least 2"),
        ("tabular_regression", ["--folds", "1"], "argument --folds: got 1; accepted: a whole number of at least 2"),
        ("tabular_regression", ["--folds", "1000"], "--folds: got 1000; accepted: at most 442, the number of rows"),
        ("smartwatch_exercises", ["--channels", "0"], "argument --channels: got 0; accepted: a whole number of"),
        ("character_models", ["--width", "40"], "argument --width: got 40; accepted: .* at least 16, a multiple of 16"),
        ("character_models", ["--context", "99999999"], "--context: got 99999999; accepted: below [0-9]+, the char"),
        ("measure_gemm", ["--m", "1", "x"], "argument --m: got x; accepted: a whole number of at least 1"),
        ("int4_weight_only", ["--group-size", "100"], "--group-size: got 100; accepted: .*divides --width, 512, and"),
    ],
)
def test_a_size_that_is_too_small_or_too_large_is_named(
    example: str,
    arguments: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if importlib.util.find_spec(NEEDS.get(example, "torch")) is None:
        pytest.skip(f"{NEEDS[example]} is not installed")
    monkeypatch.setattr(sys, "argv", [f"{example}.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("learned_scales", ["--rows", "1", "--columns", "4", "--steps", "1"]),
        ("fake_quant_in_your_loop", ["--width", "1", "--steps", "1"]),
        ("qat_start_to_finish", ["--channels", "1", "--size", "5", "--steps", "1"]),
        ("torch_ao_override", ["--channels", "1", "--size", "4", "--steps", "1"]),
        ("your_own_quantizer", ["--rows", "1", "--columns", "32", "--steps", "1"]),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_the_least_sizes_run(
    example: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{example}.py", *arguments])
    torch._dynamo.reset()
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    assert "claims about accuracy is not checked below --" in capsys.readouterr().out


def test_each_is_in_the_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    for example in EXAMPLES:
        assert f"[{example.name}]({example.name})" in table
