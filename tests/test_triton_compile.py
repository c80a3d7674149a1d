"""Every Triton kernel compiles for every supported GPU, without having one, and its code is what it should be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
# Bytes of shared memory that a block can have.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
POINTWISE = re.compile(
    r"fake_quantize_(stochastic_|codebook_)?(forward|backward)_kernel|fake_quantize_backward_mask_kernel"
    r"|(rms_norm|silu_mul)_(forward|backward)_kernel|quantize(_codebook)?_kernel|learnable_sums_kernel"
)
ONLY_ON = {"int8_persistent_mm_kernel": (90,)}


def compiled(tmp_path: Path, *options: str) -> tuple[list[str], list[int], list[dict[str, Any]]]:
    """The names of all kernels, the GPUs of this run, and what became of each launch and GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment.update(
        TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=f"{root}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    )
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "compile_triton.py"), *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (names, arches), *lines = map(json.loads, done.stdout.splitlines())
    return names, arches, lines


def check_gemm(line: dict[str, Any]) -> None:
    """Tensor cores fed in 16-byte copies or by TMA, as many tiles in flight as asked for, no byte on its own."""
    tile = line["constexprs"]
    rows = tile["BLOCK_N"] if tile.get("SWAP") else tile["BLOCK_M"]
    warpgroups = line["arch"] == 90 and rows >= 64  # else sm_90 takes the instruction of the others
    instruction = r"IGMMA\.64x\d+x32\.S8\.S8" if warpgroups else r"IMMA\.16832\.S8\.S8\.SAT"
    assert line["mma"], line
    assert all(re.fullmatch(instruction, name) for name in line["mma"]), line
    copy = r"UTMALDG\.2D" if "persistent" in line["kernel"] else r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128"
    assert line["copies"], line
    assert all(re.fullmatch(rf"{copy}|UTMASTG\.2D|UTMACMDFLUSH", name) for name in line["copies"]), line
    # Codes that the epilogue makes change hands between threads before they are stored 16 bytes at a time.
    assert all(re.match("(LDS|STS)", name) and line["dtype"] == "i8" for name in line["bytewise"]), line
    # mma.sync has read a tile to registers when the next copy starts, and so takes one buffer less.
    buffers = line["stages"] - (0 if warpgroups else 1)
    assert line["shared"] >= buffers * (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"], line


def check_int4_gemm(line: dict[str, Any]) -> None:
    """Codes that become operands in registers, by few instructions; what comes in bytes is zero points."""
    tile, arch = line["constexprs"], line["arch"]
    x, slow = line["pointers"][1], line["constexprs"]["ADD"] == "codes"
    warpgroups = arch == 90 and tile["SWAP"] and tile["BLOCK_N"] >= 64
    if x == "*i8":
        instruction = r"IGMMA\.64x\d+x32\.S8\.S8" if warpgroups else r"IMMA\.16832\.S8\.S8\.SAT"
    else:
        kind = r"\.F32" if x == "*fp16" else r"\.F32\.BF16"
        instruction = (r"HGMMA\.64x\d+x16" if warpgroups else "HMMA.16816") + kind
    assert line["mma"], line
    assert all(re.fullmatch(instruction, name) for name in line["mma"]), (instruction, line)
    symmetric = not line["x_sums"]
    if slow:
        return
    wide = 16 * 32 * line["warps"] <= tile["BLOCK_N"] * tile["WIDTH"]  # bytes for every thread
    assert any(re.fullmatch(r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128", name) for name in line["copies"]) or not wide, line
    by_bytes = "LDG" if "*i8" in line["pointers"][2:] else "none"
    assert all(name.startswith((by_bytes, "I2F")) for name in line["bytewise"]), line
    size = {"*i8": 1, "*bf16": 2, "*fp16": 2, "*fp32": 4}[x]
    step = 2 * tile["WIDTH"] * tile["PIECES"]
    stage = tile["BLOCK_M"] * step * size + tile["BLOCK_N"] * step // 2
    assert line["shared"] >= (tile["STAGES"] - 1) * stage, line
    codes = tile["BLOCK_N"] * step // (32 * line["warps"])
    if symmetric and size == 1:
        assert line["prmt"] <= 8 + tile["BLOCK_M"], line  # of the output
    elif symmetric and size == 2:
        assert line["prmt"] <= codes * (1.5 if warpgroups else 0.5) + 8 + tile["BLOCK_M"], line
        assert line["conversions"] <= 4, line  # of what finds the tile


def check(names: list[str], arches: list[int], lines: list[dict[str, Any]]) -> None:
    assert set(arches) <= set(SHARED)
    expected = {(name, arch) for name in names for arch in arches if arch in ONLY_ON.get(name, SHARED)}
    missing = expected - {(line["kernel"], line["arch"]) for line in lines}
    assert not missing, f"kernels that tests/compile_triton.py has no call for: {missing}"
    for line in lines:
        assert line["approximate"] == [], line
        if line["dtype"] != "fp64":  # which is here to be right, not fast
            assert not line["spills"], line
            assert line["local"] == 0, line
        assert line["shared"] <= SHARED[line["arch"]], line
        if line["kernel"] == "int4_mm_kernel":
            check_int4_gemm(line)
        elif line["kernel"].endswith("mm_kernel"):
            check_gemm(line)
        # Rows of any length begin on any boundary.
        rows = line["kernel"].startswith(("rms_norm", "silu_mul", "learnable_sums"))
        if POINTWISE.fullmatch(line["kernel"]) and not (rows and line["odd"]):
            assert line["widest_load"] == 128, line
    print()
    for kernel, count in sorted(Counter(line["kernel"] for line in lines).items()):
        own = [line for line in lines if line["kernel"] == kernel]
        print(
            f"{kernel}: {count} compiled, at most {max(line['registers'] for line in own)} registers, "
            f"{max(line['shared'] for line in own)} bytes of shared memory"
        )


def test_compiles_for_the_gpus_of_this_run(tmp_path: Path) -> None:
    check(*compiled(tmp_path))


@pytest.mark.nightly
def test_every_launch_compiles_for_every_gpu(tmp_path: Path) -> None:
    check(*compiled(tmp_path, "--all"))
