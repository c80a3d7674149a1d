"""Which of our kernels are timed: the one that a call takes by itself, then others that can take it, by their names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk
from qkernels import library, registry

KERNELS = ("cuda", "triton")


def forced(name: str) -> contextlib.AbstractContextManager[None]:
    return qk.use_kernel(name) if name in KERNELS else contextlib.nullcontext()


class Calls(TorchDispatchMode):
    """The arguments with which an op is called the first time."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.args = library.dispatched(op), None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.op and self.args is None:
            self.args = args
        return func(*args, **(kwargs or {}))


def able(
    op: str, call: Callable[..., Any], inputs: tuple[Any, ...], compiles: bool
) -> tuple[list[str], dict[str, str]]:
    """Our kernels to time for this call, the one that it takes by itself first; and why the others are left out.

    A Triton kernel that it does not take is timed only where ``compiles`` allows the seconds that it costs.
    """
    calls = Calls(op)
    with calls:
        call(*inputs)
    if calls.args is None:
        raise RuntimeError(f"the call never came to {op}, whose kernels it is to compare")
    own = next(name for name, reason in registry.which(op, *calls.args) if reason is None)
    if own not in KERNELS:
        return [], {kernel.name: str(kernel.unsupported(*calls.args)) for kernel in registry.kernels(op)[:-1]}
    names, left_out = [own], {}
    for kernel in registry.kernels(op):
        if kernel.name not in KERNELS or kernel.name == own:
            continue
        if reason := kernel.unsupported(*calls.args):
            left_out[kernel.name] = reason
        elif kernel.name == "triton" and not compiles:
            left_out[kernel.name] = f"a call takes {own}; timed with what has to be compiled"
        else:
            names.append(kernel.name)
    return names, left_out
