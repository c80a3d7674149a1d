"""Which plain layers follow each other, as torch.fx shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..nn.qat import QATConv1d, QATConv2d, QATConv3d, QATLinear
from ..nn.qat_layer import effective_weight
from .copying import is_sharded_model, shadow_of
from .sharing import graphs_of
from .weight_readers import find_weight_readers

LINEAR = (nn.Linear, QATLinear)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, QATConv1d, QATConv2d, QATConv3d)
NORMS = (nn.LayerNorm, nn.RMSNorm)
LAYERS = (*LINEAR, *CONVOLUTIONS, *NORMS)
# What gives c·y for c·x in eval mode, channel by channel, for every positive c.
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
               nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
               nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)  # fmt: skip
FUNCTIONS = ("relu", "relu_", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
             "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")  # fmt: skip
HOMOGENEOUS_FUNCTIONS = {getattr(holder, name) for holder in (F, torch) for name in FUNCTIONS if hasattr(holder, name)}


class Chains:
    """The graphs of a model, and its layers whose weights nothing but their own one call in a graph reads."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
        if is_sharded_model(model):
            raise ValueError("model: got one under fully_shard; accepted: a call before sharding")
        readers = find_weight_readers(model)
        held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        self.plain = {
            name
            for name, module in model.named_modules()
            if _is_plain(module)
            and all(held[id(p)] == 1 for p in module._parameters.values() if p is not None)
            and name not in readers.too
            and name not in readers.instead
        }
        shadow = shadow_of(model).eval()
        self.modules = dict(shadow.named_modules())
        names = {module: name for name, module in self.modules.items()}
        self.name_of: dict[fx.Node, str] = {}
        calls: Counter[str] = Counter()
        for module, graph in graphs_of(shadow, [layer for layer in names if isinstance(layer, LAYERS)]):
            for node in graph.nodes:
                if node.op == "call_module":
                    self.name_of[node] = names[module.get_submodule(str(node.target))]
                    calls[self.name_of[node]] += 1
        self.plain &= {name for name, count in calls.items() if count == 1}

    def plain_layer(self, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> str | None:
        """The name of the plain layer of one of these classes that the node calls; None: it calls none."""
        name = self.name_of.get(node)
        return name if name in self.plain and type(self.modules[name]) in kinds else None

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Two layers each, of which the second alone gets what the first returns, or a homogeneous function of it."""
        for node in self.name_of:
            first = self.plain_layer(node, (*LINEAR, *CONVOLUTIONS))
            user, flat = node, False
            while first is not None and len(user.users) == 1:
                user = next(iter(user.users))
                second = self.plain_layer(user, (*LINEAR, *CONVOLUTIONS))
                if len(user.all_input_nodes) != 1:
                    break
                if second is not None:
                    if self._channels_meet(self.modules[first], self.modules[second], flat):
                        yield first, second
                    break
                if self._flattens(user):
                    flat = True
                elif not self._is_homogeneous(user):
                    break

    def behind_norms(self) -> Iterator[tuple[str, list[str]]]:
        """Norms with a weight, and the Linear layers that alone get their output."""
        for node in self.name_of:
            norm = self.plain_layer(node, NORMS)
            if norm is None:
                continue
            layers = [self.plain_layer(user, LINEAR) for user in node.users]
            if layers and all(layer is not None for layer in layers):
                yield norm, [layer for layer in layers if layer is not None]

    def _channels_meet(self, first: Any, second: Any, flat: bool) -> bool:
        """Whether the channels that one layer returns are those that the other gets."""
        outputs = len(first.weight)
        if isinstance(second, LINEAR):
            if isinstance(first, LINEAR):
                return not flat and second.in_features == outputs  # type: ignore[no-any-return]
            return flat and second.in_features % outputs == 0
        return not flat and second.weight.dim() == first.weight.dim() and second.in_channels == outputs  # type: ignore[no-any-return]

    def _is_homogeneous(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.modules[self.name_of[node]]) in HOMOGENEOUS
        if node.op == "call_function":
            return node.target in HOMOGENEOUS_FUNCTIONS
        return node.op == "call_method" and node.target in ("relu", "relu_", "contiguous")

    def _flattens(self, node: fx.Node) -> bool:
        """Whether the node makes rows of all dims but the first."""
        if node.op == "call_module":
            module = self.modules[self.name_of[node]]
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        flattens = node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten")
        return flattens and (*node.args[1:], *node.kwargs.values()) == (1,)


def _is_plain(layer: Any) -> bool:
    """Whether a layer is of torch's class or its QAT form, and computes with its own parameters."""
    if type(layer) not in LAYERS or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight = layer._parameters.get("weight")
    if type(layer) in NORMS:
        return weight is not None and weight.dim() == 1
    return weight is not None and effective_weight(layer) is weight
