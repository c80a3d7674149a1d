"""Builds the C++ libraries on Linux when torch and a compiler are there; without them the package is pure Python."""

import hashlib
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file without its folder on the path
from build_tools import cuda
from build_tools.compiling import compile_if_stale, run
from build_tools.cuda import say

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f'qkernels: setuptools {setuptools.__version__} is too old; run: pip install "setuptools>=77"')

BUILD_ID = "csrc/build_id.cpp"  # the one file that is given the digest of all of csrc: the others compile without it
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10: one binary for it and later torch
CPU_FLAGS = ["-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CPU_FLAGS += ["-Wall", "-Wno-maybe-uninitialized", "-Wno-psabi", "-g0"]


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class BuildInParallel(build_ext):
    """Compiles all files of all libraries at once, and only those that changed or include a file that changed.

    A failed compilation leaves a pure-Python package and says so; QKERNELS_STRICT_BUILD=1 makes it an error.
    """

    def build_extensions(self) -> None:
        jobs = self.parallel or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = [[pool.submit(self.compile, ext, source) for source in ext.sources] for ext in self.extensions]
        for extension, futures in zip(self.extensions, objects, strict=True):
            library = Path(self.get_ext_fullpath(extension.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            # The library is replaced in one step: a process that has the old one open keeps it whole.
            unfinished = library.with_suffix(f".{os.getpid()}.so")
            linker = [cuda.nvcc(), *cuda.LINK] if extension.language == "cuda" else self.compiler.linker_so_cxx
            try:
                built = [future.result() for future in futures]
                run([*linker, "-o", str(unfinished), *built, *extension.extra_link_args])
                unfinished.replace(library)
            except CompileError as error:
                library.unlink(missing_ok=True)
                if not extension.optional:
                    raise
                say(
                    f"{extension.name} did not compile ({error}); the reference kernels serve in its place. "
                    "`python -m qkernels info` gives the command that compiles it."
                )

    def compile(self, extension: Extension, source: str) -> str:
        """The object of one source. Objects of other flags stay in folders of their own."""
        compiler = [cuda.nvcc()] if source.endswith(".cu") else self.compiler.compiler_so_cxx
        flags = extension.extra_compile_args
        if source == BUILD_ID:
            paths = sorted(path for path in Path("csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
            build_id = f"{self.distribution.get_version()}+{digest(*(path.read_bytes() for path in paths))}"
            flags = [f'-DQKERNELS_BUILD_ID="{build_id}"', f'-DQKERNELS_BUILD_TORCH="{torch_version()}"']
        version = cuda.version() if source.endswith(".cu") else ""
        folder = Path(self.build_temp, digest(repr((extension.name, compiler, flags, version)).encode()))
        return compile_if_stale([*compiler, *flags], source, (folder / source).with_suffix(".o"))

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version: torch loads the libraries, and they know nothing of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class WheelForAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def torch_version() -> str:
    import torch

    return str(torch.__version__)


def unbuildable() -> str | None:
    """Why no library can be compiled here, or None."""
    if sys.platform in ("win32", "cygwin", "darwin"):
        return f"the C++ kernels compile on Linux only, this is {platform.system()}"
    try:
        version = torch_version()
    except ImportError:
        return "no torch in the build environment"
    if tuple(map(int, version.split(".")[:2])) < (2, 10):
        return f"torch {version} is too old for the C++ kernels (accepted: >= 2.10)"
    return None


def extensions() -> list[Extension]:
    if (wanted := os.environ.get("QKERNELS_BUILD", "auto")) not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"qkernels: QKERNELS_BUILD: got {wanted!r}; accepted: auto, cpu, cuda, none")
    if wanted == "none":
        return []
    optional = os.environ.get("QKERNELS_STRICT_BUILD") != "1"
    if reason := unbuildable():
        if not optional:
            sys.exit(f"qkernels: {reason}")
        say(f"{reason}: installing as pure Python; `python -m qkernels info` says what would compile the kernels")
        return []
    import torch

    root = Path(torch.__file__).parent
    has_cuda = torch.version.cuda is not None
    # Without libtorch_cuda the CUDA library links with symbols missing: enough to check it where there is no GPU.
    libraries = {"cpu": ["torch_cpu", "c10"], "cuda": ["torch_cpu", "c10", *(["torch_cuda"] if has_cuda else [])]}
    flags = {"cpu": [*CPU_FLAGS, *os.environ.get("QKERNELS_CXXFLAGS", "").split()]}
    if (for_cuda := cuda.flags(wanted, has_cuda, optional)) is not None:
        flags["cuda"] = for_cuda
    return [
        Extension(
            f"qkernels._{kind}",
            [*map(str, sorted(Path("csrc", kind).rglob("*.cu" if kind == "cuda" else "*.cpp"))), BUILD_ID],
            extra_compile_args=[*FLAGS, "-Icsrc", f"-I{root / 'include'}", *own],
            extra_link_args=[f"-L{root / 'lib'}", *(f"-l{name}" for name in libraries[kind])],
            optional=optional,
            language=kind,
        )
        for kind, own in flags.items()
    ]


commands = {"build_ext": BuildInParallel}
if libraries := extensions():
    commands["bdist_wheel"] = WheelForAnyPython
setup(ext_modules=libraries, cmdclass=commands)
