"""`bench model`: a tiny model from drawn weights to the table, and what keeps a wrong peer out of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

from qkernels import __main__

pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs a source checkout")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench("name"): that file of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


def job_of(bench: Any, folder: Path) -> Any:
    models, peers = bench("models"), bench("model_peers")
    x, *calibration = models.inputs(models.MODELS["tiny"], 2, 3, seed=3)
    return peers.Job(models.build("tiny"), x, calibration, folder)


def test_a_model_is_timed(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    options = ["--models", "tiny", "--batch", "1", "--threads", "1", "--blocks", "1", "--out", str(tmp_path)]
    assert __main__.main(["bench", "model", *options]) == 0
    (row,) = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert (row["model"], row["batch"], row["threads"]) == ("tiny", 1, 1)
    assert {"qkernels", "qkernels channels_last", "fp32", "fp32 channels_last"} <= set(row["seconds"])
    assert row["facts"]["fp32"]["peak_bytes"] >= 32 * 16 * 16 * 4
    for name, times in row["seconds"].items():
        assert 0 < times["p20"] <= times["median"] <= times["p80"], name
        assert row["facts"][name]["sqnr_db"] > (50 if name.startswith("fp32") else 3)
        if name != "qkernels":
            assert row["ratios"][name] == pytest.approx(times["median"] / row["seconds"]["qkernels"]["median"])
    assert set(row["seconds"]) | set(row["left_out"]) >= {"torch.ao", "onnxruntime", "OpenVINO"}
    printed = capfd.readouterr().out
    for line in (tmp_path / "model.md").read_text().splitlines():
        assert line in printed
    assert "| tiny | 1 | 1 |" in printed


def test_layers_are_timed(tmp_path: Path) -> None:
    options = ["--layers", "--models", "tiny", "--batch", "2", "--threads", "1", "--blocks", "1"]
    assert __main__.main(["bench", "model", *options, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == [
        "3×3 s2 3→32 at 32²",
        "3×3 g32 32→32 at 16²",
        "1×1 32→16 at 16²",
        "1×1 16→32 at 16²",
        "5×5 s2 g32 32→32 at 16²",
        "1×1 32→16 at 8²",
        "1×1 16→32 at 8²",
        "5×5 g32 32→32 at 8²",
        "1×1 16→1280 at 8²",
        "linear 2×1280→1000",
    ]
    assert rows[0]["multiplications"] == 2 * 32 * 16 * 16 * 27
    assert rows[-1]["multiplications"] == 2 * 1280 * 1000
    assert [row["count"] for row in rows] == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for row in rows:
        assert row["sqnr_db"] > 20
        assert {"qkernels", "fp32"} <= set(row["seconds"])


def test_unknown_models_are_named(capfd: pytest.CaptureFixture) -> None:
    assert __main__.main(["bench", "model", "--models", "resnet19"]) == 2
    error = capfd.readouterr().err
    assert "resnet19" in error
    assert "resnet18" in error


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872), ("efficientnet_lite0", 4_652_008),
     ("vit_s", 22_050_664)],
)  # fmt: skip
def test_models_have_the_published_size(bench: Any, name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = bench("models").MODELS[name].make()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_each_batch_norm_normalizes(bench: Any) -> None:
    """Outputs are of the size of the drawn gammas and betas: no layer blows up or dies."""
    models = bench("models")
    model = models.build("tiny")
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, y, name=name: outputs.update({name: y.detach()}))
    model(models.inputs(models.MODELS["tiny"], 8, 1, seed=1)[0])
    assert len(outputs) > 5
    for y in outputs.values():
        assert 0.3 < y.std() < 3
        assert 0.3 < y.mean() < 1.7


def test_what_ignores_its_input_or_is_wrong_is_left_out(bench: Any, tmp_path: Path) -> None:
    peers: ModuleType = bench("model_peers")
    job = job_of(bench, tmp_path)
    right = job.model(job.x).detach()

    def fails() -> Any:
        raise ValueError("no such operator\nand a long trace")

    wrong = {
        "constant": lambda: lambda: job.usual.expand_as(right),
        "noise": lambda: lambda: right + torch.randn_like(right),
        "nan": lambda: lambda: right * torch.nan,
        "shape": lambda: lambda: right[:1],
        "fails": lambda: fails(),
    }
    with pytest.raises(RuntimeError) as error:
        peers.fastest(wrong, job)
    for reason in ("constant: SQNR against fp32 of 0.0 dB", "noise: SQNR", "nan: SQNR", "shape: gives [1, 1000]"):
        assert reason in str(error.value)
    assert "fails: no such operator" in str(error.value)
    assert "trace" not in str(error.value)
    assert peers.fastest({**wrong, "right": lambda: lambda: right}, job)[0] == "right"


def test_the_fastest_way_stands_for_an_engine(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, job = bench("model_peers"), job_of(bench, tmp_path)
    monkeypatch.setattr(peers, "RACE_SECONDS", 0.01)
    right = job.model(job.x).detach()
    slow = torch.randn(600, 600)

    def takes_longer() -> torch.Tensor:
        _ = slow @ slow
        return right

    assert peers.fastest({"slow": lambda: takes_longer, "fast": lambda: lambda: right}, job)[0] == "fast"


def test_the_table_names_the_best_peer(bench: Any) -> None:
    report = bench("model_report")
    times = {
        "qkernels": 2,
        "qkernels channels_last": 1,
        "onnxruntime": 3,
        "OpenVINO": 1.5,
        "fp32": 9,
        "fp32 channels_last": 8,
    }
    row = {"model": "m", "batch": 1, "threads": 2, "seconds": {name: {"median": 1e-3 * t} for name, t in times.items()}}
    row["facts"] = {"qkernels": {"peak_bytes": 25}, "fp32": {"peak_bytes": 100}}
    line = report.markdown({"rows": [row]}).splitlines()[2]
    assert line == "| m | 1 | 2 | 2 | 1 | – | – | 3 | 1.5 | 8 | 0.75 (1.50) OpenVINO | 4.00 | 0.25 |"


def test_the_summary_has_a_row_for_each_model(bench: Any) -> None:
    def row(model: str, batch: int, threads: int, **times: float) -> dict[str, Any]:
        seconds = {name.replace("fp32_", "fp32 "): {"median": 1e-3 * value} for name, value in times.items()}
        return {"model": model, "batch": batch, "threads": threads, "seconds": seconds}

    rows = [
        row("a", 1, 1, qkernels=2, OpenVINO=3, onnxruntime=4, fp32=9, fp32_channels_last=8),
        row("a", 1, 2, qkernels=2, OpenVINO=1, fp32=7),
        row("b", 1, 1, qkernels=2, fp32=7),
    ]
    assert bench("model_report").summary({"rows": rows}).splitlines() == [
        "| model | best int8 engine, batch 1 | fp32, batch 1 |",
        "|---|---|---|",
        "| a | 1.50 / 0.50 | 4.00 / 3.50 |",
        "| b | – | 3.50 |",
    ]


def test_ours_is_not_left_out_in_silence(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    main = bench("model")

    def none_of_ours(job: Any) -> Any:
        def fails() -> Any:
            raise ValueError("no kernel")

        return {"qkernels": fails}

    monkeypatch.setattr(main, "ours", none_of_ours)
    monkeypatch.setattr(main.model_peers, "INT8", {})
    monkeypatch.setattr(main.model_peers, "FLOAT", {})
    assert main.main(["--models", "tiny", "--batch", "1", "--threads", "1", "--blocks", "1"]) == 1
    printed, error = capfd.readouterr()
    assert "left out: no kernel" in printed
    assert "tiny, batch 1" in error


def test_peak_memory(bench: Any) -> None:
    x = torch.randn(1000, 250)

    def call() -> torch.Tensor:
        y = x + 1
        z = y * 2
        del y
        return z - 3

    assert bench("laps").peak_bytes(call) == pytest.approx(2 * 1_000_000, rel=0.01)


def test_rows_are_recorded_in_place_of_older_ones(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laps = bench("laps")
    monkeypatch.setattr(laps, "RESULTS", tmp_path)
    laps.record("model", [{"case": "a", "threads": 1, "value": 1}, {"case": "b", "threads": 1, "value": 2}])
    path = laps.record("model", [{"case": "a", "threads": 1, "value": 3}, {"case": "a", "threads": 2, "value": 4}])
    assert path.parent == tmp_path / laps.device_name(laps.machine())
    rows = {(row["case"], row["threads"]): row["value"] for row in json.loads(path.read_text())["rows"]}
    assert rows == {("a", 1): 3, ("a", 2): 4, ("b", 1): 2}


def test_plot(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seconds = {name: {"median": 1e-3} for name in ("qkernels", "fp32", "OpenVINO")}
    rows = [{"model": m, "batch": b, "threads": 1, "seconds": seconds} for m in ("a", "b") for b in (1, 16)]
    bench("model_report").plot(tmp_path, {"rows": rows, "machine": {"cpu": "some CPU"}})
    assert (tmp_path / "model.png").read_bytes()[:4] == b"\x89PNG"
