from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qkernels import __main__, library


@pytest.mark.parametrize(
    ("text", "line"),
    [("1,2,3\n4,x,6\n", 2), ("M,N,K\n\n1,2\n", 3), ("0,2,3\n", 1), ("# K too long\n1,1,131072", 2), ("1,2,3,4\n", 1)],
)
def test_a_bad_row_of_the_csv_is_named(tmp_path: Path, capfd: pytest.CaptureFixture, text: str, line: int) -> None:
    path = tmp_path / "shapes.csv"
    path.write_text(text)
    assert __main__.main(["bench", "gemm", "--shapes", str(path)]) == 2
    assert f"{path}:{line}: got '{text.splitlines()[line - 1]}'; accepted: M,N,K" in capfd.readouterr().err


def test_a_csv_of_shapes_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "shapes.csv"
    path.write_text("m,n,k\n3,40,70\n")
    arguments = ["--shapes", str(path), "--schemes", "raw", "scaled", "--threads", "1", "--out", str(tmp_path)]
    assert __main__.main(["bench", "gemm", "--hot", *arguments]) == 0
    rows = json.loads((tmp_path / "gemm.json").read_text())["rows"]
    assert [(row["scheme"], row["m"], row["n"], row["k"]) for row in rows] == [
        ("raw", 3, 40, 70),
        ("scaled", 3, 40, 70),
    ]
    for row in rows:
        ours = row["contestants"]["qkernels"]
        assert ours["p20"] <= ours["median"] <= ours["p80"]
        assert ours["tops"] * ours["median"] * 1e12 == pytest.approx(2 * 3 * 40 * 70)
    assert (tmp_path / "gemm.csv").read_text().count("\n") == 1 + sum(len(row["contestants"]) for row in rows)


@pytest.mark.skipif(library.host is None, reason="not compiled")
def test_ceilings() -> None:
    assert library.host.dot_ceiling(0.01) > 1e9
    memory = torch.ones(1 << 20)
    assert library.host.read_ceiling(memory.data_ptr(), 4 << 20) > 1e8
