"""Finds which layers get one and the same tensor, and which get an input of the model, by tracing it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..nn.tracing import Tracer


class _LayerTracer(Tracer):
    """Layers to quantize are single nodes, also those of a user's class."""

    def __init__(self, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.layers or super().is_leaf_module(m, module_qualified_name)


@dataclass
class Inputs:
    """What torch.fx shows of the tensors that layers get."""

    groups: list[list[str]] = field(default_factory=list)  # two or more layers that get the same tensor
    given: set[str] = field(default_factory=set)  # layers that get an input of the model, or what no weight made of it


def find_inputs(model: nn.Module, names: Collection[str]) -> Inputs:
    """Where the first arguments of the named layers come from.

    torch.fx traces the model; where it cannot, it traces the children one by one. A layer that is called more than
    once, or only in a part that cannot be traced, is in no group. The model becomes one in eval mode, and what a
    forward does while it is traced, it does to the model: give a ``shadow_of`` it.
    """
    model.eval()
    layers = {model.get_submodule(name): name for name in names}
    found = Inputs()
    for module, graph in graphs_of(model, layers):
        sources = _sources(module, graph, layers)
        found.groups += [names for names in sources.values() if len(names) > 1]
        if module is model:
            free = _free_of_weights(module, graph)
            found.given.update(name for node, names in sources.items() if node in free for name in names)
    return found


def graphs_of(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """The model with its graph, or the largest modules in it that torch.fx can trace and that hold some of the layers.

    The layers are single nodes. What a forward does while it is traced, it does to the model: trace a ``shadow_of`` it.
    """
    wanted: list[nn.Module] = [model]
    while wanted:
        module = wanted.pop()
        if module in layers or not any(inner in layers for inner in module.modules()):
            continue
        try:
            graph = _LayerTracer(layers).trace(module)
        except NotImplementedError:
            wanted += reversed(list(module.children()))
            continue
        yield module, graph


def _sources(module: nn.Module, graph: fx.Graph, layers: dict[nn.Module, str]) -> dict[fx.Node, list[str]]:
    """The layers that get each node as their first argument."""
    calls: dict[nn.Module, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if layer in layers:
                calls.setdefault(layer, []).append(node.args[0] if node.args else None)
    sources: dict[fx.Node, list[str]] = {}
    for layer, inputs in calls.items():
        if len(inputs) == 1 and isinstance(inputs[0], fx.Node):
            sources.setdefault(inputs[0], []).append(layers[layer])
    return sources


def _free_of_weights(module: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on no parameter: they need no gradient."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    free: set[fx.Node] = set()
    for node in graph.nodes:
        weighs = node.op == "get_attr" and str(node.target) in parameters
        if node.op == "call_module":
            weighs = any(True for _ in module.get_submodule(str(node.target)).parameters())
        if not weighs and all(source in free for source in node.all_input_nodes):
            free.add(node)
    return free
