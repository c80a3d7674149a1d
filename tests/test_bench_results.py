"""Rows of a GPU benchmark that end badly: the file says so, and a new process goes on with those that are left."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "bench" / "gpu")
    spec = importlib.util.spec_from_file_location("gpu_results", ROOT / "bench" / "gpu" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return module


def row(case: str) -> dict[str, Any]:
    return {"case": case, "shape": [1], "dtype": "bf16"}


def wrong(row: dict[str, Any]) -> None:
    raise AssertionError("wrong\nvalues")


def test_a_fault_is_a_row(results: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = results.Results(path, {}, time.monotonic() + 60, False)
    rows.measure(row("first"), wrong)
    rows.measure(row("second"), lambda row: row.update(seconds={}))
    assert rows.finish() == results.FAULT
    first, second = json.loads(path.read_text())["rows"]
    assert first["fault"] == "AssertionError: wrong"
    assert "fault" not in second


def test_a_lost_gpu_and_a_dead_process(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    rows = results.Results(path, {}, time.monotonic() + 60, False)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit) as end:
        rows.measure(row("lost"), wrong)
    assert end.value.code == results.GPU_LOST

    def dies(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    rows = results.Results(path, {}, time.monotonic() + 60, True)
    with pytest.raises(KeyboardInterrupt):
        rows.measure(row("dead"), dies)
    again = results.Results(path, {}, time.monotonic() + 60, True)
    assert again.measure(row("lost"), wrong) is None
    assert again.measure(row("dead"), wrong) is None
    assert again.measure(row("next"), lambda row: None) is not None
    again.end = 0.0
    assert again.measure(row("late"), wrong) is None
    again.finish()
    said = json.loads(path.read_text())
    assert [r.get("fault") for r in said["rows"]] == ["AssertionError: wrong", results.UNFINISHED, None]
    assert said["out_of_time"] == 1
