"""`make gpu`: builds in place, then tests, sanitizes and times the GPU kernels with this machine's own torch.

Writes a log per step, raw JSON, a table and plots to bench/results/<gpu>/ or --out. Exit code 0: a GPU was there and
every step that ran passed; 1: a step failed; 2: there is no GPU that torch can use, so nothing was shown. What the
machine lacks (compute-sanitizer, matplotlib, a second GPU) is skipped and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import summary

ROOT = Path(__file__).parent.parent.parent
MINUTES = 9.5  # the whole run: below ten minutes on an H200 machine
# Beside the GPU's own tests, what the interpreter cannot show.
TESTS = ["tests/test_gpu.py", "tests/test_triton_int4_gemm.py::test_the_assembly_is_its_twin"]
INT4_ROWS = ["1", "16", "64", "1024", "256", "8192", "4096"]  # few rows, where int4 pays, come first
BENCH_RESERVE = 10.0  # seconds left for the table and the plots


class Run:
    def __init__(self, out: Path) -> None:
        self.out, self.end = out, time.monotonic() + 60 * MINUTES
        self.steps: list[dict[str, object]] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def step(self, name: str, command: list[str], *, seconds: float | None = None, **env: str) -> bool:
        """Runs a command for at most ``seconds`` (None: all that are left); its output goes to <out>/<name>.log."""
        start = time.monotonic()
        log = self.out / f"{name}.log"
        with log.open("w") as sink:
            try:
                code: int | str = subprocess.call(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, self.left() if seconds is None else seconds),
                )
            except subprocess.TimeoutExpired:
                code = "out of time"
        self.note(name, "passed" if code == 0 else f"FAILED ({code})", seconds=time.monotonic() - start)
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-3 if code == 0 else -40 :]), flush=True)
        return code == 0

    def note(self, name: str, outcome: str, seconds: float = 0.0) -> None:
        self.steps.append({"step": name, "outcome": outcome, "seconds": round(seconds, 1)})
        print(f"{name}: {outcome} ({seconds:.0f} s)", flush=True)

    @property
    def failed(self) -> bool:
        return any(str(step["outcome"]).startswith("FAILED") for step in self.steps)


def sanitize(run: Run) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            run.note(tool, "skipped: compute-sanitizer is not installed")
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "0"]
        seconds = 0.2 * run.left()
        small = [sys.executable, str(ROOT / "tests" / "gpu_sanitize.py"), str(0.6 * seconds)]
        # Without caching every tensor has an allocation of its own, so that an access beyond its end is seen.
        run.step(tool, command + small, seconds=seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: bench/results/<gpu>")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("gpu: no torch for this python3; nothing was run")
        return 2
    if not torch.cuda.is_available():
        print(f"gpu: torch {torch.__version__} finds no GPU; nothing was run")
        return 2
    gpu = torch.cuda.get_device_name().lower()
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}{'a' if major in (9, 10) else ''}"
    name = re.sub(r"[^a-z0-9]+", "-", gpu.removeprefix("nvidia")).strip("-")
    out = (options.out or ROOT / "bench" / "results" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"gpu: {gpu}, sm_{major}{minor}, torch {torch.__version__}; results in {out}", flush=True)

    run = Run(out)
    python = sys.executable
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        run.note("build", "skipped for CUDA: nvcc is not installed; Triton serves in its place")
        run.step("build", build, QKERNELS_STRICT_BUILD="1", QKERNELS_BUILD="cpu")
    else:
        run.step("build", build, QKERNELS_STRICT_BUILD="1", QKERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST=arch)
    if not run.failed:
        run.step("info", [python, "-m", "qkernels", "info"])
        # Triton compiles on the CPU: its kernels are many, so the tests share the cores.
        workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        tests = [python, "-m", "pytest", "-q", "--maxfail=20", *workers, *TESTS]
        run.step("tests", tests, seconds=0.45 * run.left())
        sanitize(run)
        gemm = [python, "bench/gpu/gemm.py", "--out", str(out), "--schemes"]
        for name, command, share in (
            ("bench", [python, "bench/gpu/bench.py", "--out", str(out)], 0.35),
            ("int8_gemm", [*gemm, "raw", "scaled", "dynamic"], 0.45),
            ("int4_gemm", [*gemm, "w4a16", "w4a8", "--group-sizes", "128", "32", "-1", "--rows", *INT4_ROWS], 0.85),
        ):
            # They start nothing new after that many seconds; what has begun comes on top.
            run.step(name, [*command, "--seconds", str(share * (run.left() - BENCH_RESERVE))])
        for path in out.glob(f"{date.today().isoformat()}-*.json"):
            for reason in summary.write(path):
                run.note("summary", f"skipped: {reason}")
    (out / "steps.json").write_text(json.dumps(run.steps, indent=1) + "\n")
    print("\n".join(f"{step['step']:<10} {step['outcome']} ({step['seconds']} s)" for step in run.steps))
    print("gpu: FAILED" if run.failed else "gpu: passed")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
