"""Whether csrc compiles where this machine's own build does not show it: a line for each check, the skipped ones too.

    python tests/portable.py

With the headers of the oldest and of the newest torch that the kernels are for, by g++ and nvcc; with the oldest's by
clang++ and by g++ for aarch64 too; each compiler if it is installed. One run makes two of these checks, the next run
others (see sampling.py). The headers come from the package index (80 and 127 MB, of which 60 are kept, in build/): from
another machine's wheel, which is small and has the same headers. What passed is not compiled again until csrc or the
compiler changes.
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

from sampling import described, in_turn

ROOT = Path(__file__).parent.parent
OLDEST, NEWEST = "2.10.0", "2.14.1"
WHEELS = {OLDEST: "macosx_11_0_arm64", NEWEST: "macosx_14_0_arm64"}
FLAGS = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", '-DQKERNELS_BUILD_ID=""']
FLAGS += ['-DQKERNELS_BUILD_TORCH=""', f"-I{ROOT / 'csrc'}"]
CUDA = ["-DUSE_CUDA", '-DQKERNELS_CUDA_ARCHES=""']
SYNTAX = ["-w", "-x", "c++", "-fvisibility=hidden", "-fsyntax-only"]
EMULATOR = [*CUDA, f"-I{ROOT / 'tests' / 'cuda_on_cpu'}"]  # all of CUDA but the device's own instructions
NVCC = [*CUDA, "-w", "-arch=sm_90a", "-fdevice-syntax-only", "-cuda", "-o", os.devnull]
# The compiler, its flags and the files. That a target lacks an instruction clang finds when it makes code, not before.
CHECKS = [
    (OLDEST, "g++", SYNTAX, "*.cpp"),
    (OLDEST, "g++", [*SYNTAX, *EMULATOR], "*.cu"),
    (OLDEST, "nvcc", NVCC, "*.cu"),
    (OLDEST, "clang++", ["-w", "-x", "c++", "-fvisibility=hidden", "-O0", "-c", "-o", os.devnull], "*.cpp"),
    (OLDEST, "aarch64-linux-gnu-g++", SYNTAX, "*.cpp"),
    (NEWEST, "g++", SYNTAX, "*.cpp"),
    (NEWEST, "g++", [*SYNTAX, *EMULATOR], "*.cu"),
    (NEWEST, "nvcc", NVCC, "*.cu"),
]


def headers_of(version: str) -> Path:
    return ROOT / "build" / f"torch-{version}" / "torch" / "include"


def bring(version: str) -> str | None:
    """Brings the headers of a torch; why they cannot be had, or None."""
    headers = headers_of(version)
    if headers.is_dir():
        return None
    wheel = ["--only-binary=:all:", "--platform", WHEELS[version], "--python-version", "3.11"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            *wheel,
            "-d",
            folder,
            f"torch=={version}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
        headers.parent.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(folder, "torch"), headers.parent)
    return None


def check(version: str, compiler: str, flags: list[str], files: str) -> str:
    """Compiles the files and says how it went; ends the process where one does not compile."""
    if shutil.which(compiler) is None:
        return "SKIPPED: it is not installed"
    read = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    flags = [*FLAGS, *flags, "-isystem", str(headers_of(version))]
    own = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([own, repr(flags).encode(), *(path.read_bytes() for path in read)]))
    passed = ROOT / "build" / "portable" / key.hexdigest()
    if passed.exists():
        return "as it was"

    def fault(source: Path) -> str:
        command = [compiler, *flags, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""

    before = os.times()
    sources = [path for path in read if path.match(files)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = "".join(pool.map(fault, sources))
    if faults:
        sys.exit(f"portable: {compiler}, torch {version}:\n{faults}")
    after = os.times()
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return f"all {len(sources)} compile, {seconds:.0f} s of CPU"


def main() -> None:
    checks = in_turn(CHECKS, 2)
    missing = {version: bring(version) for version, *_ in checks}
    print(f"portable: {len(checks)} of {len(CHECKS)} checks, {described()}", flush=True)
    for version, compiler, flags, files in checks:
        if reason := missing[version]:
            outcome = f"SKIPPED: the headers cannot be had: {reason}"
        else:
            outcome = check(version, compiler, flags, files)
        print(f"portable: {compiler}, torch {version}, {files}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
