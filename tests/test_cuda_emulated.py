"""The CUDA kernels, run on the CPU by an emulator: the family's own tests, bit for bit against the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not (ROOT / "csrc" / "cuda").exists(), reason="needs g++ and a source checkout"
)
# What the kernels compute; tracing, export and the like do not depend on who computes it. The large inputs run in two
# of the four dtypes: fp16 differs from bf16 in two instructions, and fp64 has a path of its own for small ones too.
TESTS = (
    "not (compile or export or opcheck or checkpointing or beyond_2_31 or threads or second)"
    " and not ((torch.float16 or torch.float64) and (runs or last or rows or image or blocks or transposed))"
)


def pytest_of(*arguments: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "cuda_on_cpu"), str(ROOT)]), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "stem",
    [
        "fake_quantize",
        "fake_quantize_learnable",
        "dynamic",
        "observe_fake_quantize",
        "quantize",
        "foreach_fake_quantize",
        "cuda_kernels",
        "cuda_int4_gemm",
        "refusals",
    ],
)
def test_family_on_the_emulator(stem: str) -> None:
    assert " passed" in pytest_of("-k", TESTS, str(ROOT / "tests" / f"test_{stem}.py"))
