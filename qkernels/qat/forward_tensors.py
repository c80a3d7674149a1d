"""Which tensors of a traced forward get quantizers: sums of activations, concatenations, and inputs of pools."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .graph import writes
from .operations import POOL_MODULES

Place = str  # where in the source a tensor is made, whatever mode and arguments a trace is for
PLACE, OBSERVED = "place", "observed"  # keys of a node's ``meta``: its place; whether it has a quantizer of its own

SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__", "__iadd__")
CATS = (torch.cat, torch.concat, torch.concatenate)
POOLS = (
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
)
MEANS = (torch.mean, "mean")
# Elementwise functions of one tensor, as functions, methods and classes of torch.nn (in small letters).
ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "clamp", "clampmin", "clampmax", "hardtanh", "leakyrelu", "prelu", "elu", "selu"),
        *("celu", "silu", "mish", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "identity"),
    )
)
# Sums that these read are scores: they may be masked by infinities, and no layer reads them.
OF_SCORES = frozenset(("softmax", "logsoftmax", "softmin", "maskedfill", "logsumexp"))
# What gives no tensor of floats, or a tensor that no data is in.
NO_VALUES = frozenset(
    (
        *("size", "dim", "numel", "ndimension", "stride", "argmax", "argmin", "long", "int", "bool", "len"),
        *("getattr", "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "logicalnot", "logicaland"),
        *("zeroslike", "oneslike", "emptylike", "fulllike", "newzeros", "newones", "newempty", "newfull"),
        *("nonzero", "argsort"),
    )
)


@dataclass
class Tensors:
    """The tensors of one traced forward that get quantizers.

    Attributes:
        at: the node behind which each quantizer stands, with the kind of the tensor: "add", "cat", or "add_input" and
            "pool_input" for what a sum or a pool reads.
        sums: the place of each sum -> those of its operands, for which there are quantizers too.
        pools: the children that are average pools and read such a tensor.
    """

    at: dict[fx.Node, str] = field(default_factory=dict)
    sums: dict[Place, list[Place]] = field(default_factory=dict)
    pools: set[str] = field(default_factory=set)

    def places(self) -> dict[Place, str]:
        """The kind of each tensor by its place, in the order of the graph."""
        return {place_of(node): kind for node, kind in self.at.items()}


def place_of(node: fx.Node) -> Place:
    found: Place = f"argument {node.target}" if node.op == "placeholder" else node.meta[PLACE]
    return found


def name_of(node: fx.Node, root: nn.Module) -> str:
    """The function, method or class of torch.nn that a node calls, without underscores; "": another one."""
    if node.op == "call_module":
        kind = type(root.get_submodule(str(node.target)))
        return kind.__name__.lower() if kind.__module__.startswith("torch.nn.") else ""
    return (getattr(node.target, "__name__", None) or str(node.target)).replace("_", "").lower()


def find_tensors(graph: fx.Graph, root: nn.Module) -> Tensors:
    """The tensors in the graph of a module whose children are single nodes; in it nothing is overwritten."""
    return _Finder(graph, root).tensors()


class _Finder:
    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.activations: set[fx.Node] = set()
        for node in graph.nodes:
            if self._is_activation(node):
                self.activations.add(node)
        self.written = {node.args[0] for node in graph.nodes if writes(node, root)}

    def _is_activation(self, node: fx.Node) -> bool:
        """Whether a node may be a tensor that depends on what the module is given."""
        if node.op in ("placeholder", "call_module"):
            return True
        if node.op not in ("call_function", "call_method") or name_of(node, self.root) in NO_VALUES:
            return False
        return any(source in self.activations for source in node.all_input_nodes)

    def tensors(self) -> Tensors:
        found = Tensors()
        kinds: dict[fx.Node, str] = {}
        operands: dict[fx.Node, list[fx.Node]] = {}  # of the sums, by the node of the whole sum
        parts: dict[fx.Node, list[fx.Node]] = {}  # sums that another one adds to, with their operands
        for node in self.graph.nodes:
            if self._is_sum(node) and not self._is_of_scores(node):
                terms = [term for arg in node.args[:2] for term in parts.get(arg, [self._source(arg)])]
                if any(self._is_sum(user) for user in node.users) and len(node.users) == 1:
                    parts[node] = terms
                    continue
                result = self._activated(node)
                kinds[result], operands[result] = "add", terms
            elif self._is_cat(node):
                kinds[self._activated(node)] = "cat"
        for terms in operands.values():
            for term in terms:
                if self._may_be_quantized(term):
                    kinds.setdefault(term, "add_input")
        for node in self.graph.nodes:
            if self._is_pool(node):
                source = self._source(node.args[0] if node.args else node.kwargs["input"])
                if self._may_be_quantized(source) and source not in parts:
                    kinds.setdefault(source, "pool_input")
                if node.op == "call_module":
                    found.pools.add(str(node.target))
        found.at = {node: kinds[node] for node in self.graph.nodes if node in kinds}
        found.sums = {
            place_of(result): [place_of(term) for term in terms if kinds.get(term) == "add_input"]
            for result, terms in operands.items()
        }
        return found

    def _source(self, node: fx.Node) -> fx.Node:
        """The tensor that a node is, which an Identity hands on; Python's ``sum`` begins with a zero."""
        while True:
            if node.op == "call_module" and name_of(node, self.root) == "identity":
                node = node.args[0]  # type: ignore[assignment]
            elif node.target is operator.add and node.args[0] == 0:
                node = node.args[1]  # type: ignore[assignment]
            else:
                return node

    def _may_be_quantized(self, node: fx.Node) -> bool:
        # An argument that the forward overwrites is the caller's tensor.
        return node in self.activations and not (node.op == "placeholder" and node in self.written)

    def _activated(self, node: fx.Node) -> fx.Node:
        """What the sum becomes before somebody else reads it."""
        while len(node.users) == 1:
            (reader,) = node.users
            own = [arg for arg in (*reader.args, *reader.kwargs.values()) if isinstance(arg, fx.Node)]
            if own != [node] or name_of(reader, self.root) not in ACTIVATIONS:
                break
            node = reader
        return node

    def _is_of_scores(self, node: fx.Node) -> bool:
        return any(name_of(user, self.root) in OF_SCORES for user in node.users)

    def _is_sum(self, node: fx.Node) -> bool:
        calls = node.op in ("call_function", "call_method") and node.target in SUMS and not node.meta.get(OBSERVED)
        return calls and len(node.args) == 2 and "out" not in node.kwargs and self._are_activations(node.args)

    def _is_cat(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target not in CATS or "out" in node.kwargs or node.meta.get(OBSERVED):
            return False
        tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        return isinstance(tensors, tuple | list) and len(tensors) > 1 and self._are_activations(tensors)

    def _are_activations(self, nodes: Iterable[Any]) -> bool:
        return all(isinstance(node, fx.Node) and node in self.activations for node in nodes)

    def _is_pool(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.root.get_submodule(str(node.target))) in POOL_MODULES
        if node.op == "call_function" and node.target in POOLS:
            return True
        if node.op == "output" or node.target not in MEANS:
            return False
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, tuple | list) and len(dims) > 1
