"""Quantization by the range of the tensor at hand where its channels, which have a scale each, lie along any dims."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..ops.dynamic import fake_quantize_dynamic
from .granularity import Granularity, PerChannel

Order = tuple[list[int], int] | None


def channels_first(granularity: Granularity, x: Tensor) -> Order:
    """The order of x's dims in which those of its channels come first, and their number; None: it has no channels."""
    if not isinstance(granularity, PerChannel) or x.dim() < 2:
        return None
    axes = granularity.axis if isinstance(granularity.axis, tuple) else (granularity.axis,)
    first = sorted({axis % x.dim() for axis in axes})
    return [*first, *(dim for dim in range(x.dim()) if dim not in first)], len(first)


def rows(x: Tensor, order: Order) -> Tensor:
    """x with a row for each channel."""
    if order is None:
        return x
    dims, channels = order
    return x.permute(dims).unsqueeze(-1).flatten(channels).flatten(0, channels - 1)


def back(each: Tensor, x: Tensor, order: Order) -> Tensor:
    """Rows in the shape of x, from which ``rows`` made them."""
    if order is None:
        return each
    dims = order[0]
    return each.view([x.shape[dim] for dim in dims]).permute([dims.index(dim) for dim in range(x.dim())])


def dynamic(x: Tensor, bits: int, group_size: int | None, symmetric: bool, granularity: Granularity) -> Tensor:
    """x, fake-quantized by its own range."""
    checks.dense("x", x)
    order = channels_first(granularity, x)
    y = fake_quantize_dynamic(rows(x, order), bits=bits, group_size=group_size, symmetric=symmetric)
    return back(y, x, order)
