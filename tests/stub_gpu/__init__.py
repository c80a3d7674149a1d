"""Triton on a GPU that is not there: its JIT, its C launchers and its tensor maps are real, the driver does nothing.

``install()`` before the first kernel is launched. Tensors then stand on the CPU, every kernel is specialised and
launched as for an H200, and its outputs are whatever memory held. It shows what only a launch shows (an argument that
is 1 becomes a constant, None and tuples as arguments, grids, tensor maps), how many compilations a program needs, and
what the host does for each call. Only for a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from qkernels import library, registry

H200 = (90, 132, "")  # as int8_gemm.gpu gives it

_folder = tempfile.TemporaryDirectory(prefix="stub_gpu_")  # until the process ends
compilations: Counter[str] = Counter()  # by kernel


class StubDriver(nvidia.CudaDriver):
    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    @staticmethod
    def is_active() -> bool:
        return True


def _compile(name: str, source: str, folder: str, library_dirs: Any, include_dirs: Any, libraries: Any) -> str:
    """As triton.runtime.build does, but without optimization: half of the time is gcc's."""
    out = str(Path(folder, name + sysconfig.get_config_var("EXT_SUFFIX")))
    include = [f"-I{folder}" for folder in (*include_dirs, folder, sysconfig.get_paths()["include"])]
    linked = [*(f"-L{folder}" for folder in library_dirs), *(f"-l:{library}" for library in libraries)]
    subprocess.run(
        ["gcc", source, "-O0", "-w", "-Wno-psabi", "-shared", "-fPIC", "-o", out, *include, *linked], check=True
    )
    return out


def _parsed_only(backend: Any, stages: dict[str, Any], options: Any, language: Any, capability: int) -> None:
    """Leaves the compiler's front end, and of its back end what makes tensor maps: nothing here will run."""
    layouts = stages["ttgir"]

    def ttgir(module: Any, metadata: dict[str, Any]) -> Any:
        if "tt.descriptor" in str(module) or "tensordesc" in str(module):
            return layouts(module, metadata)
        metadata["tensordesc_meta"] = []
        return module

    def llir(module: Any, metadata: dict[str, Any]) -> str:
        scratch = {f"{kind}_scratch_{what}": number for kind in ("global", "profile") for what, number in SIZES}
        metadata.update(shared=0, tmem_size=0, name="kernel", **scratch)
        return ""

    stages.update(ttgir=ttgir, llir=llir, ptx=lambda *_: "", cubin=lambda *_: b"")


SIZES = (("size", 0), ("align", 1))


def _count(**said: Any) -> None:
    compilations[said["fn"].name] += 1


def install(parsed_only: bool = False) -> ctypes.CDLL:
    """Makes the driver Triton's own, and returns it. ``parsed_only``: with nothing compiled beyond the front end."""
    from qkernels.triton import int4_gemm, int8_gemm
    from qkernels.triton.common import replay

    folder = Path(_folder.name)
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("driver.c")
    options = ["-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, "-o", str(library), str(source)], check=True)
    knobs.nvidia.libcuda_path = str(folder)
    driver = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    knobs.build.impl = _compile
    knobs.runtime.jit_post_compile_hook = _count
    if parsed_only:
        knobs.runtime.add_stages_inspection_hook = _parsed_only
    triton.runtime.driver.set_active(StubDriver())
    replay.HARMLESS |= {"min", "max", "_local_scalar_dense"}  # checks look at values on the CPU alone
    for module in (int8_gemm, int4_gemm):
        module.gpu = lambda device: H200
    return driver


def serve() -> torch.library.Library:
    """Puts Triton where torch's dispatcher finds it for CPU tensors, as qkernels does on a GPU's for the GPU's.

    Lasts as long as what it returns.
    """
    library.triton_missing = lambda device: None
    library.isa_missing = lambda isa: "it is covered"
    library.gpu, library.GPU_KEY = "cpu", "CPU"
    served = torch.library.Library("qkernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in {kernel.op for kernel in registry.kernels() if kernel.name == "triton"}:
            served.impl(op, library.remembered_else_selected(op), "CPU", allow_override=True)
    return served


def launches(driver: ctypes.CDLL) -> int:
    return ctypes.c_ulong.in_dll(driver, "stub_launches").value
