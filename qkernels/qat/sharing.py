"""Finds the layers that get one and the same tensor, so that one quantizer can serve them all."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from .copying import shadow_of


class _LayerTracer(fx.Tracer):
    """Layers to quantize are single nodes, also those of a user's class."""

    def __init__(self, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.layers or super().is_leaf_module(m, module_qualified_name)


def shared_inputs(model: nn.Module, names: Collection[str]) -> list[list[str]]:
    """Groups of two or more of the named layers whose first argument is the same tensor.

    torch.fx traces the model; where it cannot, it traces the children one by one. A layer that is called more than
    once, or only in a part that cannot be traced, is in no group. What a forward does while it is traced, it does to a
    copy of the modules.
    """
    shadow = shadow_of(model).eval()
    layers = {shadow.get_submodule(name): name for name in names}
    groups: list[list[str]] = []
    wanted: list[nn.Module] = [shadow]
    while wanted:
        module = wanted.pop()
        if module in layers or sum(inner in layers for inner in module.modules()) < 2:
            continue
        try:
            graph = _LayerTracer(layers).trace(module)
        except Exception:  # a model's forward may raise anything when traced
            wanted += reversed(list(module.children()))
            continue
        groups += _groups(module, graph, layers)
    return groups


def _groups(module: nn.Module, graph: fx.Graph, layers: dict[nn.Module, str]) -> list[list[str]]:
    calls: dict[nn.Module, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if layer in layers:
                calls.setdefault(layer, []).append(node.args[0] if node.args else None)
    consumers: dict[fx.Node, list[str]] = {}
    for layer, inputs in calls.items():
        if len(inputs) == 1 and isinstance(inputs[0], fx.Node):
            consumers.setdefault(inputs[0], []).append(layers[layer])
    return [names for names in consumers.values() if len(names) > 1]
