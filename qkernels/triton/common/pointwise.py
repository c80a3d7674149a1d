"""What elementwise kernels are given: x without gaps in memory, in blocks, and the constexprs that find its scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import configs
from .configs import ceil_div
from .granularity import ONE_CHANNEL, View, granularity_of


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the memory layout of ``like``, a dense tensor of its shape."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


def dense_and_like(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """x in a memory layout without gaps and an empty tensor in the same one, which is that of ``empty_like``."""
    y = torch.empty_like(x, dtype=dtype)
    return laid_out(x, y), y


def empty_mask(x: Tensor) -> Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def zero_point_kind(scale: Tensor, zero_point: Tensor | None) -> int:
    """The kernels' ZERO_POINT: 0 none, 1 one for each scale, 2 one for all."""
    return 0 if zero_point is None else 1 if zero_point.numel() == scale.numel() else 2


def in_blocks(x: Tensor, scale: Tensor, zero_point_kind: int | None = None) -> tuple[View, dict[str, Any]]:
    """View and constexprs of a kernel that takes a dense, non-empty x in blocks; None: it has no ZERO_POINT."""
    granularity = granularity_of(x, scale)
    block = configs.block(granularity, x.numel())
    return granularity.view, configs.by_granularity(granularity, block, zero_point_kind)


def pointwise_arguments(x: Tensor, scale: Any, zero_point: Any) -> tuple[Any, Any, View, dict[str, Any]]:
    """scale, zero point, view and constexprs of such a kernel; scale and zero point are tensors or numbers."""
    if not isinstance(scale, Tensor):
        return scale, zero_point, ONE_CHANNEL.view, configs.by_numbers(configs.block(ONE_CHANNEL, x.numel()))
    view, constexprs = in_blocks(x, scale, zero_point_kind(scale, zero_point))
    return scale.contiguous(), zero_point if zero_point is None else zero_point.contiguous(), view, constexprs


def blocks(numel: int, constexprs: dict[str, Any]) -> tuple[int]:
    """The grid of such a kernel."""
    return (ceil_div(numel, constexprs["BLOCK"]),)
