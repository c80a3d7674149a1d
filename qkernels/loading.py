"""Finds, verifies and loads the compiled libraries, and gives the command that builds them.

This file knows files, torch's version and the driver, but no op; ``library`` calls it once for each library.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import struct
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from .host import Host
from .registry import Mendable
from .version import __version__

PACKAGE = "qkernels"
TORCH_MINIMUM = (2, 10)  # first torch with the stable ABI that csrc is written against


def _version_of_torch() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build_command(environment: str = "") -> str:
    """The command that compiles the kernels for this installation of the package, or fails if it cannot."""
    # Without --no-cache-dir pip could install a pure-Python wheel that it has built and kept earlier.
    return (
        'pip install "setuptools>=77" && '
        f"{environment}{' ' * bool(environment)}QKERNELS_STRICT_BUILD=1 pip install --no-build-isolation --no-deps "
        f"--force-reinstall --no-cache-dir {_source()}"
    )


def _source() -> str:
    """Where pip finds this package's sources: the checkout, the installation's origin, or the package index."""
    checkout = Path(__file__).parent.parent
    if (checkout / "setup.py").exists():
        return f"-e {shlex.quote(str(checkout))}"
    origin: dict[str, Any] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        origin = json.loads(importlib.metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    if url.startswith("file://"):
        path = Path(unquote(url.removeprefix("file://")))
        # A wheel holds no sources. They may lie beside it, or above the dist/ that it was built into.
        sources = [path]
        if path.suffix == ".whl":
            sources = [path.with_name(f"{PACKAGE}-{__version__}.tar.gz"), path.parent.parent]
        for source in sources:
            if source.is_file() or (source / "setup.py").exists():
                return shlex.quote(str(source))
    elif url and not url.endswith(".whl"):
        return shlex.quote(url)
    return f"--no-binary {PACKAGE} {PACKAGE}=={__version__}"


def module_file(name: str) -> Path | None:
    """The file of a compiled library, or None. It is no Python module, so its name has no Python version."""
    path = Path(__file__).with_name(f"{name}.so")
    return path if path.exists() else None


def fault_of(module: Path) -> str | None:
    """Why a compiled library must not be loaded (cut short, or built from other sources), or None."""
    data = module.read_bytes()
    if len(data) < 64 or data[:4] != b"\x7fELF":
        return f"{module.name} is not a shared library"
    # An ELF file ends with its section table. To load a truncated file can kill the process.
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, entries = struct.unpack_from("<HH", data, 0x3A)
    if len(data) < table + entry_size * entries:
        return f"{module.name} is truncated: {len(data)} bytes, should be at least {table + entry_size * entries}"
    found = re.search(rb"qkernels-build-id:([^;]*)\+(\w*);", data)
    version, sources = (part.decode() for part in found.groups()) if found else ("unknown", "unknown")
    if version != __version__:
        return f"{module.name} is stale: built for qkernels {version}, this is {__version__}"
    checkout = Path(__file__).parent.parent / "csrc"
    if checkout.is_dir() and sources != _digest_of(checkout):
        return f"{module.name} is stale: csrc has changed since it was built"
    return None


def _digest_of(csrc: Path) -> str:
    """The digest of the sources, as setup.py writes it into a library that it builds from them."""
    files = sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def unbuildable() -> str | None:
    """Why no compiled library can run on this system and with this torch, or None."""
    if sys.platform in ("win32", "cygwin", "darwin"):
        return f"the compiled kernels are for Linux, this is {platform.system()}"
    if _version_of_torch() < TORCH_MINIMUM:
        return Mendable(
            f"torch {torch.__version__} is too old for the C++ kernels, which need torch >= "
            f"{'.'.join(map(str, TORCH_MINIMUM))}; upgrade with: pip install -U torch"
        )
    return None


def load_cpu() -> tuple[Host | None, str | None]:
    """Loads the CPU kernels. Returns a ``Host``, which tells the CPU's paths, or None and the reason."""
    if reason := unbuildable():
        return None, reason
    file = module_file("_cpu")
    if file is None:
        return None, Mendable(f"the C++ kernels are not built; build them with: {build_command()}")
    try:
        if fault := fault_of(file):
            raise OSError(fault)
        torch.ops.load_library(str(file))
        return Host(file), None
    except (OSError, AttributeError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        return None, Mendable(f"the C++ kernels cannot be loaded ({first_line}); rebuild them with: {build_command()}")


def load_cuda() -> str | None:
    """Loads the CUDA kernels. Returns None, or the reason why it cannot."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if reason := unbuildable():
        return reason
    file = module_file("_cuda")
    if file is None:
        return Mendable(f"the CUDA kernels are not built; build them with: {build_command('QKERNELS_BUILD=cuda')}")
    try:
        if fault := fault_of(file):
            raise OSError(fault)
        if reason := _driver_too_old(file):
            return reason
        arches = arches_of(file)
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if not holds(arches, capability):
                own = f"{capability[0]}.{capability[1]}"
                environment = f'QKERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="{own}"'
                name = torch.cuda.get_device_name(index)
                return Mendable(
                    f"the CUDA kernels are built for {arches} and not for {own}, which {name} is; build them with: "
                    f"{build_command(environment)}"
                )
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        command = build_command("QKERNELS_BUILD=cuda")
        return Mendable(f"the CUDA kernels cannot be loaded ({first_line}); rebuild them with: {command}")
    return None


def _driver_too_old(cuda_library: Path) -> str | None:
    """Why the driver cannot run the library's code, or None. A driver runs code up to its own major CUDA version."""
    found = re.search(rb"qkernels-cuda-version:(\d+)", cuda_library.read_bytes())
    if found is None:
        return None
    built, driver = int(found[1]), torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if built // 1000 <= driver // 1000:
        return None
    command = build_command("QKERNELS_BUILD=cuda CUDA_HOME=/path/to/cuda")
    return Mendable(
        f"the CUDA kernels are built by CUDA {built // 1000}.{built % 1000 // 10}, and the NVIDIA driver is for CUDA "
        f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or build them by a CUDA of its version with: "
        f"{command}"
    )


def arches_of(cuda_library: Path) -> str:
    """The architectures that a CUDA library was compiled for, as in TORCH_CUDA_ARCH_LIST."""
    found = re.search(rb"qkernels-cuda-arches:([^\0]*)", cuda_library.read_bytes())
    return found[1].decode() if found else "unknown"


def holds(arches: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``arches`` ("8.0;9.0a;12.0+PTX") runs on a GPU of this compute capability."""
    for arch in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", arches):
        built = int(arch[0]), int(arch[1])
        if arch[2] == "a":  # such code runs on this architecture alone
            fits = built == capability
        else:
            fits = built[0] == capability[0] and built <= capability
        if fits or (arch[3] and not arch[2] and built <= capability):
            return True
    return False
