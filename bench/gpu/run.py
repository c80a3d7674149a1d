"""The GPU run, with this machine's own torch: `make gpu-check`, `make gpu-bench`, or both by `make gpu`.

check: build, CUDA tests, every tile of the GEMMs, Triton's self-check, compute-sanitizer, the other tests.
bench: build, host times, what decides against ATen and cuBLAS, the rest while time is left, torch.compile last.

After every step --out holds results.tar.gz (logs and raw results), table.md and steps.json, and nothing else of this
run; an earlier run's are replaced. Exit code 0: a GPU was there and every step passed; 1: a step failed; 2: torch finds
no GPU, so nothing was shown. What the machine lacks (nvcc, compute-sanitizer) is skipped and named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from steps import GPU_LOST, ROOT, Run

PYTHON = [sys.executable]  # runs every step
MINUTES = {"check": 4.5, "bench": 5.5}  # on an H200 machine of 16 cores
GPU_TESTS = ["tests/test_gpu.py", "tests/test_gpu_gemm.py"]
# What the interpreter cannot show of Triton beside the GPU's own tests.
ASSEMBLY = "tests/test_triton_int4_gemm.py::test_the_assembly_is_its_twin"
CUDA = "int4_cuda or -cuda or [cuda"  # by the names of tests and kernels
TILES = "by_every_tile"
TRITON = "equals_the_reference and triton"
INT8_ROWS = ["1", "16", "1024", "8192", "64", "256", "4096"]
INT4_ROWS = ["1", "16", "64", "1024", "256", "8192", "4096"]  # few rows, where int4 pays, come first
GRACE = 20.0  # seconds in which a benchmark may finish the row that it has begun


def build(run: Run) -> bool:
    """For this GPU; where that fails for the CPU alone, as Triton needs no build. Whether there are CUDA kernels."""
    command = [*PYTHON, "setup.py", "-q", "build_ext", "--inplace"]
    major, minor = run.machine["capability"]
    arch = f"{major}.{minor}{'a' if major in (9, 10) else ''}"
    if machine.tool("nvcc") is None and "CUDA_HOME" not in os.environ:
        run.note("build", "skipped for CUDA: nvcc is not installed; Triton serves in its place")
    else:
        env = {"QKERNELS_STRICT_BUILD": "1", "QKERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": arch}
        if run.step("build", command, 0.5 * run.left(), **env) == 0:
            return True
    run.step("build-cpu", command, 0.3 * run.left(), QKERNELS_STRICT_BUILD="1", QKERNELS_BUILD="cpu")
    return False


def run_tests(run: Run, name: str, chosen: str, seconds: float, *files: str, optional: bool = False) -> None:
    seconds = min(seconds, run.left())
    # Triton compiles on the CPU: its kernels are many, so the tests share the cores.
    options = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    if not optional and importlib.util.find_spec("pytest_timeout"):
        major, minor, *_ = map(int, re.findall(r"\d+", importlib.metadata.version("pytest-timeout")))
        if (major, minor) >= (2, 3):  # ends in good order what would be killed
            options.append(f"--session-timeout={max(1, int(seconds - 10))}")
    command = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "failures_at_once", "--no-summary"]
    command += [*options, "-k", chosen, *(files or GPU_TESTS)]
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "QKERNELS_TEST_SEED": "all"}
    run.step(name, command, seconds, optional=optional, **env)


def sanitizer(run: Run) -> str | None:
    """compute-sanitizer, tried once: on some virtual machines it is there and refuses the GPU."""
    path = machine.tool("compute-sanitizer")
    if path is None:
        run.note("sanitizer", "skipped: compute-sanitizer is not installed")
        return None
    command = [path, "--error-exitcode", "9", *PYTHON, "bench/gpu/touch.py"]
    code, said = machine.answer(command, cwd=ROOT)
    if code != 0:
        run.note("sanitizer", f"skipped: compute-sanitizer cannot run here: {said[-300:]}")
        return None
    return path


def sanitize(run: Run, path: str, tool: str, seconds: float, optional: bool) -> None:
    command = [path, "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "0"]
    seconds = min(seconds, run.left())
    small = [*PYTHON, str(ROOT / "tests" / "gpu_sanitize.py"), str(0.5 * seconds)]
    # Without caching every tensor has an allocation of its own, so that an access beyond its end is seen.
    run.step(tool, command + small, seconds, optional=optional, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def check(run: Run, cuda: bool) -> None:
    if cuda:
        run_tests(run, "cuda", CUDA, 0.4 * run.left())
    else:
        run.note("cuda", "skipped: the CUDA library was not built")
    run_tests(run, "tiles", TILES, 0.5 * run.left())
    run_tests(run, "triton", TRITON, 0.6 * run.left())
    watcher = sanitizer(run)
    if watcher is not None:
        sanitize(run, watcher, "memcheck", 0.6 * run.left(), optional=False)
    rest = f"not ({CUDA} or {TILES} or ({TRITON}))"
    run_tests(run, "others", rest, (0.7 if watcher else 1.0) * run.left(), *GPU_TESTS, ASSEMBLY, optional=True)
    if watcher is not None:
        sanitize(run, watcher, "racecheck", run.left(), optional=True)


def timed(run: Run, name: str, script: str, *options: str, share: float, optional: bool = False) -> None:
    """A benchmark that begins no row after ``share`` of the time left; anew after a row that cost it the GPU."""
    command = [*PYTHON, f"bench/gpu/{script}.py", "--out", str(run.work), "--resume", *options]
    end = time.monotonic() + share * (run.left() - GRACE)
    while (seconds := end - time.monotonic()) > 0:
        seconds_of = [*command, "--seconds", f"{seconds:.1f}"]
        if run.step(name, seconds_of, seconds + GRACE, optional=optional) != GPU_LOST:
            return
    if all(step["step"] != name for step in run.steps):
        run.note(name, f"{'skipped' if optional else 'FAILED'}: no time left to begin it")


INT8 = ["--schemes", "scaled", "dynamic", "raw", "--rows", *INT8_ROWS]
INT4 = ["--schemes", "w4a16", "w4a8", "--group-sizes", "128", "32", "-1", "--rows", *INT4_ROWS]


def bench(run: Run) -> None:
    timed(run, "host", "host", share=0.12)
    timed(run, "fake_quantize", "bench", share=0.32)
    timed(run, "int8_gemm", "gemm", *INT8, share=0.5)
    timed(run, "int4_gemm", "gemm", *INT4, share=0.45)
    # The rows that are left; then what torch.compile has to make first.
    timed(run, "fake_quantize-rest", "bench", share=0.3, optional=True)
    timed(run, "gemm-rest", "gemm", *INT8, share=0.4, optional=True)
    timed(run, "gemm-compiled", "gemm", *INT8, "--compiled", share=0.4, optional=True)
    timed(run, "fake_quantize-compiled", "bench", "--compiled", share=1.0, optional=True)


def find_gpu() -> tuple[dict[str, Any] | None, str]:
    """What machine.py says of this machine, and the sentence for where that is no GPU."""
    done = subprocess.run([*PYTHON, str(Path(machine.__file__))], capture_output=True, text=True, cwd=ROOT, check=False)
    try:
        about = json.loads(done.stdout)
    except ValueError:
        return None, f"gpu: this machine cannot be looked at; nothing was run\n{done.stdout}{done.stderr}"
    if about["torch"] is None:
        return None, "gpu: no torch for this python3, so no GPU; nothing was run"
    if about["gpu"] is None:
        return None, f"gpu: torch {about['torch']} finds no GPU; nothing was run"
    return about, ""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("halves", nargs="+", choices=list(MINUTES), help="in the order given")
    parser.add_argument("--out", type=Path, help="default: bench/results/<gpu>")
    parser.add_argument("--minutes", type=float, help="of the whole run; default: 4.5 for check, 5.5 for bench")
    options = parser.parse_args(argv)
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the step under way ends too
    about, missing = find_gpu()
    if about is None:
        print(missing)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", str(about["gpu"]).lower().removeprefix("nvidia")).strip("-")
    out = (options.out or ROOT / "bench" / "results" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    usual = sum(MINUTES[half] for half in options.halves)
    minutes = options.minutes or usual
    print(f"gpu: {about['gpu']}, torch {about['torch']}; {minutes:g} minutes; results in {out}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        run = Run(Path(work), out, about)
        (run.work / "machine.json").write_text(json.dumps(about, indent=1) + "\n")
        run.note("machine", "passed", time.monotonic() - start)
        run.end = start
        for half in options.halves:
            run.end += 60 * minutes * MINUTES[half] / usual
            if half == options.halves[0]:
                cuda = build(run)
            if half == "check":
                check(run, cuda)
            else:
                bench(run)
    print("\n".join(f"{step['step']:<24}{step['outcome']} ({step['seconds']} s)" for step in run.steps))
    print("gpu: FAILED" if run.failed else "gpu: passed")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
