"""The one place that knows torch.library and the compiled libraries: defines ops, loads kernels, forces one.

An op is defined here in Python, with a fake and a reference; a compiled library then adds kernels at its dispatch
key, where torch's dispatcher finds them without passing through Python. Everything else asks the registry.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import registry
from .registry import Mendable

NAMESPACE = "qkernels"
TORCH_MINIMUM = (2, 10)  # first torch with the stable ABI that csrc is written against


def _version_of_torch() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build_command() -> str:
    """The one command that compiles the kernels for the installed package."""
    source = NAMESPACE
    try:
        origin = importlib.metadata.distribution(NAMESPACE).read_text("direct_url.json")
        if origin:
            source = json.loads(origin)["url"].removeprefix("file://")
    except importlib.metadata.PackageNotFoundError:
        source = str(Path(__file__).parent.parent)
    return f"pip install --no-build-isolation --no-deps --force-reinstall {source}"


def _load_host() -> ModuleType | None:
    try:
        from . import _host
    except ImportError:
        return None
    return _host


def _load_cpu() -> str | None:
    """Loads the compiled CPU kernels; returns why they are not there, or None."""
    found = sorted(Path(__file__).parent.glob("_cpu.*so"))
    if not found:
        return Mendable(f"the C++ kernels are not built; build them with: {build_command()}")
    if _version_of_torch() < TORCH_MINIMUM:
        return Mendable(
            f"torch {torch.__version__} is too old for the C++ kernels, which need torch >= "
            f"{'.'.join(map(str, TORCH_MINIMUM))}; upgrade with: pip install -U torch"
        )
    try:
        torch.ops.load_library(str(found[0]))
        library = ctypes.CDLL(str(found[0]))
        if host is not None:
            library.qkernels_bind_isa(ctypes.c_void_p(host.isa_state()))
    except (OSError, AttributeError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        return Mendable(f"the C++ kernels are broken or stale ({first_line}); rebuild them with: {build_command()}")
    return None


host = _load_host()
if host is not None and os.environ.get("QKERNELS_CPU_ISA"):
    host.set_isa(os.environ["QKERNELS_CPU_ISA"])
cpu_missing: str | None = Mendable("the C++ kernels are not loaded yet")


def load() -> None:
    """Loads the compiled libraries; called once, after every op is defined."""
    global cpu_missing
    cpu_missing = _load_cpu()


def define(op: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines ``qkernels::op`` and returns it.

    ``reference`` becomes the kernel of every device that has none better; ``fake`` gives the outputs' metadata,
    strides included, for tracing.
    """
    name = f"{NAMESPACE}::{op}"
    torch.library.define(name, schema)
    torch.library.register_fake(name, fake)
    registry.register(op, registry.REFERENCE, reference, lambda *args: None)
    torch.library.impl(name, "CompositeExplicitAutograd", _selected(op))
    packet, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.qkernels, packet), overload or "default")


def _selected(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return registry.run(op, *args)

    return call


def cpu_kernels(op: str, *isas: str) -> None:
    """Registers the compiled CPU kernels of ``op``, one for each path that csrc holds for it, best first."""
    for isa in isas:
        registry.register(op, f"cpu_{isa}", _pinned(op, isa), _cpu_unsupported(isa))


def _pinned(op: str, isa: str) -> Callable[..., Any]:
    packet, _, overload = op.partition(".")

    def call(*args: Any) -> Any:
        with _isa(isa):
            return getattr(getattr(torch.ops.qkernels, packet), overload or "default")(*args)

    return call


def _cpu_unsupported(isa: str) -> Callable[..., str | None]:
    def unsupported(*args: Any) -> str | None:
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.device.type != "cpu":
                return f"takes CPU tensors, got one on {arg.device}"
        if cpu_missing is not None:
            return cpu_missing
        if host is None:
            return None
        names = host.isa_names()
        if names.index(isa) > names.index(host.supported_isa()):
            return f"this CPU has no {isa}"
        if names.index(isa) > names.index(host.active_isa()):
            return f"the CPU path is capped at {host.active_isa()}"
        return None

    return unsupported


@contextlib.contextmanager
def _isa(name: str) -> Iterator[None]:
    if cpu_missing is not None:
        raise RuntimeError(f"use_kernel: cannot run cpu_{name}: {cpu_missing}")
    if host is None:
        raise RuntimeError(f"use_kernel: cannot force a CPU path without qkernels._host; build it: {build_command()}")
    before = host.active_isa()
    host.set_isa(name)
    try:
        yield
    finally:
        host.set_isa(before)


_override: torch.library.Library | None = None


def _route() -> None:
    """Sends calls through the registry while a kernel that is not in the dispatcher is forced, and back after."""
    global _override
    wanted = bool(registry.forced) and registry.forced[-1] is not None
    if wanted and _override is None:
        _override = torch.library.Library(NAMESPACE, "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
            for op in {kernel.op for kernel in registry.kernels()}:
                for key in ("CPU", "CUDA"):
                    _override.impl(op, _selected(op), key, allow_override=True)
    elif not wanted and _override is not None:
        _override._destroy()
        _override = None


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
    with _isa(name.removeprefix("cpu_")) if compiled else contextlib.nullcontext():
        registry.forced.append(None if compiled else name)
        _route()
        try:
            yield
        finally:
            registry.forced.pop()
            _route()
