"""What a benchmark divides by: integer dot products that touch registers only, and memory read end to end.

Compiled from ceilings.cpp on first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import qkernels as qk

ROOT = Path(__file__).parent.parent


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The functions of ceilings.cpp; None where there is no C++ compiler or no CPU library whose path they follow."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or qk.library.host is None:
        return None
    source = ROOT / "bench" / "ceilings.cpp"
    sources = [source, *(ROOT / "csrc/cpu/common" / name for name in ("isa.h", "amx.h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    built = ROOT / "build" / f"ceilings-{digest}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}.so")
        flags = ["-std=c++17", "-O3", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
        subprocess.run([compiler, *flags, str(source), "-o", str(unfinished)], check=True)
        unfinished.replace(built)
    c = ctypes.CDLL(str(built))
    c.dot_ceiling.argtypes = [ctypes.c_int, ctypes.c_double]
    c.read_ceiling.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    c.dot_ceiling.restype = c.read_ceiling.restype = ctypes.c_double
    return c


def dot_ceiling(seconds: float) -> float:
    """Operations per second of int8 dot products in registers on the active path, on this thread."""
    host = qk.library.host
    return float(compiled().dot_ceiling(host.isa_names().index(host.active_isa()), seconds))


def read_ceiling(address: int, bytes: int) -> float:
    """Bytes per second of reading memory end to end on this thread."""
    return float(compiled().read_ceiling(address, bytes))


def cache_bytes() -> int:
    """Of the largest cache that a core sees; 32 MiB where the system does not say."""
    sizes = [
        int(file.read_text().strip().removesuffix("K")) << 10
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 << 20)


def ceilings(threads: int) -> dict[str, float]:
    """Operations per second of dot products in registers, bytes per second of memory read end to end."""
    if compiled() is None:
        return {}
    area = mmap.mmap(-1, max(256 << 20, 4 * cache_bytes()))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as packed weights have them
        area.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(area, dtype=torch.uint8).fill_(1)
    part = memory.numel() // threads // 64 * 64

    def best(call: Callable[[int], float]) -> float:
        with ThreadPoolExecutor(threads) as pool:
            return max(sum(pool.map(call, range(threads))) for _ in range(5))

    return {
        "ops_per_second": best(lambda thread: dot_ceiling(0.05)),
        "bytes_per_second": best(lambda thread: read_ceiling(memory.data_ptr() + thread * part, part)),
    }
