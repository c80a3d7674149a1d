"""Builds of the package: with a compiler, without one, without torch, on other systems."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run_python

SETUP = "import runpy, sys; sys.argv[:] = ['setup.py', *sys.argv[1:]]; runpy.run_path('setup.py', run_name='__main__')"
CPU_ONLY = {"QKERNELS_BUILD": "cpu"}  # a torch built with CUDA and an nvcc would compile for minutes, and well


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, without anything built."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a source checkout")
    root = tmp_path / "source"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile", ".clang-format"):
        shutil.copy(ROOT / name, root)
    for page in ROOT.glob("*.md"):
        shutil.copy(page, root)
    for name in ("build_tools", "csrc", "qkernels", "tests", "bench", "docs", "examples", ".ci"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return root


@pytest.fixture
def built_before(source: Path) -> Path:
    """The same, with the objects that the checkout was built from: compiling all of them again takes half a minute."""
    objects = list((ROOT / "build").glob("temp.*"))
    if not objects:
        pytest.skip("needs the objects of `make build`")
    for folder in objects:
        shutil.copytree(folder, source / "build" / folder.name)
    return source


def setup(root: Path, *arguments: str, before: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return run_python(before + SETUP, *arguments, root=root, **env)


def wheel_of(root: Path) -> set[str]:
    (wheel,) = (root / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {wheel.name, *archive.namelist()}


def libraries(root: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (root / "qkernels").glob("*.so"))


def test_wheel_holds_the_libraries(built_before: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "dist", "."],
        cwd=built_before, env={**os.environ, "QKERNELS_STRICT_BUILD": "1", **CPU_ONLY}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = wheel_of(built_before)
    # One binary for every Python: neither the wheel nor the library carries the tag of one.
    assert [name for name in names if name.endswith(".so")] == ["qkernels/_cpu.so"]
    assert any(re.fullmatch(r"qkernels-[\w.]+-py3-none-linux_\w+\.whl", name) for name in names)
    assert {"qkernels/py.typed", "qkernels/reference/fake_quantize.py"} <= names
    assert not any(name.startswith(("csrc", "tests", "bench")) for name in names)


def test_only_what_changed_is_compiled(built_before: Path) -> None:
    """A source, or a header that one source includes: that source again, and the file that holds the build's id."""
    objects = {path: path.stat().st_mtime_ns for path in (built_before / "build").rglob("*.o")}

    def compiled() -> set[str]:
        done = setup(built_before, "-q", "build_ext", "--inplace", **CPU_ONLY)
        assert done.returncode == 0, done.stderr
        now = {path: path.stat().st_mtime_ns for path in (built_before / "build").rglob("*.o")}
        changed = {path.name for path, when in now.items() if objects.get(path) != when}
        objects.update(now)
        return changed

    assert compiled() == set()
    header, source = built_before / "csrc" / "cpu" / "added.h", built_before / "csrc" / "cpu" / "common" / "host.cpp"
    header.write_text("// added\n")
    source.write_text(source.read_text() + '#include "cpu/added.h"\n')
    assert compiled() == {"host.o", "build_id.o"}
    header.write_text("// changed\n")
    assert compiled() == {"host.o", "build_id.o"}
    header.write_text("// added\n")  # put back, with a time before that of the object
    os.utime(header, ns=(0, 0))
    assert compiled() == {"host.o"}  # the build id of these contents was compiled before
    done = run_python("import qkernels as qk; print(qk.library.cpu_missing)", root=built_before)
    assert done.stdout == "None\n", done.stderr


def test_source_archive_holds_the_sources_and_all_that_tests_them(source: Path) -> None:
    assert setup(source, "-q", "sdist").returncode == 0
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    everything = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name in everything if not name.startswith(("dist/", "qkernels.egg-info/"))} <= names
    assert {"tests/conftest.py", "tests/cases.py", "csrc/tensor.h", "qkernels/py.typed"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_without_torch_the_wheel_is_pure_python(source: Path) -> None:
    done = setup(source, "-q", "bdist_wheel", before="import sys; sys.modules['torch'] = None\n")
    assert done.returncode == 0, done.stderr
    assert "no torch in the build environment: installing as pure Python" in done.stderr
    assert "`python -m qkernels info` says what would compile the kernels" in done.stderr
    names = wheel_of(source)
    assert any(name.endswith("-py3-none-any.whl") for name in names)
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.parametrize(("platform", "system"), [("win32", "Windows"), ("darwin", "Darwin")])
@pytest.mark.parametrize("strict", [False, True])
def test_other_systems_get_the_wheel_in_pure_python(source: Path, platform: str, system: str, strict: bool) -> None:
    """Before any compiler is looked at: MSVC's class lacks what setup.py reads, and no library there is an ELF file."""
    before = f"""
import platform, sys
import setuptools.command.bdist_wheel
sys.platform, platform.system = {platform!r}, lambda: {system!r}
"""
    done = setup(source, "-q", "bdist_wheel", before=before, QKERNELS_STRICT_BUILD=str(int(strict)))
    reason = f"the C++ kernels compile on Linux only, this is {system}"
    if strict:
        assert done.returncode != 0
        assert done.stderr.splitlines()[-1] == f"qkernels: {reason}"
        return
    assert done.returncode == 0, done.stderr
    assert f"{reason}: installing as pure Python" in done.stderr
    names = wheel_of(source)
    assert any(name.endswith("-py3-none-any.whl") for name in names)
    assert not any(name.endswith(".so") for name in names)


def gencodes(arches: str, tmp_path: Path, **env: str) -> tuple[list[str] | None, str]:
    """The architectures that setup.py hands to nvcc (None: it stops, or leaves the CUDA library out), and what it says.

    For a torch with CUDA that sees no GPU, and an nvcc that knows 8.0 to 12.1.
    """
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 80 86 89 90 100 103 120 121\n")
    nvcc.chmod(0o755)
    code = """
import runpy, sys, setuptools
from types import SimpleNamespace as fake
sys.modules["torch"] = fake(
    __version__="2.13.0", __file__="torch/init", version=fake(cuda="13.0"), cuda=fake(device_count=lambda: 0)
)
setuptools.setup = lambda ext_modules, cmdclass: print(*[
    flag.rpartition("code=")[2] for ext in ext_modules for flag in ext.extra_compile_args if "-gencode" in flag
] or [len(ext_modules)])
runpy.run_path("setup.py", run_name="__main__")
"""
    done = run_python(code, TORCH_CUDA_ARCH_LIST=arches, CUDA_HOME=str(tmp_path), **env)
    if done.returncode or done.stdout == "1\n":  # 1: the CPU library alone
        return None, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")
@pytest.mark.parametrize(
    ("arches", "codes", "left_out"),
    [
        ("8.0;9.0a", ["sm_80", "sm_90a"], []),
        ("8.0 9.0+PTX", ["sm_80", "sm_90", "compute_90"], []),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"], ["7.5"]),
        ("Hopper", ["sm_90", "compute_90"], []),
        ("Turing;Ampere;Ada", ["sm_80", "sm_86", "compute_86", "sm_89", "compute_89"], ["7.5+PTX"]),
        ("Blackwell", ["sm_100", "sm_103", "sm_120", "sm_121", "compute_121"], []),
        ("Volta+Tegra;Ampere+Tegra;8.0", ["sm_80"], ["7.2", "8.7"]),  # nvcc here knows no 8.7
        ("8.0;13.0", ["sm_80"], ["13.0"]),
        ("8.0;8.0", ["sm_80"], []),
    ],
)
@pytest.mark.parametrize("strict", ["0", "1"])
def test_architectures_that_do_not_compile_are_named_and_left_out(
    tmp_path: Path, arches: str, codes: list[str], left_out: list[str], strict: str
) -> None:
    """Also where the build is strict: the list of a container, as in the third case, is not the user's own."""
    got, said = gencodes(arches, tmp_path, QKERNELS_STRICT_BUILD=strict)
    assert got == codes
    assert re.findall(r"TORCH_CUDA_ARCH_LIST: (\S+) is left out: ", said) == left_out


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")
@pytest.mark.parametrize(
    ("arches", "reason"),
    [
        ("7.5", "got '7.5'; accepted: one at least that compiles"),
        ("Turing", "got '7.5+PTX'; accepted: one at least that compiles"),
        ("Hoper", "got 'Hoper'; accepted: 8.0;8.6"),
        ("8.0;9", "got '9'; accepted: 8.0;8.6"),
        ("native", "got 'native', but torch sees no GPU"),
    ],
)
def test_architectures_of_which_none_compiles_cost_the_cuda_kernels_alone(
    tmp_path: Path, arches: str, reason: str
) -> None:
    got, said = gencodes(arches, tmp_path)
    assert got is None
    assert f"qkernels: TORCH_CUDA_ARCH_LIST: {reason}" in said
    assert said.endswith("; building without the CUDA kernels\n")
    for env in ({"QKERNELS_STRICT_BUILD": "1"}, {"QKERNELS_BUILD": "cuda"}):
        got, said = gencodes(arches, tmp_path, **env)
        assert got is None
        assert said.splitlines()[-1].startswith(f"qkernels: TORCH_CUDA_ARCH_LIST: {reason}")
        assert "building without" not in said


def test_torch_too_old_to_build_for(source: Path) -> None:
    done = setup(source, "-q", "build_ext", "--inplace", before="import torch; torch.__version__ = '2.9.1'\n")
    assert done.returncode == 0, done.stderr
    assert "torch 2.9.1 is too old for the C++ kernels (accepted: >= 2.10)" in done.stderr
    assert libraries(source) == []


@pytest.mark.parametrize("strict", [False, True])
def test_no_compiler(source: Path, strict: bool) -> None:
    missing = "/no/such/compiler"
    done = setup(
        source, "-q", "build_ext", "--inplace",
        CC=missing, CXX=missing, QKERNELS_STRICT_BUILD=str(int(strict)), **CPU_ONLY,
    )  # fmt: skip
    assert libraries(source) == []
    if strict:
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    assert "qkernels._cpu did not compile (" in done.stderr
    assert "`python -m qkernels info` gives the command that compiles it" in done.stderr
    done = run_python("import qkernels as qk; print(qk.library.cpu_missing)", root=source)
    assert done.stdout.startswith("the C++ kernels are not built; build them with: "), done.stderr


def test_source_that_does_not_compile(source: Path) -> None:
    for path in (source / "csrc" / "cpu").rglob("*.cpp"):
        path.write_text("#error broken\n")
    done = setup(source, "-q", "build_ext", "--inplace", **CPU_ONLY)
    assert done.returncode == 0
    assert "qkernels._cpu did not compile (" in done.stderr
    assert libraries(source) == []


def test_setuptools_too_old(source: Path) -> None:
    done = setup(source, "--version", before="import setuptools; setuptools.__version__ = '65.5.0'\n")
    assert done.returncode != 0
    assert 'setuptools 65.5.0 is too old; run: pip install "setuptools>=77"' in done.stderr
