"""The programs of examples/ run with little data, and what they assert holds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHORT = {"fashion_mnist": ["--steps", "60", "--test-images", "1000"]}  # what takes longer as it is


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_runs(example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_each_is_in_the_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    for example in EXAMPLES:
        assert f"[{example.name}]({example.name})" in table
