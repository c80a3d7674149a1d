"""Builds the C++ extension when torch and a compiler are there; without them the package is pure Python."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10: one binary for it and all later torch


def say(text: str) -> None:
    print(f"qkernels: {text}", file=sys.stderr)


class BuildOptional(build_ext):
    """A failed compilation leaves a pure-Python package and says so; QKERNELS_STRICT_BUILD=1 makes it an error."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get("QKERNELS_STRICT_BUILD") == "1":
                raise
            say(f"{ext.name} did not compile ({error}); the reference kernels serve in its place. "
                "`python -m qkernels info` tells the command that compiles it.")


def extensions() -> list[Extension]:
    if os.environ.get("QKERNELS_BUILD", "auto") == "none":
        return []
    try:
        import torch
        from pybind11 import get_include
    except ImportError as missing:
        say(f"no {missing.name} in the build environment: installing as pure Python. Compile the kernels later with: "
            "pip install --no-build-isolation --no-deps --force-reinstall <this package>")
        return []
    torch_root = Path(torch.__file__).parent
    headers = [str(path) for path in Path("csrc").rglob("*.h")]
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
             "-Wall", "-Wno-maybe-uninitialized", "-Wno-psabi", "-g0", *os.environ.get("QKERNELS_CXXFLAGS", "").split()]
    cpu = Extension(
        "qkernels._cpu",
        sources=sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=headers,
        include_dirs=[str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("Py_LIMITED_API", "0x030A0000")],
        extra_compile_args=flags,
        py_limited_api=True,
        language="c++",
    )
    host = Extension(
        "qkernels._host",
        sources=["csrc/host.cpp"],
        depends=headers,
        include_dirs=[get_include()],
        define_macros=[("QKERNELS_BUILD_TORCH", f'"{torch.__version__}"')],
        extra_compile_args=["-O1", *flags[1:]],
        language="c++",
    )
    return [cpu, host]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOptional})
