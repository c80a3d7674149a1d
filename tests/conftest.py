"""Shared by every test: seeds, threads put back, the kernels of an op as parameters, the sample of long tests."""

from __future__ import annotations

import importlib.util
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

if not torch.cuda.is_available():
    # Triton kernels then run in its interpreter, on CPU tensors. Triton looks at this once, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import sampling

import qkernels as qk

ROOT = Path(__file__).parent.parent
os.environ.setdefault(sampling.SEED, str(sampling.seed()))  # workers and subprocesses take the same sample


def kernels_of(op: str) -> list[str]:
    """Names of the kernels of ``op`` that can run on this machine, best first, the reference last.

    With the fixture below a test runs once for each of them, and fails if another path than the named one ran::

        @pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"), indirect=True)
        def test_values(kernel):
            y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)  # the kernel is forced already
            assert torch.equal(y, reference.fake_quantize_forward(x, scale, None, -8, 7))

    The path is that of the last compiled op that the test called. A test that must call other ops after it, or none,
    takes the name as a plain parameter (no ``indirect``) and enters ``qk.use_kernel(kernel)`` itself.
    """
    able = [name for name, reason in qk.which(op) if reason is None]
    return [name for name in able if name != "cuda" or qk.library.gpu == "cpu"]  # the tests' tensors are on the CPU


def assert_ran(kernel: str) -> None:
    """That the last compiled op ran on the path that ``kernel`` names, where paths are recorded."""
    host = qk.library.host
    if host is not None and kernel.startswith("cpu_"):
        assert host.last_isa() == kernel.removeprefix("cpu_")


def paths_of(op: str) -> list[str]:
    """The compiled CPU kernels among ``kernels_of(op)``."""
    return [name for name in kernels_of(op) if name.startswith("cpu_")]


def results_on(kernel: str, threads: int, calls: Sequence[Callable[[], Any]]) -> list[torch.Tensor]:
    """What the raw ops in ``calls`` return, one after the other, each checked to have run on ``kernel``."""
    torch.set_num_threads(threads)
    results: list[torch.Tensor] = []
    with qk.use_kernel(kernel):
        for call in calls:
            result = call()
            assert_ran(kernel)
            results += result if isinstance(result, tuple) else [result]
    return results


def lstm_runs_under_autocast(dtype: torch.dtype) -> bool:
    """Whether torch's own LSTM does: oneDNN has none in 16 bits for CPUs without AVX-512."""
    try:
        with torch.autocast("cpu", dtype):
            torch.nn.LSTM(2, 2)(torch.ones(1, 1, 2))
    except RuntimeError:
        return False
    return True


def on_backends(cases: Iterable[Any]) -> list[tuple[Any, str]]:
    """(case, backend of torch.compile): each by AOTAutograd, one of this run by inductor, which takes seconds."""
    every = list(cases)
    return [*((case, "aot_eager") for case in every), *((case, "inductor") for case in sampling.in_turn(every))]


def untouched(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory that takes no room before it is written to, however large. Not from malloc, which writes to it here."""
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    host = qk.library.host
    with qk.use_kernel(name):
        if host is not None:
            host.clear_last_isa()
        yield name
        if host is not None:
            ran = host.last_isa()
            expected = name.removeprefix("cpu_") if name.startswith("cpu_") else None
            assert ran == expected, f"kernel {name!r} was forced, but the compiled path that ran last is {ran!r}"


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    """Triton's interpreter patches triton.language anew at every call of a device function: here once a launch."""
    if "TRITON_INTERPRET" not in os.environ or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, active = interpreter._patch_lang, []

    def patch_once(fn: Any) -> Any:
        if active:
            return SimpleNamespace(restore=lambda: None)
        active.append(patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
        return SimpleNamespace(restore=lambda: active.pop().restore())

    interpreter._patch_lang = patch_once


@pytest.fixture
def override_ends() -> Iterator[None]:
    """That torch's ops are torch's before a test that overrides them, and again after it."""
    from overriding import rerouted

    assert not rerouted()
    yield
    assert not rerouted()


def run_python(code: str, *arguments: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter that imports qkernels from ``root``; for what is decided at import."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": path, **env},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# The longest files, longest first. They run first, so that no worker is left with one of them at the end.
LONG = (
    "test_pretend_gpu", "test_cuda_emulated", "test_triton_launch", "test_install", "test_triton_compile",
    "test_library", "test_bench_gemm", "test_fake_quantize", "test_codebook", "test_cuda_sass",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as nightly what is not in this run's sample of a test's cases. A case that is named always runs."""
    if any("[" in argument for argument in config.args):
        return
    tests: dict[str, list[Any]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for name, cases in tests.items():
        kept = sampling.cases_of([case.callspec.params for case in cases], name)
        for at in set(range(len(cases))) - kept:
            cases[at].add_marker(pytest.mark.nightly)


def pytest_report_header() -> str:
    library = qk.library
    path = library.host.active_isa() if library.host is not None else "unknown"
    kernels = library.cpu_missing or f"compiled CPU kernels, path {path}"
    return f"qkernels: {kernels}; {sampling.described()}"
