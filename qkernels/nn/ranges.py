"""The range, scale and zero point of a quantizer, computed from the values of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.autograd import transformed
from ..ops.follow_range import follow_range, followed
from ..ops.quantize import choose_qparams


def block_range(x: Tensor, scale_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum (fp32) of each block of x that shares an element of scale."""
    blocks, inner = _blocks(x, scale_shape)
    shape = tuple(scale_shape)
    return blocks.amin(inner).float().reshape(shape), blocks.amax(inner).float().reshape(shape)


def block_statistics(x: Tensor, scale_shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """``block_range``, and the mean magnitude (fp32) of each block."""
    blocks, inner = _blocks(x, scale_shape)
    return *block_range(x, scale_shape), blocks.float().abs().mean(inner).reshape(tuple(scale_shape))


def block_magnitude(x: Tensor, scale_shape: Sequence[int]) -> Tensor:
    """Mean magnitude (fp32) of each block of x, in one pass over it."""
    blocks, inner = _blocks(x, scale_shape)
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    total = torch.linalg.vector_norm(blocks, 1, inner, dtype=dtype).float().reshape(tuple(scale_shape))
    return total * (total.numel() / max(x.numel(), 1))


def _blocks(x: Tensor, scale_shape: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    x = x.detach()
    if math.prod(scale_shape) == 1:
        return x.reshape(-1), (0,)
    split = [n for p, size in zip(scale_shape, x.shape, strict=True) for n in (p, size // max(p, 1))]
    return x.reshape(split), tuple(range(1, len(split), 2))


def per_element(scale: Tensor, x: Tensor) -> Tensor:
    """Scale in a shape that broadcasts with x, whose blocks of the last dim may share an element of it."""
    if scale.numel() == 1 or scale.shape[-1] in (1, x.shape[-1]):
        return scale
    return scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)


def set_qparams(
    scale: Tensor,
    zero_point: Tensor | None,
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    eps: float,
    zeros_span: float,
) -> None:
    """Sets scale and zero point to cover [low, high].

    A channel whose range is zeros alone takes the mean of the other ranges, or zeros_span if all are zeros.
    """
    low, high = low.float(), high.float()
    if zeros_span:
        amax = torch.maximum(-low, high)
        alive = amax > 0
        span = (torch.where(alive, amax, 0) / alive.sum().clamp(min=1)).sum()
        span = torch.where(alive.any(), span, zeros_span)
        low, high = torch.where(alive, low, -span), torch.where(alive, high, span)
    s, z = choose_qparams(low, high, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric, eps=eps)
    scale.copy_(s)
    if zero_point is not None:
        write(zero_point, z)


def is_sharded(t: Tensor) -> bool:
    """Whether t is a Parameter that ``fully_shard`` has sharded and that no forward pass has gathered now."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """t; a sharded t is gathered, in which every process has to take part."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


def write(t: Tensor, value: Tensor) -> None:
    """Copies value into t, which may be sharded; value is whole and the same in every process."""
    if is_sharded(t):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = t
        value = distribute_tensor(value.to(t.dtype), sharded.device_mesh, sharded.placements)
    t.copy_(value)


def _of_many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def follow(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    up: float,
    down: float,
    in_place: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as ``follow_range`` moves them.

    in_place: the given tensors are changed and returned, except under torch.func, which forbids it; else these are new.
    On several ranks a zero point that is a Parameter stays for its gradient to move: each rank would move it by its own
    x, and no rank sends parameters to the others as the first one sends its buffers.
    """
    rule: dict[str, Any] = {
        "quant_min": quant_min,
        "quant_max": quant_max,
        "symmetric": symmetric,
        "up": up,
        "down": down,
    }
    if not in_place or transformed():
        return followed(x, scale, zero_point, **rule)
    if isinstance(zero_point, nn.Parameter) and _of_many_ranks():
        follow_range(x, scale, zero_point.detach().clone(), **rule)
    else:
        follow_range(x, scale, zero_point, **rule)
    return scale, zero_point


@torch.no_grad()
def forget_zeros(running_min: Tensor, running_max: Tensor) -> None:
    """The average starts anew for channels that were all zero so far: it grows slower than they do and would clip."""
    zeros = (running_min == 0) & (running_max == 0)
    running_min.masked_fill_(zeros, torch.inf)
    running_max.masked_fill_(zeros, -torch.inf)
