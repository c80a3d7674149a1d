from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import __main__, library


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench("name"): that file of the benchmarks, here and not in a process that takes seconds to start."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    return importlib.import_module


@pytest.mark.parametrize(
    ("text", "line"),
    [("1,2,3\n4,x,6\n", 2), ("M,N,K\n\n1,2\n", 3), ("0,2,3\n", 1), ("# K too long\n1,1,131072", 2), ("1,2,3,4\n", 1)],
)
def test_a_bad_row_of_the_csv_is_named(
    bench: Any, tmp_path: Path, capfd: pytest.CaptureFixture, text: str, line: int
) -> None:
    path = tmp_path / "shapes.csv"
    path.write_text(text)
    assert bench("gemm").main(["--shapes", str(path)]) == 2
    assert f"{path}:{line}: got '{text.splitlines()[line - 1]}'; accepted: M,N,K" in capfd.readouterr().err


def test_a_csv_of_shapes_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "shapes.csv"
    path.write_text("m,n,k\n3,40,70\n")
    arguments = ["--shapes", str(path), "--schemes", "raw", "scaled", "--threads", "1", "--out", str(tmp_path)]
    assert __main__.main(["bench", "gemm", "--hot", "--blocks", "1", *arguments]) == 0
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


INT4_SHAPES = "2,48,96\n3,40,50\n"


def test_int4_schemes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "shapes.csv"
    path.write_text(INT4_SHAPES)
    arguments = ["--shapes", str(path), "--scheme", "w4a8,w4a16", "--group-sizes", "32", "-1", "--threads", "1"]
    assert __main__.main(["bench", "gemm", "--hot", "--blocks", "1", *arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gemm.json").read_text())["rows"]
    assert [(row["scheme"], row["group_size"], row["m"], row["n"], row["k"]) for row in rows] == [
        (scheme, *rest) for scheme in ("w4a8", "w4a16") for rest in ((32, 2, 48, 96), (-1, 2, 48, 96), (-1, 3, 40, 50))
    ]
    assert "left out: w4a8 3×40×50: group_size: got 32" in capfd.readouterr().out
    for row in rows:
        m, n, k = (row[name] for name in "mnk")
        assert {"qkernels", "fp32", "bf16"} <= set(row["contestants"])
        groups = 1 if row["group_size"] == -1 else k // row["group_size"]
        assert row["bytes"] == n * k // 2 + 4 * n * groups + 4 * m * k + 4 * m * n
    with (tmp_path / "gemm.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["group_size"] for line in lines] == [
        str(row["group_size"]) for row in rows for _ in row["contestants"]
    ]


@pytest.mark.parametrize(
    "options", [["--schemes", "w4a8,w4a4"], ["--group-sizes", "128", "20"], ["--gpu", "--schemes", "raw", "w4a4"]]
)
def test_a_bad_option_is_named(bench: Any, capfd: pytest.CaptureFixture, options: list[str]) -> None:
    if "--gpu" in options:
        assert __main__.main(["bench", "gemm", *options]) == 2
    else:
        with pytest.raises(SystemExit, match="2"):
            bench("gemm").main(options)
    message = capfd.readouterr().err
    assert options[-1].split(",")[-1] in message
    assert "accepted: " in message


@pytest.fixture
def peers(bench: Any) -> Any:
    return bench("peers")


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_int4_peers_multiply_by_the_same_weight(peers: Any, act_bits: int, group_size: int) -> None:
    """Every library that is installed gives the product with the codes and scales that it was handed."""
    torch.manual_seed(0)
    q, scale = peers.int4_weight(64, 192, group_size)
    assert scale.shape == (64, 1 if group_size == -1 else 192 // group_size)
    x = torch.randn(3, 192)
    expected = x.double() @ peers.dequantized(q, scale).double().t()
    calls = peers.int4_linear(x, q, scale, 1, act_bits)
    assert calls["fp32"] is not None
    for name, call in calls.items():
        if call is not None:
            error = (torch.as_tensor(call()).double() - expected).norm() / expected.norm()
            assert error < (0.03 if act_bits == 8 else 0.01), name


def test_two_bit_peers_multiply_by_the_same_weight(peers: Any) -> None:
    torch.manual_seed(0)
    x, (q, scale) = torch.randn(3, 192), peers.int4_weight(64, 192, 32, bits=2)
    expected = x.double() @ peers.dequantized(q, scale).double().t()
    for name, call in peers.two_bit_linear(x, q, scale, 1).items():
        if call is not None:
            assert (torch.as_tensor(call()).double() - expected).norm() / expected.norm() < 0.03, name


def test_the_reason_for_a_missing_int4_peer_is_kept(peers: Any) -> None:
    q, scale = peers.int4_weight(16, 40, -1)
    assert peers.int4_linear(torch.randn(1, 40), q, scale, 1, 16)["torch int4pack"] is None
    assert peers.missing["torch int4pack, w4a16"] == "takes groups of 32, 64, 128, 256, got 40"


@pytest.mark.skipif(library.host is None, reason="not compiled")
def test_ceilings(bench: Any) -> None:
    ceilings = bench("ceilings")
    assert ceilings.dot_ceiling(0.01) > 1e9
    memory = torch.ones(1 << 20)
    assert ceilings.read_ceiling(memory.data_ptr(), 4 << 20) > 1e8
