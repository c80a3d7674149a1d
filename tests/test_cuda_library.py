"""The CUDA library without a GPU: it compiles, loads, and registers what the package says it holds; reasons are given.

`make test` compiles the library into build/cuda by calling this file; without nvcc these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python
from sampling import described, in_turn

import qkernels as qk
from qkernels import library, loading, registry
from qkernels.registry import Mendable

BUILD = ROOT / "build" / "cuda"
ARCHES = ("8.0", "8.6", "8.9", "9.0a", "10.0a", "12.0+PTX")
COMPILED = in_turn(ARCHES)  # one architecture a run, every one each night


def compile_library() -> Path:
    """Compiles the library for the architectures of this run, unless it is up to date."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(BUILD)]
    wanted = {"QKERNELS_BUILD": "cuda", "QKERNELS_STRICT_BUILD": "1", "TORCH_CUDA_ARCH_LIST": ";".join(COMPILED)}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **wanted}, check=True)
    return BUILD / "qkernels" / "_cuda.so"


@pytest.fixture(scope="session")
def compiled() -> Path:
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        pytest.skip("needs nvcc")
    if not (ROOT / "csrc" / "cuda").exists():
        pytest.skip("needs a source checkout")
    return compile_library()


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("stub") / "stub.so"
    source = ROOT / "tests" / "cuda_on_cpu" / "stub.cpp"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    return built


def declared() -> set[str]:
    """At the ops' own keys, but for kernels that take some calls only: those are asked first."""
    return {library.cuda_op(kernel.op) for kernel in qk.kernels() if kernel.name == "cuda"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch brings the symbols itself")
def test_it_loads_and_registers_what_is_declared(compiled: Path, stub: Path) -> None:
    code = """
import ctypes, sys, torch, qkernels as qk
ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
for op in sorted({kernel.op for kernel in qk.kernels()}):
    for name in {op, qk.library.cuda_op(op)}:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{name}", "CUDA"):
            print(name)
"""
    done = run_python(code, str(compiled), str(stub))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == declared()
    assert {"fake_quantize_learnable_backward", "int4_linear_cuda"} <= declared()
    assert "int4_linear" not in declared()


def test_it_belongs_to_this_checkout_and_says_its_architectures(compiled: Path) -> None:
    assert loading.fault_of(compiled) is None
    assert loading.arches_of(compiled) == ";".join(COMPILED)


def test_only_the_stream_is_missing_from_torch_without_cuda(compiled: Path) -> None:
    """One symbol of libtorch_cuda is needed; the CUDA runtime is linked in."""
    symbols = subprocess.run(["nm", "-D", "-u", str(compiled)], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1].partition("@")[0] for line in symbols.splitlines()}
    assert {name for name in needed if "cuda" in name} <= {
        "aoti_torch_get_current_cuda_stream",
        "aoti_torch_device_type_cuda",
    }
    headers = subprocess.run(["readelf", "-d", str(compiled)], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in headers


@pytest.mark.parametrize(
    ("arches", "capability", "fits"),
    [
        ("8.0;9.0a", (8, 0), True),
        ("8.0;9.0a", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0;9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("9.0", (10, 0), False),
        ("8.0;12.0+PTX", (12, 1), True),
        ("8.0;12.0+PTX", (13, 0), True),
        ("8.0+PTX", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("unknown", (9, 0), False),
    ],
)
def test_which_gpus_a_library_serves(arches: str, capability: tuple[int, int], fits: bool) -> None:
    assert loading.holds(arches, capability) is fits


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch that claims a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")
    return monkeypatch


def missing(monkeypatch: pytest.MonkeyPatch, file: Path | None) -> str:
    monkeypatch.setattr(loading, "module_file", lambda name: file)
    reason = loading.load_cuda()
    assert isinstance(reason, Mendable)
    assert "QKERNELS_BUILD=cuda " in reason
    assert "pip install --no-build-isolation" in reason
    return reason


def test_not_built(gpu: pytest.MonkeyPatch) -> None:
    assert missing(gpu, None).startswith("the CUDA kernels are not built; build them with: pip install")


def test_built_for_another_gpu(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "_cuda.so"
    file.write_bytes(b"\x7fELF qkernels-cuda-arches:8.0;12.0\0")
    gpu.setattr(loading, "fault_of", lambda path: None)
    reason = missing(gpu, file)
    assert reason.startswith("the CUDA kernels are built for 8.0;12.0 and not for 9.0, which NVIDIA Test is; build")
    assert 'TORCH_CUDA_ARCH_LIST="9.0"' in reason


def test_built_by_a_newer_cuda_than_the_driver_is_for(gpu: pytest.MonkeyPatch, tmp_path: Path, compiled: Path) -> None:
    file = tmp_path / "_cuda.so"
    gpu.setattr(loading, "fault_of", lambda path: None)
    gpu.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    file.write_bytes(b"\x7fELF qkernels-cuda-arches:9.0\0qkernels-cuda-version:13000\0")
    reason = missing(gpu, file)
    assert reason.startswith("the CUDA kernels are built by CUDA 13.0, and the NVIDIA driver is for CUDA 12.8; update")
    assert b"qkernels-cuda-version:13" in compiled.read_bytes()
    file.write_bytes(b"\x7fELF qkernels-cuda-arches:8.0\0qkernels-cuda-version:12080\0")
    assert missing(gpu, file).startswith("the CUDA kernels are built for 8.0")


def test_truncated(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "_cuda.so"
    file.write_bytes(b"\x7fELF")
    assert "cannot be loaded (_cuda.so is not a shared library); rebuild" in missing(gpu, file)


def test_without_cuda_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert loading.load_cuda() == f"torch {torch.__version__} is built without CUDA"


def test_cpu_tensors_and_use_kernel() -> None:
    reasons = dict(qk.which("fake_quantize_forward", torch.ones(3), torch.ones(1), None, -8, 7))
    assert reasons["cuda"] == "takes CUDA tensors, got one on cpu"
    if not torch.cuda.is_available():
        with (
            pytest.raises(RuntimeError, match=r"use_kernel: cannot run cuda: torch .* without CUDA"),
            qk.use_kernel("cuda"),
        ):
            pass


def test_use_kernel_without_a_gpu_fails_on_entry(gpu: pytest.MonkeyPatch) -> None:
    """Where torch has CUDA, and the library is there and loads."""
    gpu.setattr(library, "cuda_state", [None])
    gpu.setattr(torch.cuda, "is_available", lambda: False)

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it.")

    gpu.setattr(torch.cuda, "init", too_old)
    reason = (
        r"there is no GPU that torch can use \(The NVIDIA driver on your system is too old \(found version 11040\).\)"
    )
    for name in ("cuda", "triton"):
        gpu.delenv("TRITON_INTERPRET", raising=False)
        library.triton_missing.cache_clear()
        with pytest.raises(RuntimeError, match=f"use_kernel: cannot run {name}: {reason}"), qk.use_kernel(name):
            raise AssertionError("entered")
        assert registry.forced == []
    library.triton_missing.cache_clear()


@pytest.mark.parametrize("wanted", ["gpu", "CUDA"])
def test_build_that_does_not_exist(wanted: str) -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a source checkout")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "QKERNELS_BUILD": wanted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"QKERNELS_BUILD: got '{wanted}'; accepted: auto, cpu, cuda, none" in done.stderr


if __name__ == "__main__":
    print(f"the CUDA library is compiled for {', '.join(COMPILED)}, {described()}", flush=True)
    compile_library()
