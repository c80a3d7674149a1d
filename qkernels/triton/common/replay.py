"""Replay of calls: what a call does is remembered by the kind of its arguments, and done at once the next time.

Before an op starts its kernels it checks its arguments and chooses tiles, and Triton looks at every argument. All of
that follows from dtypes, shapes, strides, devices, alignment and plain numbers, which are the kind of a call. The
second call of a kind is watched: the tensors that it allocates and the kernels that it starts are written down. Later
calls of that kind allocate and start the same, which takes a fifth of the time. Two sorts of calls are never replayed:
those that do anything else with tensors (a copy, a sum), and those whose tensors share memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, local
from .numerics import INTERPRETED

MOST = 4096  # kinds of calls of an op that are remembered; when it is full, those seen once are forgotten, or else all
ALLOCATIONS = {"empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
HARMLESS = set(ALLOCATIONS)  # of what a watched call may do, beside views

_memories: list[dict[Any, Any]] = []
_forgotten = 0  # how often


def forget() -> None:
    """Forgets all calls. Measured tiles call this, as they change the kernels that a call starts."""
    global _forgotten
    _forgotten += 1  # what is being watched meanwhile is not written down
    for memory in _memories:
        memory.clear()


class _Watched(TorchDispatchMode):
    """Whether torch did nothing but allocate and view, and what it allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.only = True
        self.allocated: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler here, half a second for nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.only = self.only and (func.is_view or name in HARMLESS)
        result = func(*args, **(kwargs or {}))
        if name in ALLOCATIONS:
            self.allocated.append(result)
        return result


class Descriptor:
    """What Triton's launcher asks of a descriptor; ``TensorDescriptor`` itself checks everything once more."""

    __slots__ = ("address", "padding", "shape", "strides")

    def __init__(self, address: int, shape: list[int], strides: list[int], padding: str) -> None:
        self.address, self.shape, self.strides, self.padding = address, shape, strides, padding

    @property
    def base(self) -> Descriptor:
        return self

    def data_ptr(self) -> int:
        return self.address


class _Unknown(Exception):
    """A tensor whose place in memory does not follow from the arguments' and the allocations'."""


class Places:
    """Numbers of the addresses that the kernels of a call take: of its arguments first, then of its allocations."""

    def __init__(self, given: list[Tensor], results: list[Tensor], allocated: list[Tensor]) -> None:
        self.given = {t.data_ptr(): number for number, t in enumerate(given)}
        self.storages = {t.untyped_storage()._cdata for t in given}
        self.allocated = {t.untyped_storage()._cdata for t in allocated}
        self.fresh: dict[int, tuple[int, int]] = {}  # by storage: number, address
        self.allocations: list[tuple[Any, ...]] = []  # arguments of torch.empty_strided
        for t in results:
            if t.untyped_storage()._cdata in self.storages | set(self.fresh):
                raise _Unknown  # a view of an argument or of another result
            self._add(t, tuple(t.shape), t.stride(), t.dtype)
            if t.storage_offset() or t.untyped_storage().nbytes() != t.numel() * t.element_size():
                raise _Unknown

    def _add(self, t: Tensor, *allocation: Any) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self.allocated:
            raise _Unknown
        self.fresh[storage._cdata] = len(self.given) + len(self.fresh), storage.data_ptr()
        self.allocations.append(allocation)

    def of(self, t: Tensor) -> tuple[int, int]:
        """The number of the address, and the bytes beyond it."""
        storage = t.untyped_storage()
        if storage._cdata in self.storages:
            if t.data_ptr() not in self.given:
                raise _Unknown
            return self.given[t.data_ptr()], 0
        if storage._cdata not in self.fresh:
            self._add(t, (storage.nbytes(),), (1,), torch.uint8)
        number, address = self.fresh[storage._cdata]
        return number, t.data_ptr() - address


def _argument(arg: Any, places: Places) -> tuple[str, list[Any]]:
    """An argument of a launcher as an expression in ``a``, the addresses, and ``c``, the constants that it needs.

    No constant holds a tensor: what is remembered keeps no memory.
    """
    if arg is None or isinstance(arg, int):
        return repr(arg), []
    if isinstance(arg, TensorDescriptor):
        number, beyond = places.of(arg.base)
        return f"Descriptor(a[{number}] + {beyond}, *c[@])", [(list(arg.shape), list(arg.strides), arg.padding)]
    if isinstance(arg, Tensor):
        number, beyond = places.of(arg)
        return f"a[{number}] + {beyond}" if beyond else f"a[{number}]", []
    if isinstance(arg, tuple):
        parts = [_argument(part, places) for part in arg]
        text = "".join(f"{part}, " for part, _ in parts)
        return f"({text})", [constant for _, own in parts for constant in own]
    return "c[@]", [arg]


def _start(launch: Launch, places: Places) -> Callable[[int, list[int]], None]:
    """A function of stream and addresses that starts the kernel, as triton.runtime.jit does after it has found it."""
    texts: list[str] = []
    constants: list[Any] = []
    for arg in launch.arguments:
        text, own = _argument(arg, places)
        for constant in own:
            text = text.replace("@", str(len(constants)), 1)
            constants.append(constant)
        texts.append(text)
    compiled, grid = launch.compiled, ", ".join(map(str, launch.grid))
    source = f"lambda stream, a: run({grid}, stream, function, packed, None, None, None, {', '.join(texts)})"
    names = {"run": compiled.run, "function": compiled.function, "packed": compiled.packed_metadata, "c": constants}
    start: Callable[[int, list[int]], None] = eval(source, {**names, "Descriptor": Descriptor})
    return start


class Replay(NamedTuple):
    """What a call allocates, starts and returns."""

    device: torch.device
    allocations: list[tuple[Any, ...]]
    starts: list[Callable[[int, list[int]], None]]
    returned: int  # of the allocations, the first ones; −1: the only one, not in a tuple

    def is_here(self) -> bool:
        """Whether the current device is the tensors' own."""
        return self.device.index is None or self.device.index == torch.cuda.current_device()

    def __call__(self, addresses: list[int]) -> Any:
        device = self.device
        fresh = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.allocations
        ]
        addresses += [t.data_ptr() for t in fresh]
        stream = triton.runtime.driver.active.get_current_stream(device.index or 0)
        for start in self.starts:
            start(stream, addresses)
        if self.returned == -1:
            return fresh[0]
        return tuple(fresh[: self.returned]) if self.returned else None


def _replay_of(args: tuple[Any, ...], result: Any, launches: list[Launch], allocated: list[Tensor]) -> Replay | None:
    given = [arg for arg in args if isinstance(arg, Tensor)]
    results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    compiled = all(launch.compiled is not None for launch in launches)
    apart = len({t.untyped_storage()._cdata for t in given}) == len(given)
    if not launches or not compiled or not apart or len({t.data_ptr() for t in given}) != len(given):
        return None
    try:
        places = Places(given, results, allocated)
        starts = [_start(launch, places) for launch in launches]
    except _Unknown:
        return None
    returned = -1 if isinstance(result, Tensor) else len(results)
    return Replay(given[0].device, places.allocations, starts, returned)


class Remembered:
    """``op``, a function of tensors and numbers that starts kernels, as one that remembers (see above)."""

    def __init__(self, op: Callable[..., Any]) -> None:
        self.op = op
        self.memory: dict[Any, Replay | str] = {}
        _memories.append(self.memory)
        # A seed is another one at each call: there is nothing to come back to.
        self.able = not INTERPRETED and "seed" not in inspect.signature(op).parameters

    def replayed(self, args: tuple[Any, ...], otherwise: Callable[..., Any]) -> Any:
        """The call as it is remembered, else ``otherwise`` of the arguments."""
        if self.able:
            kind, addresses = kind_of(args)
            replay = self.memory.get(kind)
            if isinstance(replay, Replay) and replay.is_here() and not hooked():
                return replay(addresses)
        return otherwise(*args)

    def __call__(self, *args: Any) -> Any:
        if not self.able or hooked():
            return self.op(*args)
        kind, addresses = kind_of(args)
        known = self.memory.get(kind)
        if isinstance(known, Replay) and known.is_here():
            return known(addresses)
        if known == "once":
            return self._watch(kind, args)
        if known is None:
            if len(self.memory) >= MOST:
                self._make_room()
            self.memory[kind] = "once"  # what never comes again is not worth a look
        return self.op(*args)

    def _make_room(self) -> None:
        """Forgets what never came again, as where a number is another one at each call; if there is none of it, all."""
        kept = {kind: known for kind, known in list(self.memory.items()) if known != "once"}
        self.memory.clear()
        if len(kept) < MOST:
            self.memory.update(kept)

    def _watch(self, kind: Any, args: tuple[Any, ...]) -> Any:
        launches: list[Launch] = []
        before = _forgotten
        local.launches = launches
        try:
            with _Watched() as watched:
                result = self.op(*args)
        finally:
            local.launches = None
        replay = _replay_of(args, result, launches, watched.allocated) if watched.only else None
        if before == _forgotten:
            self.memory[kind] = "never" if replay is None else replay
        return result


def kind_of(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int]]:
    """All that decides what a call does, and the addresses of its tensors."""
    kind: list[Any] = []
    addresses = []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            addresses.append(address)
            kind += (arg.dtype, arg.shape, arg.stride(), arg.device, address & 15)
        else:
            kind.append(repr(arg) if isinstance(arg, float) and arg == 0 else arg)  # 0.0 and -0.0 are equal
    kind.append(len(set(addresses)))  # x twice is not grad and x
    return tuple(kind), addresses


def hooked() -> bool:
    """Whether a profiler wants to hear of every launch."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)
