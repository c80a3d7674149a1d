"""What setup.py needs to know of CUDA: the compiler, its flags, and the architectures of TORCH_CUDA_ARCH_LIST."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# No contraction to FMA: it would move ties and so change bits of the result.
FLAGS = ["-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA=1", "-DNDEBUG=1"]
# How nvcc links a library: it knows where its own runtime library is.
LINK = ["-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
DEFAULT_ARCHES = "8.0;8.6;8.9;9.0a;10.0a;12.0+PTX"
# The names that torch takes in TORCH_CUDA_ARCH_LIST. Longer ones come first: each is replaced wherever it stands.
NAMED_ARCHES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def say(text: str) -> None:
    print(f"qkernels: {text}", file=sys.stderr)


def nvcc() -> str:
    """The CUDA compiler: from CUDA_HOME, or on PATH, or where toolkits install themselves. Empty: there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin"))) or ""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def buildable(arches: str) -> str:
    """The part of a TORCH_CUDA_ARCH_LIST that can be compiled here; says what is left out.

    Raises ValueError where nothing is left, or where an entry is no architecture.
    """
    if arches == "native":
        import torch

        gpus = {torch.cuda.get_device_capability(at) for at in range(torch.cuda.device_count())}
        if not gpus:
            raise ValueError("TORCH_CUDA_ARCH_LIST: got 'native', but torch sees no GPU")
        arches = ";".join(f"{major}.{minor}" for major, minor in sorted(gpus)) + "+PTX"
    for name, numbers in NAMED_ARCHES.items():
        arches = arches.replace(name, numbers)
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    kept = []
    for arch in dict.fromkeys(re.split("[; ,]+", arches.strip("; ,"))):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if found is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: got {arch!r}; accepted: {DEFAULT_ARCHES} and their like, or torch's names"
            )
        if int(found[1]) < 8:
            say(f"TORCH_CUDA_ARCH_LIST: {arch} is left out: the CUDA kernels need 8.0 or later")
        elif known and found[1] + found[2] not in known:
            say(f"TORCH_CUDA_ARCH_LIST: {arch} is left out: {nvcc()} does not know it")
        else:
            kept.append(arch)
    if not kept:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST: got {arches!r}; accepted: one at least that compiles, as in {DEFAULT_ARCHES}"
        )
    return ";".join(kept)


def gencode(arches: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0a;12.0+PTX"."""
    flags = []
    for arch in arches.split(";"):
        number, _, ptx = arch.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def flags(wanted: str, has_cuda: bool, optional: bool) -> list[str] | None:
    """nvcc's flags for the CUDA library, or None where it is left out.

    Args:
        wanted: QKERNELS_BUILD.
        has_cuda: whether torch is built with CUDA.
        optional: whether what cannot be compiled is left out. If not, it ends the process.
    """
    if wanted == "cpu" or (wanted == "auto" and not has_cuda):
        return None
    if not nvcc():
        missing = "no nvcc in CUDA_HOME/bin, PATH or /usr/local/cuda/bin: install the CUDA toolkit or set CUDA_HOME"
        if wanted == "cuda" and not optional:
            sys.exit(f"qkernels: {missing}")
        say(f"{missing}; building without the CUDA kernels")
        return None
    try:
        arches = buildable(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHES)
    except ValueError as error:
        if wanted == "cuda" or not optional:
            sys.exit(f"qkernels: {error}")
        say(f"{error}; building without the CUDA kernels")
        return None
    return [*FLAGS, f'-DQKERNELS_CUDA_ARCHES="{arches}"', *gencode(arches)]
