"""Tracing of forwards with torch.fx, refused where the graph would not do what the forward does."""

from __future__ import annotations

import contextlib
import dis
import functools
import operator
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..nn.tracing import Tracer
from .call_patterns import GIVEN, Arguments, Pattern

# What makes numbers of a tensor.
SIZES = ("size", "dim", "ndimension", "numel", "nelement", "stride", "item")
IN_PLACE = {  # operators that overwrite a tensor, and those that make a number of a number
    getattr(operator, f"i{name}"): getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in (*("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
                 *("and", "or", "xor", "lshift", "rshift"))
}  # fmt: skip
OWN_CODE = ("torch.", "qkernels.nn.", "qkernels.qat.")  # modules that may ask a stand-in what it is
_PASS_ON = ("abc", "typing", "inspect", "functools")  # those that ask for somebody else


class StandIn(fx.Proxy):
    """Stands for a tensor, or for another argument, while a forward is traced.

    It records ``x += y`` as what it does; fx.Proxy takes it for ``x = x + y``, which leaves the tensor as it was. To
    the user's code it does not say of what type it is, or which attributes it has, since it would say something else
    than the tensor; and it takes no attributes, which the tensor would not get.
    """

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        frame, passed_on = sys._getframe(1), False
        while frame.f_globals.get("__name__", "") in _PASS_ON or frame.f_code is torch.is_tensor.__code__:
            frame, passed_on = frame.f_back, True  # type: ignore[assignment]
        # Torch's functions in C ask too, for symbolic numbers, when the user's code calls them.
        asks = passed_on or not {"isinstance", "__class__"}.isdisjoint(frame.f_code.co_names)
        if _is_own(frame) or not (asks or _instruction(frame) == "MATCH_CLASS"):
            return StandIn
        raise self.tracer.refusal("it asks for the type of what it is given")

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        frame = sys._getframe(1)
        if not _is_own(frame) and not _instruction(frame).startswith("LOAD_"):  # hasattr or getattr, not x.name
            raise self.tracer.refusal(f"it asks whether what it is given has the attribute {name}")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_own(sys._getframe(1)):
            raise self.tracer.refusal(f"it sets the attribute {name} of what it is given")
        super().__setattr__(name, value)


class _Attribute(StandIn, fx.proxy.Attribute):
    """Stands for an attribute of what a stand-in stands for, or for its method if it is called."""


def _is_own(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name == "torch" or name.startswith(OWN_CODE)


def _instruction(frame: FrameType) -> str:
    """The name of the instruction that runs."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _recorder(in_place: Any) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        function = IN_PLACE[in_place] if is_number(self.node) else in_place
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _operator in IN_PLACE:
    setattr(StandIn, f"__{_operator.__name__}__", _recorder(_operator))


def is_size(node: fx.Node) -> bool:
    """Whether a node asks for the size of its first argument, or for how many dims it has."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "ndimension", "numel", "nelement")


def is_number(value: Any) -> bool:
    """Whether a node's result is a size, or another number, which nothing can overwrite."""
    if not isinstance(value, fx.Node):
        return True
    if value.op == "call_method":
        return value.target in SIZES
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return value.args[1] in ("shape", "ndim")
    if value.target is operator.getitem:
        return is_number(value.args[0])
    return getattr(value.target, "__module__", "") == operator.add.__module__ and all(map(is_number, value.args))


class FaithfulTracer(Tracer):
    """Refuses forwards that ask for types or set attributes, switch gradients or autocast, or draw random numbers.

    Buffers are read when the graph runs.

    Args:
        pattern: the kind of the call; the graph has a placeholder for each argument that is given.
    """

    proxy_buffer_attributes = True

    def __init__(self, pattern: Pattern = ()) -> None:
        super().__init__()
        self.pattern, self._modes = pattern, _modes()
        self._refusal = ""

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        arguments = Arguments(type(self.root))
        names = [name for name, how in zip(arguments.names, self.pattern, strict=True) if how == GIVEN]
        given = [self.create_proxy("placeholder", name, (), {}) for name in names]
        by_position, by_name = arguments.values(self.pattern, given)
        return functools.partial(type(self.root).forward, **by_name), [self.root, *by_position]

    def refusal(self, reason: str) -> NotImplementedError:
        """To be raised; if the forward catches it, the trace fails at its end."""
        self._refusal = self._refusal or reason
        return NotImplementedError(reason)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        drawn = torch.get_rng_state(), random.getstate()
        graph = super().trace(root, concrete_args)
        if self._refusal:
            raise NotImplementedError(self._refusal)
        if not torch.equal(drawn[0], torch.get_rng_state()) or drawn[1] != random.getstate():
            raise NotImplementedError("it draws random numbers")
        return graph

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return StandIn(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind != "output" and _modes() != self._modes:
            raise self.refusal("it switches gradients or autocast")
        return node


def _modes() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, ("cpu", "cuda"))


def traced_with_and_without_gradients(trace: Callable[[], fx.Graph]) -> fx.Graph:
    """The graph that ``trace`` makes, each time anew.

    Raises:
        NotImplementedError: it makes another one where gradients are off.
    """
    with torch.no_grad():
        without = _described(trace())
    with torch.enable_grad():
        graph = trace()
    if _described(graph) != without:
        raise NotImplementedError("it asks whether gradients are wanted")
    return graph


def _described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


@contextlib.contextmanager
def transformer_layers_traced_through() -> Iterator[None]:
    """Lets torch's Transformer layers be traced with masks.

    Their fast path, which a converted layer never takes, asks for much. What brings their masks to one dtype branches
    on it, and is called when the graph runs instead.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    own = {name: getattr(F, name) for name in ("_canonical_mask", "_none_or_dtype") if hasattr(F, name)}
    torch.backends.mha.set_fastpath_enabled(False)
    for name, function in own.items():
        setattr(F, name, _recorded(function))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for name, function in own.items():
            setattr(F, name, function)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is one node of the graph if it gets a stand-in; tensors of other threads it treats as ever."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        stand_ins = [x for x in (*args, *kwargs.values()) if isinstance(x, fx.Proxy)]
        if not stand_ins:
            return function(*args, **kwargs)
        return stand_ins[0].tracer.create_proxy("call_function", function, args, kwargs)

    return record


def attributes_of(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], tuple[int, list[int]]]:
    """What the modules hold, and what the lists and dicts that they hold hold, by module and name, as identities."""
    return {
        (path, name): (id(value), list(map(id, _contents(value))))
        for path, module in modules.items()
        for name, value in vars(module).items()
    }


def _contents(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | set) else []
