"""The kernels of every op, in order of preference, and the choice between them.

It knows neither torch nor any backend. A kernel is a name, a function, and a reason why it cannot take a call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

REFERENCE = "reference"


class Mendable(str):
    """A reason that the user can remove, as by building the extension: warned of once where it costs speed."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    ``unsupported(*args)`` returns why the kernel cannot take this call, or None where it can; called without
    arguments it speaks of the machine alone.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    unsupported: Callable[..., str | None]


_kernels: dict[str, list[Kernel]] = {}
forced: list[str | None] = []  # the innermost use_kernel; None: free choice
_said: set[str] = set()


def register(op: str, name: str, fn: Callable[..., Any], unsupported: Callable[..., str | None]) -> None:
    """Adds a kernel to ``op``. Call in order of preference; the reference stays last."""
    kernels = _kernels.setdefault(op, [])
    if any(kernel.name == name for kernel in kernels):
        raise ValueError(f"name: {op} has a kernel {name!r} already")
    at = len(kernels) - 1 if kernels and kernels[-1].name == REFERENCE else len(kernels)
    kernels.insert(at, Kernel(op, name, fn, unsupported))


def kernels(op: str | None = None) -> list[Kernel]:
    """The kernels of ``op`` in order of preference; of every op when None. ValueError: no op has this name."""
    if op is None:
        return [kernel for name in sorted(_kernels) for kernel in _kernels[name]]
    if op not in _kernels:
        raise ValueError(f"op: no op is named {op!r}; the ops are {', '.join(sorted(_kernels))}")
    return list(_kernels[op])


def which(op: str, *args: Any) -> list[tuple[str, str | None]]:
    """Every kernel of ``op`` ("int8_linear") with the reason why it would not run on these arguments (None: it can).

    The first with None runs. Without args the answer speaks of this machine alone. ValueError: no op has this name.
    """
    return [(kernel.name, kernel.unsupported(*args)) for kernel in kernels(op)]


def select(op: str, *args: Any) -> Kernel:
    """The kernel that takes this call: the forced one (see ``use_kernel``), else the first that can."""
    if forced and forced[-1] is not None:
        return _select_forced(op, forced[-1], args)
    for kernel in _kernels[op]:
        reason = kernel.unsupported(*args)
        if reason is None:
            return kernel
        if isinstance(reason, Mendable) and reason not in _said:
            _said.add(reason)
            warnings.warn(f"qkernels: {op} runs on a slower kernel: {reason}", stacklevel=3)
    raise RuntimeError(f"{op}: no kernel takes this call: {which(op, *args)}")


def flat(args: Any) -> Iterator[Any]:
    """Arguments or results one by one, those inside lists and tuples too."""
    for arg in args:
        if isinstance(arg, list | tuple):
            yield from flat(arg)
        else:
            yield arg


def run(op: str, *args: Any) -> Any:
    """Calls ``op`` on the kernel that ``select`` gives."""
    return select(op, *args).fn(*args)


def _select_forced(op: str, name: str, args: tuple[Any, ...]) -> Kernel:
    for kernel in _kernels[op]:
        if kernel.name == name:
            reason = kernel.unsupported(*args)
            if reason is not None:
                raise RuntimeError(f"{op}: kernel {name!r} was asked for by use_kernel but cannot run: {reason}")
            return kernel
    raise RuntimeError(f"{op}: has no kernel {name!r}; it has {', '.join(k.name for k in _kernels[op])}")
