"""Sizes in graphs of torch.fx: which tensor's they are."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx


def shape_of(value: Any) -> fx.Node | None:
    """x of a node ``x.shape`` or ``x.size()``."""
    if not isinstance(value, fx.Node) or not value.args or not isinstance(value.args[0], fx.Node):
        return None
    is_shape = value.target is getattr and value.args[1] == "shape"
    return value.args[0] if is_shape or (value.target == "size" and len(value.args) == 1 and not value.kwargs) else None


def size_of(value: Any) -> tuple[fx.Node, int] | None:
    """x and dim of a node ``x.size(dim)``, ``x.size()[dim]`` or ``x.shape[dim]``."""
    if not isinstance(value, fx.Node):
        return None
    if value.target == "size":
        given: dict[str, Any] = {**dict(zip(("x", "dim"), value.args, strict=False)), **value.kwargs}
        source, dim = given.get("x"), given.get("dim")
    elif value.target is operator.getitem:
        source, dim = shape_of(value.args[0]), value.args[1]
    else:
        return None
    return (source, dim) if isinstance(source, fx.Node) and isinstance(dim, int) else None


def spatial_sizes_of(value: Any) -> tuple[fx.Node, int | None] | None:
    """The x whose spatial sizes a value holds, and how many, where it tells.

    It is ``x.shape[2:]``, ``x.shape[-2:]``, or all of ``x.shape[2]``, … in a list.
    """
    if isinstance(value, fx.Node):
        source = shape_of(value.args[0]) if value.target is operator.getitem else None
        if source is None or value.args[1] not in (slice(2, None), slice(-2, None), slice(-3, None)):
            return None
        start = value.args[1].start  # type: ignore[union-attr]
        return source, None if start > 0 else -start
    if not isinstance(value, tuple | list) or not value:
        return None
    found = [size_of(each) for each in value]
    source = found[0][0] if found[0] is not None else None
    rank = len(value)
    for at, one in enumerate(found):
        if one is None or one[0] is not source or one[1] not in (2 + at, at - rank):
            return None
    assert source is not None
    return source, rank
