"""The GPU tests and the whole GPU run to their ends on a pretended GPU: nothing in them waits to fail on a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from sampling import one_of

pytest.importorskip("triton")
PRETEND = str(ROOT / "tests" / "pretend_gpu.py")
# They stand for what a GPU machine has; the second runs what it is to watch.
TOOLS = {
    "nvcc": "echo pretended",
    "compute-sanitizer": 'while [ "$1" != "$PRETEND_PYTHON" ]; do shift; done; exec "$@"',
}


def test_gpu_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu", "tests/test_gpu.py", "tests/test_gpu_gemm.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def gpu_run(tmp_path: Path, *options: str, tools: tuple[str, ...], **env: str) -> tuple[int, dict[str, str], Path]:
    """The exit code of `make gpu`, the outcomes of its steps, and the folder of all that came back."""
    bin_, out, back = (tmp_path / name for name in ("bin", "out", "back"))
    bin_.mkdir()
    for name in tools:
        (bin_ / name).write_text(f"#!/bin/sh\n{TOOLS[name]}\n")
        (bin_ / name).chmod(0o755)
    done = subprocess.run(
        [sys.executable, PRETEND, "bench/gpu/run.py", *options, "--out", str(out)],
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(bin_), "/usr/bin", "/bin"]),
            "PRETEND_FEW": "1",
            "PRETEND_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            **env,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert sorted(path.name for path in out.iterdir()) == ["results.tar.gz", "steps.json", "table.md"]
    with tarfile.open(out / "results.tar.gz") as archive:
        archive.extractall(back, filter="data")
    assert (back / "table.md").read_text() == (out / "table.md").read_text()
    steps = json.loads((out / "steps.json").read_text())
    return done.returncode, {step["step"]: step["outcome"] for step in steps}, back


def rows_of(back: Path, stem: str) -> list[dict[str, Any]]:
    (path,) = back.glob(f"????-??-??-{stem}.json")
    return json.loads(path.read_text())["rows"]


CHECK = ["cuda", "tiles", "triton", "memcheck", "others", "racecheck"]
BENCH = ["host", "fake_quantize", "int8_gemm", "int4_gemm"]
REST = ["fake_quantize-rest", "gemm-rest", "gemm-compiled", "fake_quantize-compiled"]


@one_of(2, 0)
def test_a_run_without_faults(tmp_path: Path) -> None:
    code, steps, back = gpu_run(tmp_path, "check", "bench", "--minutes", "10", tools=("nvcc", "compute-sanitizer"))
    assert list(steps) == ["machine", "build", *CHECK, *BENCH, *REST]
    assert set(steps.values()) == {"passed"}, steps
    assert code == 0
    for name in CHECK[:3]:
        assert " passed" in (back / f"{name}.log").read_text()
    for stem in ("host", "fake_quantize", "int8_gemm", "int4_gemm", "int8_gemm-compiled", "fake_quantize-compiled"):
        assert not any("fault" in row for row in rows_of(back, stem)), stem
    first = rows_of(back, "host")[:6]
    assert [set(row["host_seconds"]) - {"qkernels"} for row in first] == 3 * [{"aten"}] + 3 * [{"F.linear"}]
    for row in rows_of(back, "fake_quantize"):
        assert row["ours"] in row["seconds"]
        if row["case"] != "SiLU·mul + quantize int8 per token":
            # torch's ops that wait are never captured: an attempt would leave its trace in "capture".
            waits = "channel" in row["case"] or "LSQ" in row["case"]
            assert {"by": "events" if waits else "graph"}.items() <= row["seconds"]["aten"].items()
            assert "capture" not in row["seconds"]["aten"]
    # What a call takes is ours, though a kernel that is forced is timed too.
    ours = {row["case"]: (row["ours"], "cuda" in row["seconds"]) for row in rows_of(back, "int4_gemm")}
    assert ours == {"int4_linear w4a16": ("triton", True), "int4_linear w4a8": ("triton", False)}
    assert {row["shape"][0] for row in rows_of(back, "int8_gemm")} == {1, 20}
    assert any("_int_mm + compiled rescale" in row["seconds"] for row in rows_of(back, "int8_gemm-compiled"))
    table = (back / "table.md").read_text()
    for text in ("NVIDIA Pretend", "nvidia-smi", "int4_linear w4a16", "host µs"):
        assert text in table


@one_of(2, 1)
def test_a_run_with_five_faults(tmp_path: Path) -> None:
    """A build that fails, a wrong kernel, a step that hangs, a peer that no graph captures, no compute-sanitizer."""
    hung = tmp_path / "hung"
    code, steps, back = gpu_run(
        tmp_path, "check", "bench", "--minutes", "5",
        tools=("nvcc",),
        PRETEND_BUILD_FAILS="1",
        PRETEND_WRONG="silu_mul_quantize_dynamic",
        PRETEND_HANGS="bench/gpu/host.py",
        PRETEND_HANGS_IN=str(hung),
        PRETEND_UNCAPTURABLE="fake_quantize_per_tensor_affine",
    )  # fmt: skip
    assert code == 1
    failed = {name for name, outcome in steps.items() if outcome.startswith("FAILED")}
    # The last steps meet the same wrong kernel, or their end on a machine whose cores are busy.
    late = {"int4_gemm", *REST}
    assert failed - late == {"build", "triton", "host", "fake_quantize"}, steps
    for name in failed & {"int4_gemm", "gemm-rest", "gemm-compiled"}:
        assert "killed after" in steps[name], steps
    assert steps["build-cpu"] == "passed"
    assert "CUDA library was not built" in steps["cuda"]
    assert "not installed" in steps["sanitizer"]
    assert "killed after" in steps["host"]
    deadline = time.monotonic() + 10
    for pid in map(int, hung.read_text().split()):
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_alive(pid)
    # The failure is in the log from the moment it happened.
    log = (back / "triton.log").read_text()
    assert "\nFAILED tests/test_gpu.py::test_equals_the_reference[silu_mul_quantize_dynamic-triton" in log
    for row in rows_of(back, "fake_quantize"):
        wrong = row["case"] == "SiLU·mul + quantize int8 per token"
        assert ("triton is off by" in row.get("fault", "")) == wrong, row
        assert ("triton" in row["seconds"]) != wrong
        if "per tensor" in row["case"] and "LSQ" not in row["case"]:
            assert row["seconds"]["aten"]["by"] == "events"
            assert "failed: CUDA error" in row["seconds"]["aten"]["capture"]
            assert row["seconds"]["eager"]["by"] == "graph"  # after it, the stream put back
    assert rows_of(back, "int8_gemm")


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_gpu_is_no_success(tmp_path: Path) -> None:
    """Where there is no GPU: a sentence that says so, and an exit code that is not 0."""
    done = subprocess.run(
        [sys.executable, "bench/gpu/run.py", "check", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no GPU" in done.stdout


def test_no_torch_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is none')\n")
    done = subprocess.run(
        [sys.executable, "bench/gpu/run.py", "check", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no torch for this python3" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()
