"""One block of text that says what runs here, what does not, and how to mend it: to paste into a bug report."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

import torch

from . import library, loading, registry, selfcheck
from .version import __version__


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = importlib.util.find_spec("triton")
    triton = "not installed; its kernels need: pip install triton"
    if found is not None:
        import triton as module

        triton = module.__version__
    return {
        "qkernels": f"{__version__} ({Path(__file__).parent})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": triton,
        "system": platform.platform(),
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }


def cuda_kernels() -> str:
    if missing := library.cuda_missing():
        return f"no: {missing}"
    file = loading.module_file("_cuda")
    return f"CUDA kernels for {loading.arches_of(file)}" if file else "yes"


def compiled() -> dict[str, str]:
    if library.host is None:
        return {"compiled": f"no: {library.cpu_missing}", "cuda": cuda_kernels()}
    build, minimum = library.host.build_info(), ".".join(map(str, loading.TORCH_MINIMUM))
    names = library.host.isa_names()
    paths = names[: names.index(library.host.supported_isa()) + 1]
    cap = os.environ.get("QKERNELS_CPU_ISA")
    return {
        "compiled": f"CPU kernels by {build['compiler']} for torch >= {minimum} (with {build['torch']})",
        "cpu paths": f"{', '.join(paths)}; active: {library.host.active_isa()}"
        + (f" (capped by QKERNELS_CPU_ISA={cap})" if cap else ""),
        "cuda": cuda_kernels(),
    }


def kernel_lines() -> list[str]:
    """For each op the kernel that runs here, the others that can, and those that cannot with their reasons below."""
    lines, reasons = [], []
    ops = sorted({kernel.op for kernel in registry.kernels()})
    width = max(map(len, ops)) + 2
    for op in ops:
        able, unable = [], []
        for name, reason in registry.which(op):
            if reason is None:
                able.append(name)
                continue
            if reason not in reasons:
                reasons.append(reason)
            unable.append(f"{name}[{reasons.index(reason) + 1}]")
        rest = f"; can run: {', '.join(able[1:])}" if able[1:] else ""
        rest += f"; cannot: {', '.join(unable)}" if unable else ""
        lines.append(f"  {op:<{width}}{able[0]}{rest}")
    return lines + [f"  [{at}] {reason}" for at, reason in enumerate(reasons, 1)]


def verdict(quick: bool) -> tuple[bool, list[str]]:
    """Runs the self-test: whether it passed, and its lines."""
    start = time.perf_counter()
    outcomes = list(selfcheck.run(quick))
    faults = [f"  FAIL {o.op} {o.kernel}: {o.fault}" for o in outcomes if o.fault is not None]
    cases = sum(outcome.cases for outcome in outcomes)
    seconds = time.perf_counter() - start
    summary = f"{len(outcomes)} kernels, {cases} comparisons with the reference, {seconds:.1f} s"
    return not faults, [*faults, f"self-test: {'FAIL' if faults else 'PASS'} ({summary})"]


def main() -> int:
    print("\n".join(f"{key:<10}{value}" for key, value in {**versions(), **compiled()}.items()))
    print("kernels (op, the one that runs here, the others)")
    print("\n".join(kernel_lines()))
    passed, lines = verdict(quick=True)
    print("\n".join(lines))
    return 0 if passed else 1
