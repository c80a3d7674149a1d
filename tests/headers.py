"""Whether every file of CPU kernels parses alone, as an editor reads it: it includes what it uses.

python tests/headers.py          each csrc/cpu/**/*_kernels.h, as the scalar path
python tests/headers.py --all    each header of csrc/cpu, as every path that compiles it
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"
PATHS = ("scalar", "avx2", "avx512", "avx512vnni")  # as csrc/cpu/common/isa.h numbers those that are compiled
FLAGS = ["-std=c++17", "-fsyntax-only", "-w", "-x", "c++", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]
PARTS = {"foreach_isa.h", "end_of_path.h"}  # they surround what they compile


def paths_of(header: Path) -> list[str]:
    """The paths that compile a header, the scalar one first."""
    if header.stem == "amx":  # the path that has the code of another one
        return ["avx512vnni"]
    if (path := header.stem.split("_")[0]) in PATHS:
        return [path]
    return [
        path
        for path in PATHS
        if path != ("avx512" if header.parent.name.endswith(("_gemm", "_conv", "_program")) else "avx512vnni")
    ]


def fault(job: tuple[Path, str]) -> str:
    header, path = job
    command = ["g++", *FLAGS, f"-DQK_PATH={PATHS.index(path)}", str(header)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{header.relative_to(ROOT)}, path {path}:\n{done.stderr}" if done.returncode else ""


def faults(everything: bool = False) -> str:
    """What g++ says of the headers that do not parse alone; empty: all do."""
    headers = [path for path in sorted(CPU.rglob("*.h" if everything else "*_kernels.h")) if path.name not in PARTS]
    jobs = [(header, path) for header in headers for path in (paths_of(header) if everything else paths_of(header)[:1])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "".join(pool.map(fault, jobs))


if __name__ == "__main__":
    sys.exit(faults("--all" in sys.argv) or None)
