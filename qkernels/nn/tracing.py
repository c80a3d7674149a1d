"""Calls of layers: one node each in graphs of torch.fx, as torch's own are; their errors name them in the model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.fx
from torch import nn
from torch.fx import Graph, Proxy

NAMED = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)  # classes of errors of a layer's arguments
TRACING = threading.RLock()  # held by the thread that traces


class Tracer(torch.fx.Tracer):
    """A tracer that leaves alone what other threads do meanwhile.

    While torch.fx traces, every call of a module in the process passes through the tracer, and every read of a
    parameter. Those of other threads, which may run models, go on as ever. Tracers of two threads take turns.
    """

    _thread: int

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """The graph.

        Raises:
            NotImplementedError: whatever the forward raises when it gets stand-ins for tensors. Any other error is a
                fault of this package.
        """
        with TRACING:
            self._thread = threading.get_ident()
            try:
                return super().trace(root, concrete_args)
            except Exception as error:  # a forward may raise anything
                if _is_fault(error) or (isinstance(error, NotImplementedError) and str(error)):
                    raise
                text = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
                raise NotImplementedError(f"torch.fx cannot trace its forward ({text})") from error

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return self.record_call(m, forward, args, kwargs)

    def record_call(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What becomes of a call that the traced forward makes. Tracers override this, never ``call_module``."""
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:120]


def _is_fault(error: Exception) -> bool:
    """Whether an error in a trace is one of this package's code: of a class that the code never raises on purpose."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
    own = module == __name__ or module.startswith("qkernels.qat.")
    return own and not isinstance(error, RuntimeError | ValueError)


def call_as_leaf(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``nn.Module.__call__`` that a tracer records as one call; the default tracer would trace into the layer.

    Hooks then run when the graph runs, and ``convert`` finds the layers in the graph. An error of the call says of
    which layer it is: "layer1.0.conv1 (Int8Conv2d): …".
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(first, Proxy):
        try:
            return nn.Module.__call__(self, *args, **kwargs)
        except NAMED as error:
            _say_where(error, self)
            raise
    tracer: Any = first.tracer

    def node(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    return tracer.call_module(self, node, args, kwargs)


def root_as_leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is one node of the graph even if its layer is the tracer's root.

    A tracer calls the forward of its root directly. The node is then a call of the layer's property ``itself``, which
    returns the layer; the graph's module gets the layer as its child under that name.
    """

    def traced(self: nn.Module, input: Any) -> Any:
        return node_of(self, input) if isinstance(input, Proxy) else forward(self, input)

    traced.__annotations__ = {}  # the graph's code would repeat them
    return traced


def node_of(layer: nn.Module, *args: Any, **kwargs: Any) -> Proxy:
    """Adds a call of the layer to the graph that its arguments belong to."""
    tracer: Any = next(value.tracer for value in (*args, *kwargs.values()) if isinstance(value, Proxy))
    name = "itself" if tracer.root is layer else tracer.path_of_module(layer)
    return tracer.create_proxy("call_module", name, args, kwargs)


def _say_where(error: Exception, layer: nn.Module) -> None:
    """Puts the layer's name and class in front of an error's text, if no layer inside this one has done so.

    An error of another class, such as one that calibrate raises in a hook, is not about the arguments of the layer.
    """
    plain = type(error) in NAMED and [type(arg) for arg in error.args] == [str]
    if not plain or hasattr(error, "layer"):
        return
    kind, name = type(layer).__name__, name_in_what_was_called(layer)
    error.layer = name  # type: ignore[attr-defined]
    error.args = (f"{name} ({kind}): {error}" if name else f"{kind}: {error}",)


def say_which_of_torch(error: Exception) -> None:
    """The same for an error of a layer of torch's own, by the call of it that the error came through last."""
    at, layer = error.__traceback__, None
    while at is not None:
        if at.tb_frame.f_code is nn.Module._call_impl.__code__:
            layer = at.tb_frame.f_locals["self"]
        at = at.tb_next
    if layer is not None and type(layer).__module__.startswith("torch.nn."):
        _say_where(error, layer)


def name_in_what_was_called(layer: nn.Module) -> str:
    """The layer's name in the outermost module of which a method is running; "": the layer itself was called.

    It is looked up when it is wanted, so that no layer has to remember a name, which another model may not know it by.
    """
    found, frame = "", sys._getframe()
    while frame is not None:
        called = frame.f_locals.get("self")
        if isinstance(called, nn.Module):
            found = next((name for name, module in called.named_modules() if module is layer), found)
        frame = frame.f_back  # type: ignore[assignment]
    return found
