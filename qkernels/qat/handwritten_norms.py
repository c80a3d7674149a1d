"""Reads RMSNorm and LayerNorm that a forward writes out in single operations.

Such as ``x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight`` in Llama, in fp32 with casts around it, and
``weight * ((x - mean) / torch.sqrt(variance + eps)) + bias`` in the first BERT.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from .operations import Operation
from .program_constants import Held, held_by

_NAMES: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.subtract), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.multiply), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.divide, torch.true_divide), "div"),
    operator.pow: "pow",
}
_LAST = (-1, [-1], (-1,))


def handwritten_norm(node: fx.Node, root: nn.Module) -> Operation | None:
    """The norm over the last dim whose last step the node is; it has a weight, which tells the number of channels."""
    return _Reader(root).norm(node)


class _Reader:
    """Casts count as nothing if they are to fp32, as what a program reads is, or to the dtype of the norm's input."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.like: set[Any] = set()  # tensors to whose dtype others are cast

    def norm(self, node: fx.Node) -> Operation | None:
        bias, scaled = self._with_held(node, "add") or (None, node)
        weight, normal = self._with_held(scaled, "mul") or (None, None)
        found = None if normal is None else self._normalized(normal)
        if found is None or weight is None or (bias is not None and found[0] == "rms_norm"):
            return None
        kind, x, eps = found
        tensors = {"weight": weight, **({} if bias is None else {"bias": bias})}
        values = [held.tensors[held.name] for held in tensors.values()]
        channels = values[0].numel()
        if any(t.dtype != torch.float32 or t.shape != (channels,) for t in values) or channels < 2:  # 1: a factor
            return None
        if not all(self._source(y) is x for y in list(self.like)):
            return None
        return Operation(kind, [x], {"channels": channels, "eps": eps, **tensors})

    def _normalized(self, node: fx.Node) -> tuple[str, fx.Node, float] | None:
        for dividend, squares, eps in self._over_root(self._source(node)):
            y = self._source(dividend)
            squared, x = self._square_of(self._reduced(squares, "mean")), self._centered(y)
            if x is None and squared is y:
                return "rms_norm", y, eps
            if x is not None and x in (self._centered(squared), self._reduced(squares, "var")):
                return "layer_norm", x, eps
        return None

    def _source(self, value: Any) -> Any:
        """What a tensor is made of by casts alone."""
        while (name := _name(value)) in ("float", "to", "type", "type_as"):
            given: list[Any] = [*value.args, *value.kwargs.values()]
            x, rest = given[0], given[1:]
            if len(rest) != (name != "float") or set(value.kwargs) - {"dtype"}:
                break
            to: Any = rest[0] if rest else torch.float32
            if _name(to) == "getattr" and to.args[1] == "dtype":
                self.like.add(to.args[0])
            elif name == "type_as":
                self.like.add(to)
            elif to is not torch.float32:
                break
            value = x
        return value

    def _with_held(self, node: fx.Node, name: str) -> tuple[Held, fx.Node] | None:
        """A tensor that a module holds, and what it is added to or multiplied with."""
        for a, b in _both_ways(_operands(self._source(node), name, 2)):
            held = held_by(self._source(a), self.root)
            if held is not None and isinstance(b, fx.Node):
                return held, b
        return None

    def _over_root(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node, float]]:
        """``x``, ``squares`` and ``eps`` of x / sqrt(squares + eps), however it is written."""
        ways = [(a, self._under_root(b, inverse=True)) for a, b in _both_ways(_operands(node, "mul", 2))]
        ways += [(a, self._under_root(b, inverse=False)) for a, b in _both_ways(_operands(node, "div", 2))[:1]]
        return [(x, *found) for x, found in ways if found is not None]

    def _under_root(self, value: Any, inverse: bool) -> tuple[fx.Node, float] | None:
        """``squares`` and ``eps`` of sqrt(squares + eps), or of its inverse."""
        value = self._source(value)
        inside = _operands(value, "rsqrt" if inverse else "sqrt", 1) or _power(value, -0.5 if inverse else 0.5)
        if inside is None:
            quotient = _operands(value, "div", 2) or [None, None]
            whole = _operands(value, "reciprocal", 1) or (quotient[1:] if quotient[0] == 1 else None)
            return self._under_root(whole[0], inverse=False) if inverse and whole is not None else None
        for squares, eps in _both_ways(_operands(inside[0], "add", 2)):
            if isinstance(squares, fx.Node) and isinstance(eps, float | int):
                return squares, float(eps)
        return None

    def _reduced(self, value: Any, name: str) -> Any:
        """``x`` of its mean over the last dim, which stays, or of its variance as LayerNorm has it."""
        names = ("input", "dim", "keepdim") if name == "mean" else ("input", "dim", "unbiased", "keepdim")
        if _name(value) != name or len(value.args) > len(names):
            return None
        given = {**dict(zip(names, value.args, strict=False)), **value.kwargs}
        x, dim = given.pop("input"), given.pop("dim", None)
        biased: list[dict[str, Any]] = [{}] if name == "mean" else [{"unbiased": False}, {"correction": 0}]
        return self._source(x) if dim in _LAST and given in [{"keepdim": True, **how} for how in biased] else None

    def _square_of(self, value: Any) -> Any:
        product = _operands(value, "mul", 2) or [None, value]
        inside = product[:1] if product[0] is product[1] else _power(value, 2) or _operands(value, "square", 1)
        return None if inside is None else self._source(inside[0])

    def _centered(self, value: Any) -> fx.Node | None:
        """``x`` of x minus its mean."""
        x, mean = _operands(value, "sub", 2) or (None, None)
        return x if isinstance(x := self._source(x), fx.Node) and self._reduced(mean, "mean") is x else None


def _name(value: Any) -> str:
    if not isinstance(value, fx.Node) or value.op not in ("call_function", "call_method"):
        return ""
    if value.op == "call_method":
        return str(value.target)
    name = getattr(value.target, "__name__", "")
    torchs = value.target is getattr or getattr(torch, name, None) is value.target  # a user's may have the name too
    return _NAMES.get(value.target, name if torchs else "")


def _operands(value: Any, name: str, count: int) -> list[Any] | None:
    """The arguments of a call of a function with so many, and no others."""
    fits = _name(value) == name and len(value.args) == count and not value.kwargs
    return list(value.args) if fits else None


def _both_ways(pair: list[Any] | None) -> list[tuple[Any, Any]]:
    return [] if pair is None else [(pair[0], pair[1]), (pair[1], pair[0])]


def _power(value: Any, exponent: float) -> list[Any] | None:
    pair = _operands(value, "pow", 2)
    return pair[:1] if pair is not None and pair[1] == exponent else None
