"""python -m qkernels advise: what the file defines, JSON on stdout alone, and errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from qkernels import __main__

FILE = """
import torch
from torch import nn
from shapes_of_mine import WIDTH

print("training")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 4))
x = torch.randn(64, WIDTH)
batches = [(x, x)]
target = model(x).detach()

def evaluate(other):
    print("evaluating")
    return 1 - float((other(x) - target).square().mean() / target.var())
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "shapes_of_mine.py").write_text("WIDTH = 24")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def run(*arguments: object) -> int:
    with torch.random.fork_rng():
        return __main__.main(["advise", *map(str, arguments)])


def test_the_table_and_the_code(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(file, "--bits", "8,2", "--tolerance", "0.03") == 0
    out, err = capsys.readouterr()
    assert out.startswith("weights")
    assert "8 bits" in out
    assert "4 bits" not in out
    assert "accepted loss: 0.03" in out
    assert "config = QConfig(" in out
    assert err.startswith("training\nevaluating\n")


def test_json_and_what_the_file_may_define(file: Path, capsys: pytest.CaptureFixture) -> None:
    file.write_text(FILE + "config = 'w4a4'\nloss = lambda output, batch: output.square().mean()\n")
    assert run(file, "--json", "--budget", 1100, "--training-steps", 7, "--max-batches", 1, "--bits", 8) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["training_steps"] == 7
    assert values["qat_seconds"] == 7 * values["step_seconds"] > 0
    assert values["chosen"] == 1
    assert values["widths"][1]["bytes"] <= 1100
    assert values["widths"][0]["config"]["input"]["bits"] == 4


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("model = batches = 3", [], "does not define evaluate; it has to define model, batches, evaluate"),
        ("\n1 / 0", [], "line 2: ZeroDivisionError: division by zero"),
        ("a = 1\nb =\n", [], "line 2: SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", [], "line 1: SystemExit: 3"),
        (FILE, ["--budget", "5"], "ValueError: budget: got 5 bytes; accepted: at least"),
        (FILE, ["--tolerance", "-1"], "ValueError: tolerance: got -1.0; accepted: a finite number of at least 0"),
        (FILE.replace("return 1", "return float('nan')"), [], "ValueError: evaluate: returned nan for the float model"),
        (FILE + "def evaluate(m):\n    return m.accuracy\n", [], "line 17: AttributeError: 'Sequential' object has no"),
        (FILE + "model = 3", [], "TypeError: model: got a int; accepted: a torch.nn.Module"),
    ],
    ids=["names", "runs", "syntax", "exit", "budget", "tolerance", "nan", "evaluate", "model"],
)
def test_errors_are_one_line(file: Path, capsys: pytest.CaptureFixture, text, options, said) -> None:
    file.write_text(text)
    assert run(file, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"advise: {file}: {said}")
    assert "Traceback" not in err


def test_no_file_and_help(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "none.py") == 2
    assert capsys.readouterr().err == f"advise: {tmp_path / 'none.py'}: there is no such file\n"
    for arguments, code in ((["--help"], 0), (["f.py", "--bits", "x"], 2), ([], 2)):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == code
    help_text = capsys.readouterr().out
    for name in ("model", "batches", "evaluate", "loss", "config", "--tolerance", "--budget", "--json"):
        assert name in help_text
