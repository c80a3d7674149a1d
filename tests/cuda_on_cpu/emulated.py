"""Runs the CUDA kernels on the CPU: compiles csrc/cuda against the emulator beside this file, or plugs it into pytest.

    python tests/cuda_on_cpu/emulated.py FOLDER                          # compile; prints the library's path
    PYTHONPATH=tests/cuda_on_cpu pytest -p emulated tests/test_quantize.py

As a plugin it puts the emulated kernels in place of the C++ ones, under the name "cuda", for CPU tensors.
EMULATED_CXXFLAGS adds compiler flags (a sanitizer); EMULATED_BUILD names the folder, build/emulated by default.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# What only a look at the values could refuse: the CPU's checks do, on a GPU they would cost a synchronisation.
NOT_CHECKED_ON_THE_DEVICE = ("zero_point value", "[zero_point-", "test_bad_input[zero point-")


def build(folder: Path) -> Path:
    """The emulated library, compiled unless it is there for these sources and flags."""
    include = Path(torch.__file__).parent / "include"
    library = Path(torch.__file__).parent / "lib"
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-w",
        "-U_FORTIFY_SOURCE",
    ]
    flags += ["-DUSE_CUDA", '-DQKERNELS_CUDA_ARCHES="none"', "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{path}" for path in (HERE, ROOT / "csrc", include)]
    flags += os.environ.get("EMULATED_CXXFLAGS", "").split()
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    read = [*sources, *sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]
    read.append(HERE / "cuda_runtime.h")
    digest = hashlib.sha256(b"\0".join([repr(flags).encode(), *(path.read_bytes() for path in read)])).hexdigest()[:16]
    built = folder / f"emulated-{digest}.so"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", "-c", "-x", "c++", *flags, str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    link = ["g++", "-shared", "-o", str(built), *objects, f"-L{library}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, *os.environ.get("EMULATED_CXXFLAGS", "").split()], check=True)
    return built


def install(library_file: Path) -> None:
    """Makes the emulated kernels the "cuda" kernels of CPU tensors."""
    from qkernels import library, registry

    library.gpu, library.GPU_KEY = "cpu", "CPU"
    library.cuda_state.append(None)
    for op in {kernel.op for kernel in registry.kernels() if kernel.name == "cuda"}:
        registry._kernels[op] = [k for k in registry._kernels[op] if k.name in ("cuda", registry.REFERENCE)]
    torch.ops.load_library(str(library_file))


def pytest_configure(config: object) -> None:
    install(build(Path(os.environ.get("EMULATED_BUILD", ROOT / "build" / "emulated"))))


def pytest_collection_modifyitems(config: object, items: list) -> None:
    items[:] = [
        item for item in items if "cuda" not in item.name or not any(n in item.name for n in NOT_CHECKED_ON_THE_DEVICE)
    ]


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
