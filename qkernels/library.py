"""Defines ops, registers their kernels and forces one on demand; no other file uses torch.library for that.

This file defines an op in Python, with a fake and a reference. A compiled library then adds kernels at its dispatch
key, where torch's dispatcher finds them without Python. Every other call asks the registry.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from . import checks, loading, registry
from .host import Host
from .registry import Mendable
from .samples import Samples, Trial, trials

NAMESPACE = "qkernels"
# The device of the CUDA kernels and its dispatch key. Tests that run these kernels on an emulator change both.
gpu, GPU_KEY = "cuda", "CUDA"

_cuda_lock = threading.Lock()
cuda_state: list[str | None] = []  # empty until the first CUDA tensor, then the reason why the kernels are missing


def cuda_missing() -> str | None:
    """Why the CUDA kernels are missing (None: they are loaded). The first call loads them."""
    if not cuda_state:
        with _cuda_lock:
            if not cuda_state:
                reason = loading.load_cuda()
                if reason is None:
                    _note_missing("cuda", GPU_KEY, "the CUDA kernels", "QKERNELS_BUILD=cuda")
                cuda_state.append(reason)
                serve_triton()
    return cuda_state[0]


def serve_triton() -> None:
    """Registers Triton's functions with torch's dispatcher for the ops that csrc/cuda does not hold."""
    if triton_missing(None) is not None:
        return
    for op in {kernel.op for kernel in registry.kernels() if kernel.name == "triton"}:
        name = f"{NAMESPACE}::{op}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, GPU_KEY):
            torch.library.impl(name, GPU_KEY, remembered_else_selected(op))


def remembered_else_selected(op: str) -> Callable[..., Any]:
    """Replays remembered calls of Triton's function; for any other call it selects among all kernels.

    It remembers only calls that it has selected itself, so that a forced kernel is not chosen later when it is not
    forced.
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


# load() sets these after every op is defined.
host: Host | None = None
cpu_missing: str | None = Mendable("the C++ kernels are not loaded yet")
_op_missing: dict[tuple[str, str], str] = {}  # (dispatch key, op) -> why the loaded library has no kernel for the op


def load() -> None:
    """Loads the compiled CPU kernels; called once, after every op is defined.

    Raises ValueError if QKERNELS_CPU_ISA names no path that this CPU can take.
    """
    global host, cpu_missing
    host, cpu_missing = loading.load_cpu()
    if host is None:
        return
    if wanted := os.environ.get("QKERNELS_CPU_ISA"):
        try:
            host.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"QKERNELS_CPU_ISA: {error}") from None
    _note_missing("cpu_", "CPU", "the C++ kernels")


def _note_missing(kind: str, key: str, kernels: str, environment: str = "") -> None:
    """Notes each op for which the loaded library should hold a kernel of this kind but does not."""
    for op in {kernel.op for kernel in registry.kernels() if kernel.name.startswith(kind)}:
        name = cuda_op(op) if kind == "cuda" else op
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
            command = loading.build_command(environment)
            _op_missing[key, op] = Mendable(f"{kernels} hold no {op}; rebuild them with: {command}")


def define(
    op: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    samples: Samples,
    sums: tuple[int, ...] = (),
    given: Callable[..., Any] | None = None,
    on_gpu: Callable[..., tuple[Any, ...]] | None = None,
    cpu: Sequence[str] = (),
    cuda: bool | Callable[..., str | None] = False,
    triton: bool = False,
    triton_first: bool = False,
) -> Any:
    """Defines ``qkernels::op`` and returns it.

    Args:
        reference: the kernel for every device that has no better one.
        fake: returns the outputs' metadata for tracing, strides included.
        samples, sums, given, on_gpu: how the self-check tries the op; see ``samples.Trial``.
        cpu: the paths that csrc/cpu holds for the op, best first.
        cuda: whether csrc/cuda holds the op; or a function that says why csrc/cuda does not take a call. csrc/cuda
            then holds the op as ``<op>_cuda``, because torch would call a kernel at the op's own dispatch key without
            asking that function.
        triton: whether qkernels/triton holds a function of the op's name (with an underscore for a dot), in the
            module that has the name of the reference's module.
        triton_first: whether Triton's kernel is preferred to the CUDA kernel if both take a call.
    """
    name = f"{NAMESPACE}::{op}"
    torch.library.define(name, schema)
    torch.library.register_fake(name, fake)
    for isa in cpu:
        registry.register(op, f"cpu_{isa}", _pinned(op, isa), _cpu_unsupported(op, isa))
    if callable(cuda):
        _partial.add(op)
        torch.library.define(f"{NAMESPACE}::{cuda_op(op)}", schema)
    for kernel in ("triton", "cuda") if triton_first else ("cuda", "triton"):
        if kernel == "cuda" and cuda:
            registry.register(op, "cuda", dispatched(cuda_op(op)), _cuda_unsupported(op, cuda))
        if kernel == "triton" and triton:
            registry.register(op, "triton", *_triton(op, reference.__module__.rpartition(".")[2]))
    registry.register(op, registry.REFERENCE, reference, lambda *args: None)
    trials[op] = Trial(samples, sums, given, on_gpu, dispatched(op)._schema.is_mutable)
    torch.library.impl(name, "CompositeExplicitAutograd", selected(op))
    torch.library.impl(name, "AutogradNestedTensor", _refused(op))  # torch calls no composite kernel at this key
    return dispatched(op)


def dispatched(op: str) -> Any:
    packet, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.qkernels, packet), overload or "default")


def selected(op: str) -> Callable[..., Any]:
    refuse = _refused(op)

    def call(*args: Any) -> Any:
        # Sparse, mkldnn and quantized tensors arrive here too; a CPU kernel's op would dispatch them back to here.
        for t in registry.flat(args):
            if isinstance(t, torch.Tensor) and (t.layout is not torch.strided or t.is_quantized):
                refuse(*args)
        return registry.run(op, *args)

    return call


def _refused(op: str) -> Callable[..., None]:
    """A function that raises an error for the first argument that is not dense."""

    def call(*args: Any) -> None:
        for argument, value in zip(dispatched(op)._schema.arguments, args, strict=False):
            for at, t in enumerate(value if isinstance(value, list | tuple) else [value]):
                if isinstance(t, torch.Tensor):
                    checks.dense(f"{argument.name}[{at}]" if value is not t else argument.name, t)

    return call


def _pinned(op: str, isa: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _isa(isa):
            return dispatched(op)(*args)

    return call


def _cpu_unsupported(op: str, isa: str) -> Callable[..., str | None]:
    def unsupported(*args: Any) -> str | None:
        if reason := _elsewhere("cpu", args):
            return reason
        if reason := isa_missing(isa) or _op_missing.get(("CPU", op)):
            return reason
        assert host is not None
        names = host.isa_names()
        if names.index(isa) > names.index(host.active_isa()):
            return f"the CPU path is capped at {host.active_isa()}"
        return None

    return unsupported


def _elsewhere(kind: str, args: Sequence[Any]) -> str | None:
    """The reason if a tensor is on another kind of device, or None. Every choice calls this for every kernel."""
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


def isa_missing(isa: str) -> str | None:
    """Why no compiled kernel can take the path ``isa`` on this machine, or None if they can."""
    if host is None:
        return cpu_missing
    names = host.isa_names()
    return f"this CPU has no {isa}" if names.index(isa) > names.index(host.supported_isa()) else None


_partial: set[str] = set()  # ops for which csrc/cuda takes only some calls


def cuda_op(op: str) -> str:
    """The name of the op whose dispatch key holds csrc/cuda's kernel for ``op``."""
    return f"{op}_cuda" if op in _partial else op


def _cuda_unsupported(op: str, unsuited: bool | Callable[..., str | None]) -> Callable[..., str | None]:
    def unsupported(*args: Any) -> str | None:
        if reason := _elsewhere(gpu, args):
            return reason
        missing = cuda_unusable() or _op_missing.get((GPU_KEY, op))
        return unsuited(*args) if missing is None and args and callable(unsuited) else missing

    return unsupported


def cuda_unusable() -> str | None:
    """Why the CUDA kernels cannot run on this machine, or None if they can."""
    if gpu == "cuda" and torch.version.cuda is not None and not torch.cuda.is_available():
        return _no_gpu()
    return cuda_missing()


def _no_gpu() -> str:
    """Why torch can use no GPU, in torch's words if it gives any: often the driver is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"there is no GPU that torch can use ({str(error).splitlines()[0]})"
    return "there is no GPU that torch can use"


_triton_functions: dict[str, Callable[[], Any]] = {}  # op -> a getter that imports Triton at its first call


def _triton(op: str, stem: str) -> tuple[Callable[..., Any], Callable[..., str | None]]:
    """The function of qkernels.triton.<stem> for ``op``, imported at its first call, and its ``unsupported``."""

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
        reason = triton_missing(device)
        if reason is not None or device is None:
            return reason
        refuse = getattr(module(), "unsupported", None)
        return None if refuse is None else refuse(op, *args)

    return lambda *args: remembered()(*args), unsupported


@functools.cache
def triton_missing(device: torch.device | None) -> str | None:
    """Why Triton kernels cannot run on a device (None: on this machine), or None if they can."""
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
_overridden: set[str] = set()  # the dispatch keys that _override sends through the registry


def route() -> None:
    """Sends calls through the registry while a kernel is forced, and to torch's dispatcher again afterwards.

    A forced CUDA kernel keeps its own key, because torch's dispatcher calls it there anyway.
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
                    _override.impl(op, selected(op), key, allow_override=True)


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Forces the kernel called ``name`` for every op that is called inside, in every thread; may be nested.

    Raises RuntimeError if the kernel cannot run: on entry if the machine cannot run it at all, at the call if it cannot
    take that call. A ``cpu_<isa>`` name caps the CPU path: an op without that path takes its best lower one
    (``qk.kernels(op)`` lists them).
    """
    names = {kernel.name for kernel in registry.kernels()}
    if name not in names:
        raise ValueError(f"name: no kernel is named {name!r}; the kernels are {', '.join(sorted(names))}")
    # Compiled CPU kernels are in the dispatcher already; only their path has to be chosen.
    compiled = name.startswith("cpu_")
    if reason := _unusable(name):
        raise RuntimeError(f"use_kernel: cannot run {name}: {reason}")
    with _isa(name.removeprefix("cpu_")) if compiled else contextlib.nullcontext():
        registry.forced.append(None if compiled else name)
        try:
            route()
            yield
        finally:
            registry.forced.pop()
            route()


def _unusable(name: str) -> str | None:
    """Why this machine can run no kernel called ``name``, or None if it can."""
    if name.startswith("cpu_"):
        return isa_missing(name.removeprefix("cpu_"))
    if name == "cuda":
        return cuda_unusable()
    return triton_missing(None) if name == "triton" else None
