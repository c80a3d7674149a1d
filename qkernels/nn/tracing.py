"""Makes each layer of this package one node in a graph of torch.fx, as torch's own layers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def call_as_leaf(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``nn.Module.__call__`` that a tracer records as one call; the default tracer would trace into the layer.

    Hooks then run when the graph runs, and ``convert`` finds the layers in the graph.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(first, Proxy):
        return nn.Module.__call__(self, *args, **kwargs)
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
