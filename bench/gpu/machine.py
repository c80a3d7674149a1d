"""What the times depend on beside the kernels: GPU, driver, clocks, versions, host. Printed as one JSON object.

A process of its own, so that run.py needs no torch and holds no memory of the GPU while others are timed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ASKED = [
    "driver_version", "persistence_mode", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "clocks_throttle_reasons.active", "power.draw", "power.limit", "temperature.gpu", "memory.used", "mig.mode.current",
    "ecc.mode.current", "utilization.gpu",
]  # fmt: skip


def tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit is, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def answer(command: list[str], **options: Any) -> tuple[int | None, str]:
    """A command's exit code and what it prints; None and why, where it cannot be run or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{type(error).__name__}: {error}"
    return done.returncode, (done.stdout + done.stderr).strip()


def last_line(name: str, *options: str) -> str:
    path = tool(name)
    return answer([path, *options])[1].rpartition("\n")[2] if path else "not installed"


def smi() -> dict[str, str]:
    """The driver, clocks and power by nvidia-smi: idle ones, where nothing runs meanwhile."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not installed"}
    _, said = answer(["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"])
    fields = [field.strip() for field in said.split(",")]
    return dict(zip(ASKED, fields, strict=True)) if len(fields) == len(ASKED) else {"nvidia-smi": said}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def about() -> dict[str, Any]:
    """All of it; ``gpu`` is None where torch finds none, ``torch`` where there is no torch."""
    result: dict[str, Any] = {
        "gpu": None,
        "date": date.today().isoformat(),
        "torch": None,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "nvcc": last_line("nvcc", "--version"),
        "compute-sanitizer": last_line("compute-sanitizer", "--version"),
        "smi": smi(),
    }
    try:
        import torch
    except ImportError:
        return result
    result |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(None)
        result |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return result


if __name__ == "__main__":
    print(json.dumps(about(), indent=1))
