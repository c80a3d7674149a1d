"""Builds of the package: with a compiler, without one, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run_python

SETUP = "import runpy, sys; sys.argv[:] = ['setup.py', *sys.argv[1:]]; runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, without anything built."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a source checkout")
    root = tmp_path / "source"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("csrc", "qkernels"):
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
        cwd=built_before, env={**os.environ, "QKERNELS_STRICT_BUILD": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = wheel_of(built_before)
    built = sorted(name.partition(".")[0] for name in names if name.endswith(".so"))
    assert built == ["qkernels/_cpu", "qkernels/_host"]
    assert {"qkernels/py.typed", "qkernels/_host.pyi", "qkernels/reference/fake_quantize.py"} <= names
    assert not any(name.startswith(("csrc", "tests", "bench")) for name in names)


def test_only_what_changed_is_compiled(built_before: Path) -> None:
    before = set((built_before / "build").rglob("*.o"))
    assert setup(built_before, "-q", "build_ext", "--inplace").returncode == 0
    assert set((built_before / "build").rglob("*.o")) == before
    changed = built_before / "csrc" / "cpu" / "library.cpp"
    changed.write_text(changed.read_text() + "// changed\n")
    assert setup(built_before, "-q", "build_ext", "--inplace").returncode == 0
    new = {path.name for path in set((built_before / "build").rglob("*.o")) - before}
    assert new == {"library.o", "build_id.o"}
    done = run_python("import qkernels as qk; print(qk.library.cpu_missing)", root=built_before)
    assert done.stdout == "None\n", done.stderr


def test_source_archive_holds_the_sources(source: Path) -> None:
    assert setup(source, "-q", "sdist").returncode == 0
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert inside <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "qkernels/py.typed"} <= names


def test_without_torch_the_wheel_is_pure_python(source: Path) -> None:
    done = setup(source, "-q", "bdist_wheel", before="import sys; sys.modules['torch'] = None\n")
    assert done.returncode == 0, done.stderr
    assert "no torch in the build environment: installing as pure Python" in done.stderr
    assert f"pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir {source}" in done.stderr
    names = wheel_of(source)
    assert any(name.endswith("-py3-none-any.whl") for name in names)
    assert not any(name.endswith(".so") for name in names)


def test_torch_too_old_to_build_for(source: Path) -> None:
    done = setup(source, "-q", "build_ext", "--inplace", before="import torch; torch.__version__ = '2.9.1'\n")
    assert done.returncode == 0, done.stderr
    assert "torch 2.9.1 is too old for the C++ kernels (accepted: >= 2.10)" in done.stderr
    assert libraries(source) == []


@pytest.mark.parametrize("strict", [False, True])
def test_no_compiler(source: Path, strict: bool) -> None:
    missing = "/no/such/compiler"
    done = setup(
        source, "-q", "build_ext", "--inplace", CC=missing, CXX=missing, QKERNELS_STRICT_BUILD=str(int(strict))
    )
    assert libraries(source) == []
    if strict:
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    for name in ("qkernels._cpu", "qkernels._host"):
        assert f"{name} did not compile (" in done.stderr
    assert "`python -m qkernels info` gives the command that compiles it" in done.stderr
    done = run_python("import qkernels as qk; print(qk.library.cpu_missing)", root=source)
    assert done.stdout.startswith("the C++ kernels are not built; build them with: "), done.stderr


def test_source_that_does_not_compile(source: Path) -> None:
    for path in (source / "csrc" / "cpu").glob("*.cpp"):
        path.write_text("#error broken\n")
    done = setup(source, "-q", "build_ext", "--inplace")
    assert done.returncode == 0
    assert "qkernels._cpu did not compile (" in done.stderr
    assert libraries(source) == ["_host"]


def test_setuptools_too_old(source: Path) -> None:
    done = setup(source, "--version", before="import setuptools; setuptools.__version__ = '65.5.0'\n")
    assert done.returncode != 0
    assert 'setuptools 65.5.0 is too old; run: pip install "setuptools>=77"' in done.stderr
