"""The GPU tests and benchmarks run to their end on a pretended GPU: nothing in them waits to fail on the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_python

import qkernels as qk

pytest.importorskip("triton")
# What cannot be pretended: graphs, code of torch.compile, tensors on another device, bad values; or takes minutes.
IMPOSSIBLE = (
    "not (override_torch or cuda_graph or compiled_fullgraph or bad_arguments or large_in_fp32 or every_granularity "
    "or same_bits or give_nan or int8_gemm or int4_gemm or int4_linear)"
)


def test_gpu_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu", "-k", IMPOSSIBLE, "tests/test_gpu.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


BENCH = """
import sys
from pathlib import Path
root, out = Path(sys.argv[1]), sys.argv[2]
sys.path += [str(root / "bench" / "gpu"), str(root / "tests")]
import pretend_gpu
pretend_gpu.pretend()
import bench, cases, timing, summary
bench.HOST_SHAPE = (4, 32)
bench.SHAPES[:] = [bench.HOST_SHAPE, (2, 8, 3, 8)]
bench.DTYPES.pop("fp16")
bench.COMPILED.clear()
timing.ROUNDS, timing.SECONDS_PER_CONTESTANT, timing.COPY_ELEMENTS, timing.HOST_CALLS = 2, 0.001, 1 << 10, 1
sys.argv = ["bench", "--out", out, "--seconds", "500"]
bench.main()
import gemm
gemm.compiled_rescale = gemm.rescale
shapes = Path(out, "shapes.csv")
shapes.write_text("1,48,64\\n20,48,64\\n")
sys.argv = ["gemm", "--out", out, "--seconds", "500", "--shapes", str(shapes), "--group-sizes", "32,-1"]
assert gemm.main() == 0
print([summary.write(path) for path in Path(out).glob("*.json")])
"""


def test_gpu_benchmarks(tmp_path: Path) -> None:
    done = run_python(BENCH, str(ROOT), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = set()
    no_int4 = dict(qk.which("int4_linear")).get("triton", "int4_linear has no kernel for a GPU")
    for name, count in (("fake_quantize", 60), ("int8_gemm", 6), ("int4_gemm", 8)):
        (path,) = tmp_path.glob(f"*-{name}.json")
        result = json.loads(path.read_text())
        assert len(result["rows"]) >= count
        missing = no_int4 if name == "int4_gemm" else None
        for row in result["rows"]:
            assert row["left_out"].get("triton") == missing
            assert ("triton" in row["seconds"]) == (missing is None)
            if name == "int4_gemm":
                assert {"bf16 linear", "int8_linear"} <= set(row["seconds"])
                rows.add((row["case"], row["group_size"], *row["shape"]))
        assert "triton" in path.with_suffix(".md").read_text()
    assert rows == {
        (f"int4_linear {scheme}", group_size, m, 48, 64)
        for scheme in ("w4a8", "w4a16")
        for group_size in (32, -1)
        for m in (1, 20)
    }
    assert list(tmp_path.glob("*.png")) or "matplotlib" in done.stdout


def test_no_gpu_is_no_success(tmp_path: Path) -> None:
    """`make gpu` where there is no GPU: a sentence that says so, and an exit code that is not 0."""
    done = subprocess.run(
        [sys.executable, "bench/gpu/run.py", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no GPU" in done.stdout
