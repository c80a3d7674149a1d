"""Layers of this package in graphs of torch.fx: one node each, as torch's own layers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def call_as_leaf(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``nn.Module.__call__`` that tracers see as one call, where the default one looks into all but torch's modules.

    Hooks then run when the graph does, and ``convert`` finds the layers in it.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(first, Proxy):
        return nn.Module.__call__(self, *args, **kwargs)
    tracer: Any = first.tracer

    def node(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    return tracer.call_module(self, node, args, kwargs)


def root_as_leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is one node of the graph also where its layer is what a tracer starts from.

    A tracer calls the forward of its root itself. The node is then a call of ``itself``, by which name the layer's
    class gives the layer, and by which the graph's module gets it as its child.
    """

    def traced(self: nn.Module, input: Any) -> Any:
        return node_of(self, input) if isinstance(input, Proxy) else forward(self, input)

    traced.__annotations__ = {}  # which the graph's code would repeat
    return traced


def node_of(layer: nn.Module, *args: Any, **kwargs: Any) -> Proxy:
    """The call of a layer in the graph that its arguments belong to."""
    tracer: Any = next(value.tracer for value in (*args, *kwargs.values()) if isinstance(value, Proxy))
    name = "itself" if tracer.root is layer else tracer.path_of_module(layer)
    return tracer.create_proxy("call_module", name, args, kwargs)
