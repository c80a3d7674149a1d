"""Reads nodes of a converted model's graph that normalize the last dim."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .operations import Operation
from .program_constants import Held, held_by

NORMS = ("layer_norm", "rms_norm")  # the steps of these nodes
KINDS: dict[Any, str] = {
    nn.LayerNorm: "layer_norm",
    F.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
}
EPS = {"layer_norm": 1e-5, "rms_norm": None}  # of the functions


def module_norm(node: fx.Node, module: nn.Module) -> Operation | None:
    """An nn.LayerNorm or nn.RMSNorm over the last dim."""
    settings: Any = module
    kind = KINDS.get(type(module))
    if kind is None or len(node.args) != 1 or node.kwargs or "forward" in vars(module):
        return None
    if len(settings.normalized_shape) != 1:
        return None
    names = ("weight", "bias") if kind == "layer_norm" else ("weight",)
    tensors = {name: Held(module._parameters, name) for name in names if getattr(module, name) is not None}
    return _norm(kind, node.args[0], settings.normalized_shape[0], tensors, settings.eps)


def function_norm(node: fx.Node, root: nn.Module) -> Operation | None:
    """A call of layer_norm or rms_norm of torch.nn.functional with tensors that modules hold."""
    kind = KINDS.get(node.target)
    if kind is None:
        return None
    names = ("input", "normalized_shape", "weight", *(("bias",) if kind == "layer_norm" else ()), "eps")
    defaults = {"weight": None, "bias": None, "eps": EPS[kind]}
    given: dict[str, Any] = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if len(node.args) > len(names) or set(given) - {"bias"} != set(names) - {"bias"}:
        return None
    tensors = {}
    for name in ("weight", "bias"):
        if given[name] is not None:
            held = held_by(given[name], root)
            if held is None:
                return None
            tensors[name] = held
    shape = given["normalized_shape"]
    if isinstance(shape, fx.Node):  # weight.shape
        source = shape.args[0] if shape.target is getattr and shape.args[1] == "shape" else None
        held = held_by(source, root)
        shape = () if held is None else tuple(held.tensors[held.name].shape)
    if len(shape) != 1 or not isinstance(shape[0], int) or not isinstance(given["eps"], float | int | None):
        return None
    return _norm(kind, given["input"], shape[0], tensors, given["eps"])


def _norm(kind: str, x: Any, channels: int, tensors: dict[str, Held], eps: float | None) -> Operation | None:
    held: list[Tensor] = [t.tensors[t.name] for t in tensors.values()]
    if not isinstance(x, fx.Node) or any(t.dtype != torch.float32 or t.shape != (channels,) for t in held):
        return None
    if channels < 1:
        return None
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    return Operation(kind, [x], {"channels": channels, "eps": eps, **tensors})
