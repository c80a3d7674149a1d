"""The loops of team.h and the phases of phases.h by a program of their own, under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs a source checkout"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


def test_loops_and_phases(tmp_path: Path) -> None:
    """Nothing is lost or read while it is written, however many threads come, and whatever throws."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-fsanitize=thread"]
    flags += [f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    program = tmp_path / "threads"
    subprocess.run(["g++", *flags, str(ROOT / "tests" / "threads.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=100, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr
