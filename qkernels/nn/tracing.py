"""Layers of this package in graphs of torch.fx: one node each, as torch's own layers are."""

from __future__ import annotations

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
