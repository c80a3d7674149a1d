"""The CUDA kernels, run on the CPU by an emulator: the family's own tests, bit for bit against the reference."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

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


STEMS = [
    "fake_quantize",
    "fake_quantize_learnable",
    "dynamic",
    "observe_fake_quantize",
    "quantize",
    "foreach_fake_quantize",
    "cuda_kernels",
    "cuda_int4_gemm",
    "refusals",
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    """What became of each family's tests, all run in one process: a process of its own takes more than most of them."""
    wanted = {item.callspec.params["stem"] for item in request.session.items if item.path == request.path}
    report = tmp_path_factory.mktemp("emulated") / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated", "-p", "no:cacheprovider", f"--junit-xml={report}",
         "-k", TESTS, *(str(ROOT / "tests" / f"test_{stem}.py") for stem in STEMS if stem in wanted)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "cuda_on_cpu"), str(ROOT)])},
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode in (0, 1), done.stdout[-6000:] + done.stderr[-3000:]  # 1: tests failed
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        (child, *_) = [child.tag for child in case if child.tag in ("failure", "error", "skipped")] or ["passed"]
        of_stem = found.setdefault(case.attrib["classname"].rpartition("test_")[2], Counter())
        of_stem[child] += 1
        if child in ("failure", "error"):
            of_stem[f"{case.attrib['name']}: {case.find(child).text}"] += 1  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("stem", STEMS)
def test_family_on_the_emulator(stem: str, outcomes: dict[str, Counter[str]]) -> None:
    of_stem = outcomes[stem]
    assert of_stem["passed"]
    assert set(of_stem) <= {"passed", "skipped"}, "\n".join(of_stem)[-6000:]
