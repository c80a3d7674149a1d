"""What is wrong with an installation is said, with the command that mends it, and the package works all the same."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python
from forked import run_forked
from sampling import in_turn

import qkernels as qk
from qkernels import __main__, info, library, loading, registry, selfcheck
from qkernels.registry import Kernel

# Prints what is missing, the warnings that two calls of two ops gave, and whether the values are right.
PROBE = """
import warnings, torch
import qkernels as qk
x = torch.tensor([-9.0, 0.26, 0.74, 9.0], requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = qk.fake_quantize(x, torch.tensor([0.5]), quant_min=-8, quant_max=7)
        qk.quantize(x.detach(), torch.tensor([0.5]), quant_min=-8, quant_max=7)
    y.sum().backward()
print("missing:", qk.library.cpu_missing)
print("warnings:", [str(w.message) for w in caught if "qkernels" in str(w.message)])
print("right:", y.tolist() == [-4.0, 0.5, 0.5, 3.5] and x.grad.tolist() == [0.0, 1.0, 1.0, 0.0])
"""
PIP = "QKERNELS_STRICT_BUILD=1 pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed package without its sources; returns the folder to import it from."""
    shutil.copytree(Path(qk.__file__).parent, tmp_path / "qkernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def cpu_library(root: Path) -> Path:
    return root / "qkernels" / "_cpu.so"


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    changed = change(data)
    assert changed != data
    path.write_bytes(changed)


def probe(root: Path, expected: str, before: str = "") -> str:
    """The reason given, after checking that it was said once, gives the command, and that the reference serves."""
    done = run_forked(before + PROBE, root=root)
    assert done.returncode == 0, done.stderr
    assert "right: True" in done.stdout
    reason = done.stdout.splitlines()[0].removeprefix("missing: ")
    assert expected in reason
    assert "pip install" in reason
    assert done.stdout.count("runs on a slower kernel") == 1, done.stdout
    return reason


def test_intact_copy_loads(copy: Path) -> None:
    done = run_forked(PROBE, root=copy)
    assert done.stdout == "missing: None\nwarnings: []\nright: True\n", done.stdout + done.stderr


def test_the_library_is_bound_to_no_version_of_python(copy: Path) -> None:
    another = "import importlib.machinery as m; m.EXTENSION_SUFFIXES[:] = ['.cpython-399-x86_64-linux-gnu.so']\n"
    done = run_forked(another + PROBE, root=copy)
    assert done.stdout == "missing: None\nwarnings: []\nright: True\n", done.stdout + done.stderr


def test_not_built(copy: Path) -> None:
    cpu_library(copy).unlink()
    assert PIP in probe(copy, "the C++ kernels are not built; build them with: ")


@pytest.mark.parametrize("kept", [0, 10, 1000, 0.5, 0.98])
def test_truncated(copy: Path, kept: float) -> None:
    path = cpu_library(copy)
    rewrite(path, lambda data: data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    expected = "is not a shared library" if kept in (0, 10) else "is truncated: "
    assert path.name in probe(copy, expected)


def test_not_a_library(copy: Path) -> None:
    rewrite(cpu_library(copy), lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 9)
    probe(copy, "is not a shared library")


def test_built_for_another_version(copy: Path) -> None:
    old = f"qkernels-build-id:{qk.__version__}+".encode()
    new = b"qkernels-build-id:" + b"9" * len(qk.__version__) + b"+"
    rewrite(cpu_library(copy), lambda data: data.replace(old, new))
    probe(copy, f"is stale: built for qkernels {'9' * len(qk.__version__)}, this is {qk.__version__}")


def test_sources_changed_since_the_build(copy: Path) -> None:
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    assert run_forked(PROBE, root=copy).stdout.startswith("missing: None")
    source = copy / "csrc" / "cpu" / "common" / "isa.h"
    source.write_text(source.read_text() + "// changed\n")
    probe(copy, "is stale: csrc has changed since it was built")


def test_symbol_that_torch_lacks(copy: Path) -> None:
    rewrite(cpu_library(copy), lambda data: data.replace(b"aoti_torch_empty_strided\0", b"aoti_torch_empty_stridez\0"))
    probe(copy, "cannot be loaded (")


@pytest.mark.parametrize(("platform", "system"), [("win32", "Windows"), ("darwin", "Darwin")])
def test_a_system_for_which_nothing_compiles_is_named_without_advice(
    monkeypatch: pytest.MonkeyPatch, platform: str, system: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(loading.platform, "system", lambda: system)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for host, reason in (loading.load_cpu(), (None, loading.load_cuda())):
        assert host is None
        assert reason == f"the compiled kernels are for Linux, this is {system}"
        assert not isinstance(reason, registry.Mendable)


def test_torch_too_old(copy: Path) -> None:
    reason = probe(copy, "torch 2.9.1 is too old for the C++ kernels", "import torch; torch.__version__ = '2.9.1'\n")
    assert reason.endswith("upgrade with: pip install -U torch")


def test_op_that_the_library_lacks() -> None:
    done = run_forked("""
import torch, qkernels as qk
qk.library.define("missing_op", "(Tensor x) -> Tensor", lambda x: x + 1, torch.empty_like,
                  samples=None, cpu=("scalar",))
qk.library.load()
print(qk.which("missing_op")[0][1])
print(torch.ops.qkernels.missing_op(torch.zeros(1)).item(), dict(qk.which("fake_quantize_forward"))["cpu_scalar"])
""")
    assert done.stdout.startswith("the C++ kernels hold no missing_op; rebuild them with: "), done.stderr
    assert done.stdout.endswith("\n1.0 None\n")
    assert "missing_op runs on a slower kernel" in done.stderr


def test_cpu_isa_from_the_environment() -> None:
    code = """
import qkernels as qk
print(qk.library.host.active_isa(), *(name for name, reason in qk.which("int8_mm") if reason is None))
"""
    for isa in ("scalar", qk.library.host.supported_isa()):
        done = run_forked(code, QKERNELS_CPU_ISA=isa)
        assert done.stdout.startswith(f"{isa} cpu_{'avx2' if isa == 'avx512' else isa} "), done.stderr


@pytest.mark.parametrize("wanted", ["fast", "AVX2", "amx2", "avx512vnni2"])
def test_cpu_isa_that_does_not_exist(wanted: str) -> None:
    done = run_forked("import qkernels", QKERNELS_CPU_ISA=wanted)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(
        f"ValueError: QKERNELS_CPU_ISA: isa: got '{wanted}'; this CPU runs scalar"
    )


@pytest.mark.skipif(library.isa_missing("amx") is not None, reason="this CPU has no AMX, or Linux refuses it")
def test_no_tiles_where_linux_refuses_them() -> None:
    """As where a thread has a stack for signals that is too small for their state."""
    code = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0
import torch, qkernels as qk
a = torch.ones(40, 64, dtype=torch.int8)
print(qk.library.host.supported_isa(), qk.int8_mm(a, a.t()).unique().tolist(), qk.library.host.last_isa())
"""
    done = run_forked(code)
    assert done.stdout == "avx512vnni [64] avx512vnni\n", done.stderr


def test_import_is_light() -> None:
    """Counted in modules, as time is noisy."""
    code = """
import sys, torch
before = set(sys.modules)
import qkernels
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {"qkernels"}))
print(*[name for name in sys.modules if name.split(".")[:2] in (["torch", "_inductor"], ["torch", "ao"])])
"""
    modules, heavy = (run_python(code).stdout + "\n").split("\n")[:2]
    assert set(modules.split()) <= {"shlex", "json", "urllib", "email", "importlib", "ctypes"}
    assert set(heavy.split()) <= set(run_python("import sys, torch; print(*sys.modules)").stdout.split())


INDEX = f"--no-binary qkernels qkernels=={qk.__version__}"
ARCHIVE = f"qkernels-{qk.__version__}.tar.gz"


class Distribution:
    def __init__(self, direct_url: object) -> None:
        self.direct_url = direct_url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.direct_url is None else json.dumps(self.direct_url)


@pytest.mark.parametrize(
    ("direct_url", "source"),
    [
        ({"url": "file://TMP/my%20code/qkernels", "dir_info": {}}, "'TMP/my code/qkernels'"),
        ({"url": "file://TMP/qkernels.tar.gz", "archive_info": {}}, "TMP/qkernels.tar.gz"),
        (
            {"url": "https://example.org/qkernels.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "git+https://example.org/qkernels.git@abc",
        ),
        ({"url": "https://example.org/qkernels.tar.gz", "archive_info": {}}, "https://example.org/qkernels.tar.gz"),
        # A wheel holds nothing to compile: what lies where `python -m build` puts both, else the index.
        ({"url": "file://TMP/wheels/qkernels-1-py3-none-any.whl", "archive_info": {}}, INDEX),
        ({"url": "https://example.org/qkernels-1-py3-none-any.whl", "archive_info": {}}, INDEX),
        ({"url": "file://TMP/sdist/qkernels-1-py3-none-any.whl", "archive_info": {}}, f"TMP/sdist/{ARCHIVE}"),
        (
            {"url": "file://TMP/my%20code/qkernels/dist/qkernels-1-any.whl", "archive_info": {}},
            "'TMP/my code/qkernels'",
        ),
        ({"url": "file://TMP/gone/qkernels", "dir_info": {}}, INDEX),
        (None, INDEX),
    ],
)
def test_build_command_installs_from_where_the_package_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direct_url: dict[str, Any] | None, source: str
) -> None:
    for file in ("my code/qkernels/setup.py", "qkernels.tar.gz", f"sdist/{ARCHIVE}"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    if direct_url is not None:
        direct_url = {**direct_url, "url": direct_url["url"].replace("TMP", str(tmp_path))}
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "site-packages" / "qkernels" / "loading.py"))
    monkeypatch.setattr(loading.importlib.metadata, "distribution", lambda name: Distribution(direct_url))
    source = source.replace("TMP", str(tmp_path))
    assert loading.build_command() == f'pip install "setuptools>=77" && {PIP} {source}'
    assert loading.build_command("A=1") == f'pip install "setuptools>=77" && A=1 {PIP} {source}'


def test_build_command_of_a_checkout() -> None:
    assert loading.build_command().endswith(f"{PIP} -e {ROOT}")


def test_info_passes_and_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["info"]) == 0
    text = capsys.readouterr().out
    for part in (qk.__version__, torch.__version__, info.cpu_model(), "self-test: PASS", "triton"):
        assert part in text
    assert re.search(r"^compiled  CPU kernels by (gcc|clang) \d.* for torch >= 2\.10 \(with 2\.", text, re.MULTILINE)
    for op in {kernel.op for kernel in qk.kernels()}:
        runs = next(name for name, reason in qk.which(op) if reason is None)
        assert re.search(rf"^  {re.escape(op)} +{runs}\b", text, re.MULTILINE), op


def test_info_without_compiled_kernels_says_so_and_passes(copy: Path) -> None:
    cpu_library(copy).unlink()
    done = run_forked("import qkernels.__main__ as m, sys; sys.exit(m.main(['info']))", root=copy)
    assert done.returncode == 0, done.stderr
    assert "compiled  no: the C++ kernels are not built; build them with: " in done.stdout
    assert "self-test: PASS" in done.stdout


def test_info_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import qkernels.__main__ as m; sys.exit(m.main(['info']))"
    done = run_forked(code)
    assert done.returncode == 0, done.stderr
    assert "triton    not installed; its kernels need: pip install triton" in done.stdout


@pytest.mark.parametrize("command", ["info", "selfcheck"])
def test_a_wrong_kernel_fails_the_self_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    kernels = registry.kernels("fake_quantize_backward_mask")
    best = next(kernel for kernel in kernels if kernel.unsupported() is None)
    wrong = Kernel(best.op, best.name, lambda *args: best.fn(*args) + 1e-6, best.unsupported)
    monkeypatch.setattr(registry, "_kernels", {wrong.op: [wrong if k is best else k for k in kernels]})
    monkeypatch.setattr("qkernels.selfcheck.SHAPES", ((3, 40), (1,), (2, 8, 5, 3)))
    assert __main__.main([command]) == 1
    text = capsys.readouterr().out
    assert f"FAIL {wrong.op} {wrong.name}: output 0 differs from the reference's, on (torch.float32[3, 40]" in text
    assert "self-test: FAIL" in text


def test_selfcheck_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On three of its shapes."""
    monkeypatch.setattr("qkernels.selfcheck.SHAPES", in_turn(selfcheck.SHAPES, 3))
    assert __main__.main(["selfcheck"]) == 0
    assert "self-test: PASS" in capsys.readouterr().out


def test_commands_refuse_what_they_do_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["inform"], ["info", "--all"]):
        with pytest.raises(SystemExit) as stop:
            __main__.main(argv)
        assert stop.value.code == 2
    assert "info takes no arguments, got --all" in capsys.readouterr().err


def test_bench_outside_a_checkout(copy: Path) -> None:
    done = run_forked("import qkernels.__main__ as m, sys; sys.exit(m.main(['bench']))", root=copy)
    assert done.returncode == 2
    assert "run this from a source checkout" in done.stdout


@pytest.mark.skipif(library.cpu_missing is not None, reason="needs the C++ kernels")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs a kernel with huge pages")
def test_large_results_ask_for_huge_pages() -> None:
    """Fresh memory is the most of what a large result costs, and huge pages make it a third."""
    y = qk.fake_quantize(torch.ones(16 << 20), 0.5, quant_min=-8, quant_max=7)
    middle, flags = y.data_ptr() + 2 * y.numel(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    if not flags:
        pytest.skip("this kernel tells no VmFlags")
    assert "hg" in flags.split()
