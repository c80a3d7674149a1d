"""The one place that knows torch.library and the compiled libraries: defines ops, loads kernels, forces one.

An op is defined here in Python, with a fake and a reference; a compiled library then adds kernels at its dispatch
key, where torch's dispatcher finds them without passing through Python. Everything else asks the registry.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import torch

from . import __version__, registry
from .host import Host
from .reference.fake_quantize import check_dense
from .registry import Mendable

NAMESPACE = "qkernels"
TORCH_MINIMUM = (2, 10)  # first torch with the stable ABI that csrc is written against


def _version_of_torch() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build_command(environment: str = "") -> str:
    """The one command that compiles the kernels for the package as it is installed here, or fails and says why."""
    # Without --no-cache-dir pip would serve a pure-Python wheel that it built and kept earlier.
    return (
        'pip install "setuptools>=77" && '
        f"{environment}{' ' * bool(environment)}QKERNELS_STRICT_BUILD=1 pip install --no-build-isolation --no-deps "
        f"--force-reinstall --no-cache-dir {_source()}"
    )


def _source() -> str:
    """Where pip finds the sources of this package: the checkout, what it was installed from, else the package index."""
    checkout = Path(__file__).parent.parent
    if (checkout / "setup.py").exists():
        return f"-e {shlex.quote(str(checkout))}"
    origin: dict[str, Any] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        origin = json.loads(importlib.metadata.distribution(NAMESPACE).read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    if url.startswith("file://"):
        path = Path(unquote(url.removeprefix("file://")))
        # A wheel holds no sources; where it was built they lie beside it, or above its dist/.
        sources = [path]
        if path.suffix == ".whl":
            sources = [path.with_name(f"{NAMESPACE}-{__version__}.tar.gz"), path.parent.parent]
        for source in sources:
            if source.is_file() or (source / "setup.py").exists():
                return shlex.quote(str(source))
    elif url and not url.endswith(".whl"):
        return shlex.quote(url)
    return f"--no-binary {NAMESPACE} {NAMESPACE}=={__version__}"


def module_file(name: str) -> Path | None:
    """A compiled library of the package; they are no Python modules and so carry no tag of a Python version."""
    path = Path(__file__).with_name(f"{name}.so")
    return path if path.exists() else None


def _fault_of(module: Path) -> str | None:
    """Why a compiled module must not be loaded (cut short, or of other sources than this package), or None."""
    data = module.read_bytes()
    if len(data) < 64 or data[:4] != b"\x7fELF":
        return f"{module.name} is not a shared library"
    # The section table ends an ELF file. Loading one that was cut short can kill the process.
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
    """As setup.py's: what a library must have been built from to belong to this checkout."""
    files = sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _unbuildable() -> str | None:
    """Why no compiled library can serve here whatever is installed of qkernels, or None."""
    if sys.platform in ("win32", "cygwin", "darwin"):
        return f"the compiled kernels are for Linux, this is {platform.system()}"
    if _version_of_torch() < TORCH_MINIMUM:
        return Mendable(
            f"torch {torch.__version__} is too old for the C++ kernels, which need torch >= "
            f"{'.'.join(map(str, TORCH_MINIMUM))}; upgrade with: pip install -U torch"
        )
    return None


def _load() -> tuple[Host | None, str | None]:
    """Loads the CPU kernels: what they say of the machine, and why they are not there (None: they are)."""
    if reason := _unbuildable():
        return None, reason
    file = module_file("_cpu")
    if file is None:
        return None, Mendable(f"the C++ kernels are not built; build them with: {build_command()}")
    try:
        if fault := _fault_of(file):
            raise OSError(fault)
        torch.ops.load_library(str(file))
        return Host(file), None
    except (OSError, AttributeError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        return None, Mendable(f"the C++ kernels cannot be loaded ({first_line}); rebuild them with: {build_command()}")


# The device of the CUDA kernels and its dispatch key. Tests run these kernels on an emulator, and say so here.
gpu, GPU_KEY = "cuda", "CUDA"


def _load_cuda() -> str | None:
    """Loads the CUDA kernels; why they are not there (None: they are)."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if reason := _unbuildable():
        return reason
    file = module_file("_cuda")
    if file is None:
        return Mendable(f"the CUDA kernels are not built; build them with: {build_command('QKERNELS_BUILD=cuda')}")
    try:
        if fault := _fault_of(file):
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
    for op in {kernel.op for kernel in registry.kernels() if kernel.name == "cuda"}:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{cuda_op(op)}", GPU_KEY):
            command = build_command("QKERNELS_BUILD=cuda")
            _op_missing_cuda[op] = Mendable(f"the CUDA kernels hold no {op}; rebuild them with: {command}")
    return None


def _driver_too_old(cuda_library: Path) -> str | None:
    """Why the machine's driver runs no code of the library's CUDA, or None: each serves its own major version."""
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
        if arch[2] == "a":  # code for one architecture and no other
            fits = built == capability
        else:
            fits = built[0] == capability[0] and built <= capability
        if fits or (arch[3] and not arch[2] and built <= capability):
            return True
    return False


_cuda_lock = threading.Lock()
_cuda_state: list[str | None] = []  # empty until the first CUDA tensor, then why the kernels are missing


def cuda_missing() -> str | None:
    """Why the CUDA kernels are not there (None: they are). Loads them at the first call."""
    if not _cuda_state:
        with _cuda_lock:
            if not _cuda_state:
                _cuda_state.append(_load_cuda())
                _serve_triton()
    return _cuda_state[0]


def _serve_triton() -> None:
    """Puts Triton's functions where torch's dispatcher finds them, for the ops that csrc/cuda leaves to them."""
    if _triton_missing(None) is not None:
        return
    for op in {kernel.op for kernel in registry.kernels() if kernel.name == "triton"}:
        name = f"{NAMESPACE}::{op}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, GPU_KEY):
            torch.library.impl(name, GPU_KEY, _remembered_else_selected(op))


def _remembered_else_selected(op: str) -> Callable[..., Any]:
    """Triton's function for calls that chose it and are remembered; any other is a choice between all kernels.

    It remembers only what was chosen here, so that a kernel that was forced for a while is not the choice ever after.
    """

    @functools.cache
    def function() -> Any:
        from .triton.common.replay import Remembered

        return Remembered(_triton_functions[op]())

    def select(*args: Any) -> Any:
        kernel = registry.select(op, *args)
        return function()(*args) if kernel.name == "triton" else kernel.fn(*args)

    def call(*args: Any) -> Any:
        if registry.forced and registry.forced[-1] is not None:
            return registry.run(op, *args)
        return function().replayed(args, select)

    return call


# Ops are defined before their kernels are loaded: see load().
host: Host | None = None
cpu_missing: str | None = Mendable("the C++ kernels are not loaded yet")
_op_missing: dict[str, str] = {}
_op_missing_cuda: dict[str, str] = {}


def load() -> None:
    """Loads the compiled libraries; called once, after every op is defined.

    Raises ValueError where QKERNELS_CPU_ISA names no path that this CPU can take.
    """
    global host, cpu_missing
    host, cpu_missing = _load()
    if host is None:
        return
    if wanted := os.environ.get("QKERNELS_CPU_ISA"):
        try:
            host.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"QKERNELS_CPU_ISA: {error}") from None
    for op in {kernel.op for kernel in registry.kernels() if kernel.name.startswith("cpu_")}:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"):
            _op_missing[op] = Mendable(f"the C++ kernels hold no {op}; rebuild them with: {build_command()}")


def define(
    op: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cpu: Sequence[str] = (),
    cuda: bool | Callable[..., str | None] = False,
    triton: bool = False,
) -> Any:
    """Defines ``qkernels::op`` and returns it.

    ``reference`` becomes the kernel of every device that has none better; ``fake`` gives the outputs' metadata,
    strides included, for tracing; ``cpu`` names the paths that csrc/cpu holds for it, best first; ``cuda`` says that
    csrc/cuda holds it, or is a function that says why it leaves a call to others: csrc/cuda then holds it as
    ``<op>_cuda``, as what lies at the op's own dispatch key is never asked; ``triton`` says that qkernels/triton has a
    function of the op's name (a dot is an underscore there) in the module of the reference's name.
    """
    name = f"{NAMESPACE}::{op}"
    torch.library.define(name, schema)
    torch.library.register_fake(name, fake)
    for isa in cpu:
        registry.register(op, f"cpu_{isa}", _pinned(op, isa), _cpu_unsupported(op, isa))
    if cuda:
        if callable(cuda):
            _partial.add(op)
            torch.library.define(f"{NAMESPACE}::{cuda_op(op)}", schema)
        registry.register(op, "cuda", _dispatched(cuda_op(op)), _cuda_unsupported(op, cuda))
    if triton:
        registry.register(op, "triton", *_triton(op, reference.__module__.rpartition(".")[2]))
    registry.register(op, registry.REFERENCE, reference, lambda *args: None)
    torch.library.impl(name, "CompositeExplicitAutograd", _selected(op))
    torch.library.impl(name, "AutogradNestedTensor", _refused(op))  # which no composite kernel serves
    return _dispatched(op)


def _dispatched(op: str) -> Any:
    packet, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.qkernels, packet), overload or "default")


def _selected(op: str) -> Callable[..., Any]:
    refuse = _refused(op)

    def call(*args: Any) -> Any:
        # Sparse, mkldnn and quantized tensors arrive here too, where a CPU kernel would send them back.
        for t in registry.flat(args):
            if isinstance(t, torch.Tensor) and (t.layout is not torch.strided or t.is_quantized):
                refuse(*args)
        return registry.run(op, *args)

    return call


def _refused(op: str) -> Callable[..., None]:
    """Names the first argument that is not dense."""

    def call(*args: Any) -> None:
        for argument, value in zip(_dispatched(op)._schema.arguments, args, strict=False):
            for at, t in enumerate(value if isinstance(value, list | tuple) else [value]):
                if isinstance(t, torch.Tensor):
                    check_dense(f"{argument.name}[{at}]" if value is not t else argument.name, t)

    return call


def _pinned(op: str, isa: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _isa(isa):
            return _dispatched(op)(*args)

    return call


def _cpu_unsupported(op: str, isa: str) -> Callable[..., str | None]:
    def unsupported(*args: Any) -> str | None:
        if reason := _elsewhere("cpu", args):
            return reason
        if reason := _isa_missing(isa) or _op_missing.get(op):
            return reason
        assert host is not None
        names = host.isa_names()
        if names.index(isa) > names.index(host.active_isa()):
            return f"the CPU path is capped at {host.active_isa()}"
        return None

    return unsupported


def _elsewhere(kind: str, args: Sequence[Any]) -> str | None:
    """That a tensor is on another kind of device, or None: asked of every kernel at every choice."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.device.type != kind:
                return _takes(kind, arg.device)
        elif isinstance(arg, list | tuple) and (reason := _elsewhere(kind, arg)):
            return reason
    return None


@functools.cache
def _takes(kind: str, device: torch.device) -> str:
    return f"takes {kind.upper()} tensors, got one on {device}"


def _isa_missing(isa: str) -> str | None:
    """Why no compiled kernel can take the path ``isa`` on this machine, or None where they can."""
    if host is None:
        return cpu_missing
    names = host.isa_names()
    return f"this CPU has no {isa}" if names.index(isa) > names.index(host.supported_isa()) else None


_partial: set[str] = set()  # ops of which csrc/cuda takes only some calls


def cuda_op(op: str) -> str:
    """The op at whose dispatch key csrc/cuda's kernel for ``op`` is."""
    return f"{op}_cuda" if op in _partial else op


def _cuda_unsupported(op: str, unsuited: bool | Callable[..., str | None]) -> Callable[..., str | None]:
    def unsupported(*args: Any) -> str | None:
        if reason := _elsewhere(gpu, args):
            return reason
        missing = _cuda_unusable() or _op_missing_cuda.get(op)
        return unsuited(*args) if missing is None and args and callable(unsuited) else missing

    return unsupported


def _cuda_unusable() -> str | None:
    """Why the CUDA kernels cannot run on this machine, or None where they can."""
    if gpu == "cuda" and torch.version.cuda is not None and not torch.cuda.is_available():
        return _no_gpu()
    return cuda_missing()


def _no_gpu() -> str:
    """Why torch can use no GPU, in its own words where it has some: a driver that is too old is the common case."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"there is no GPU that torch can use ({str(error).splitlines()[0]})"
    return "there is no GPU that torch can use"


_triton_functions: dict[str, Callable[[], Any]] = {}  # each imports Triton at its first call


def _triton(op: str, stem: str) -> tuple[Callable[..., Any], Callable[..., str | None]]:
    """The function of qkernels.triton.<stem> that computes ``op``, imported at its first call, and why it cannot."""

    @functools.cache
    def module() -> ModuleType:
        return importlib.import_module(f".triton.{stem}", __package__)

    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(module(), op.replace(".", "_"))

    @functools.cache
    def remembered() -> Any:
        from .triton.common.replay import Remembered

        return Remembered(function())

    _triton_functions[op] = function

    def unsupported(*args: Any) -> str | None:
        device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), None)
        reason = _triton_missing(device)
        if reason is not None or device is None:
            return reason
        refuse = getattr(module(), "unsupported", None)
        return None if refuse is None else refuse(op, *args)

    return lambda *args: remembered()(*args), unsupported


@functools.cache
def _triton_missing(device: torch.device | None) -> str | None:
    """Why Triton kernels cannot run on a device (None: on this machine), or None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if device is not None and device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"takes CUDA tensors, got one on {device}"
    if importlib.util.find_spec("triton") is None:
        return Mendable("Triton is not installed; install it with: pip install triton")
    if interpreted:
        return None
    if not torch.cuda.is_available():
        return _no_gpu()
    if torch.version.hip is not None:
        return "takes NVIDIA GPUs, this torch is built for AMD"
    major, minor = torch.cuda.get_device_capability(device)
    return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}" if major < 8 else None


@contextlib.contextmanager
def _isa(name: str) -> Iterator[None]:
    assert host is not None, cpu_missing
    before = host.active_isa()
    host.set_isa(name)
    try:
        yield
    finally:
        host.set_isa(before)


_override: torch.library.Library | None = None
_overridden: set[str] = set()  # the dispatch keys that it sends through the registry


def _route() -> None:
    """Sends calls through the registry while a kernel is forced, and back after.

    A forced CUDA kernel keeps its own key, where it is what torch's dispatcher calls.
    """
    global _override, _overridden
    name = registry.forced[-1] if registry.forced else None
    keys = set() if name is None else {"CPU", "CUDA"} - ({GPU_KEY} if name == "cuda" else set())
    if keys == _overridden:
        return
    if _override is not None:
        _override._destroy()
    _override, _overridden = None, keys
    if keys:
        _override = torch.library.Library(NAMESPACE, "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
            for op in {kernel.op for kernel in registry.kernels()}:
                for key in keys:
                    _override.impl(op, _selected(op), key, allow_override=True)


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Forces the kernel called ``name`` for every op called inside, in every thread; may be nested.

    Raises RuntimeError where the kernel cannot run: on entry if the machine cannot run it at all, at the call if it
    cannot take that call. A ``cpu_<isa>`` name caps the CPU path: an op without a path of that name takes its best
    one below (``qk.kernels(op)`` lists them).
    """
    names = {kernel.name for kernel in registry.kernels()}
    if name not in names:
        raise ValueError(f"name: no kernel is named {name!r}; the kernels are {', '.join(sorted(names))}")
    # Compiled CPU kernels sit in the dispatcher already; the path inside them is all there is to choose.
    compiled = name.startswith("cpu_")
    if reason := _unusable(name):
        raise RuntimeError(f"use_kernel: cannot run {name}: {reason}")
    with _isa(name.removeprefix("cpu_")) if compiled else contextlib.nullcontext():
        registry.forced.append(None if compiled else name)
        try:
            _route()
            yield
        finally:
            registry.forced.pop()
            _route()


def _unusable(name: str) -> str | None:
    """Why this machine can run no kernel called ``name``, or None where it can."""
    if name.startswith("cpu_"):
        return _isa_missing(name.removeprefix("cpu_"))
    if name == "cuda":
        return _cuda_unusable()
    return _triton_missing(None) if name == "triton" else None
