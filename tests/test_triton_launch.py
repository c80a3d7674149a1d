"""Triton's own launch of every op, over a driver that does nothing: what only a real launch shows, without a GPU.

tests/launch_triton.py makes the calls, in a process without the interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton's launchers and the driver need gcc")
# Compilations, of which each takes a GPU's machine half a second: what is needed today, and a little.
MOST = {"calls": 2100, "self-check": 230, "first batches": 44, "later batches": 0}
# Ops whose calls do more than allocate and start kernels, and so take the long way every time.
NEVER_REMEMBERED = {
    "fake_quantize_codebook_learnable_backward",  # torch adds up and scatters
    "fake_quantize_stochastic_backward",  # another seed at each call, here and below
    "fake_quantize_stochastic_forward",
    "histogram",  # counts start at zero
    "observe_fake_quantize",  # whose two flags are one tensor in these calls
    "pack_bits",  # looks at all codes, on the CPU
    "quantization_errors",  # torch adds up
    "quantize_dynamic_transposed",
    "quantize_stochastic",
}


def launched(mode: str, tmp_path: Path) -> dict[str, Any]:
    left_out = "TRITON_INTERPRET", "GLIBC_TUNABLES"  # nothing is computed: outputs of gigabytes are never touched
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "launch_triton.py"), mode],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_every_call_is_launched_and_remembered(tmp_path: Path) -> None:
    result = launched("calls", tmp_path)
    count, quick = (sum(result[part].values()) for part in ("compilations", "quick"))
    print(f"{len(result['ways'])} ops, {result['launches']} launches, {count} compilations, {quick} of the self-check")
    assert result["faults"] == {}
    assert {op for op, ways in result["ways"].items() if "replayed" not in ways} == NEVER_REMEMBERED
    assert count <= MOST["calls"]
    assert quick <= MOST["self-check"]


def test_batches_of_other_sizes_compile_nothing_new(tmp_path: Path) -> None:
    """A loop whose batch size changes must not wait for a compiler."""
    result = launched("loop", tmp_path)
    first, later = (sum(result[part].values()) for part in ("first", "later"))
    print(f"{first} compilations in the first 13 batches, then {result['later']}")
    assert first <= MOST["first batches"]
    assert later <= MOST["later batches"], result["later"]


def test_what_is_remembered_is_never_the_wrong_choice(tmp_path: Path) -> None:
    launched("choices", tmp_path)
