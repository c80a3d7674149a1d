"""Whether csrc compiles where this machine's own build does not show it: a line for each check, the skipped ones too.

    python tests/portable.py

With the headers of the oldest torch that the kernels are for, by g++ and clang++, and by g++ for aarch64, each if it
is installed. The headers come from the package index (140 MB, of which 60 are kept, in build/): those of
another machine's wheel, as headers are the same and that wheel is the small one. What passed is not compiled again
until csrc or the compiler changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
OLDEST = "2.10.0"
HEADERS = ROOT / "build" / f"torch-{OLDEST}" / "torch" / "include"
WHEEL = ["--only-binary=:all:", "--platform", "manylinux_2_28_aarch64", "--python-version", "3.11"]
FLAGS = ["-std=c++17", "-w", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-x", "c++"]
FLAGS += ['-DQKERNELS_BUILD_ID=""', '-DQKERNELS_BUILD_TORCH=""', f"-I{ROOT / 'csrc'}", "-isystem", str(HEADERS)]
# The compiler, its flags and the files. That a target lacks an instruction clang finds when it makes code, not before.
# The CUDA files stand on the emulator's headers here: all but the device's own instructions.
CHECKS = [
    ("g++", ["-fsyntax-only"], "*.cpp"),
    (
        "g++",
        ["-fsyntax-only", "-DUSE_CUDA", '-DQKERNELS_CUDA_ARCHES=""', f"-I{ROOT / 'tests' / 'cuda_on_cpu'}"],
        "*.cu",
    ),
    ("clang++", ["-O0", "-c", "-o", os.devnull], "*.cpp"),
    ("aarch64-linux-gnu-g++", ["-fsyntax-only"], "*.cpp"),
]


def headers() -> str | None:
    """Brings the headers; why they cannot be had, or None."""
    if HEADERS.is_dir():
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *WHEEL, "-d", folder, f"torch=={OLDEST}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
        HEADERS.parent.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(folder, "torch"), HEADERS.parent)
    return None


def check(compiler: str, flags: list[str], files: str) -> str:
    """Compiles the files and says how it went; ends the process where one does not compile."""
    if shutil.which(compiler) is None:
        return "SKIPPED: it is not installed"
    read = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([version, repr([FLAGS, flags]).encode(), *(path.read_bytes() for path in read)]))
    passed = ROOT / "build" / "portable" / key.hexdigest()
    if passed.exists():
        return "as it was"

    def fault(source: Path) -> str:
        command = [compiler, *FLAGS, *flags, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""

    before = os.times()
    sources = [path for path in read if path.match(files)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = "".join(pool.map(fault, sources))
    if faults:
        sys.exit(f"portable: {compiler}, torch {OLDEST}:\n{faults}")
    after = os.times()
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return f"all {len(sources)} compile, {seconds:.0f} s of CPU"


def main() -> None:
    if reason := headers():
        print(f"portable: SKIPPED: the headers of torch {OLDEST} cannot be had: {reason}")
        return
    for compiler, flags, files in CHECKS:
        print(f"portable: {compiler}, torch {OLDEST}, {files}: {check(compiler, flags, files)}", flush=True)


if __name__ == "__main__":
    main()
