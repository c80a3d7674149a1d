"""Builds the C++ extensions when torch and a compiler are there; without them the package is pure Python."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f'qkernels: setuptools {setuptools.__version__} is too old; run: pip install "setuptools>=77"')

TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10: one binary for it and all later torch
BUILD_ID = "csrc/build_id.cpp"  # the one file that is told what all of csrc was, so that the others need no recompile
SOURCES = sorted(path for path in Path("csrc").rglob("*") if path.suffix in (".cpp", ".h"))


def say(text: str) -> None:
    print(f"qkernels: {text}", file=sys.stderr)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class BuildInParallel(build_ext):
    """Compiles all files at once, each again only if it, a header or a flag changed.

    A failed compilation leaves a pure-Python package and says so; QKERNELS_STRICT_BUILD=1 makes it an error.
    """

    def build_extensions(self) -> None:
        jobs = self.parallel or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = [[pool.submit(self.compile, ext, source) for source in ext.sources] for ext in self.extensions]
        for extension, futures in zip(self.extensions, objects, strict=True):
            library = Path(self.get_ext_fullpath(extension.name))
            library.unlink(missing_ok=True)
            try:
                self.compiler.link_shared_object(
                    [future.result() for future in futures],
                    str(library),
                    libraries=extension.libraries,
                    library_dirs=extension.library_dirs,
                    build_temp=self.build_temp,
                    target_lang="c++",
                )
            except (CompileError, LinkError) as error:
                if not extension.optional:
                    raise
                say(
                    f"{extension.name} did not compile ({error}); the reference kernels serve in its place. "
                    "`python -m qkernels info` gives the command that compiles it."
                )

    def compile(self, extension: Extension, source: str) -> str:
        flags = [*extension.extra_compile_args, *(f"-D{name}={value}" for name, value in extension.define_macros)]
        if source == BUILD_ID:
            everything = digest(*(path.read_bytes() for path in SOURCES))
            flags.append(f'-DQKERNELS_BUILD_ID="{self.distribution.get_version()}+{everything}"')
        headers = [path.read_bytes() for path in SOURCES if path.suffix == ".h"]
        compiler = repr((self.compiler.compiler_so_cxx, extension.include_dirs, flags)).encode()
        folder = Path(self.build_temp, digest(Path(source).read_bytes(), *headers, compiler))
        built = folder / Path(source).with_suffix(".o")
        if not built.exists():
            self.compiler.compile([source], str(folder), include_dirs=extension.include_dirs, extra_postargs=flags)
        return str(built)


def extensions() -> list[Extension]:
    if os.environ.get("QKERNELS_BUILD", "auto") == "none":
        return []
    try:
        import torch
    except ImportError:
        say(
            "no torch in the build environment: installing as pure Python. Compile the kernels later with: "
            'pip install "setuptools>=77" && pip install --no-build-isolation --no-deps --force-reinstall '
            f"--no-cache-dir {Path.cwd()}"
        )
        return []
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        say(f"torch {torch.__version__} is too old for the C++ kernels (accepted: >= 2.10): installing as pure Python")
        return []
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += [
        "-Wall",
        "-Wno-maybe-uninitialized",
        "-Wno-psabi",
        "-g0",
        *os.environ.get("QKERNELS_CXXFLAGS", "").split(),
    ]
    optional = os.environ.get("QKERNELS_STRICT_BUILD") != "1"
    cpu = Extension(
        "qkernels._cpu",
        sources=[*sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")), BUILD_ID],
        include_dirs=[str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=["-O3", *flags],
        py_limited_api=True,
        optional=optional,
    )
    host = Extension(
        "qkernels._host",
        sources=["csrc/host.cpp", BUILD_ID],
        include_dirs=[str(torch_root / "include")],  # for the pybind11 that torch ships; nothing of torch itself
        define_macros=[("QKERNELS_BUILD_TORCH", f'"{torch.__version__}"')],
        extra_compile_args=["-O1", *flags],
        optional=optional,
    )
    return [cpu, host]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildInParallel})
