"""How the ops lay data out in memory, each layout drawn where it is made."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_like(x: Tensor) -> Tensor:
    """Uninitialised memory for one bit per element of x, eight to a byte."""
    return x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


def storage_flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order they lie in memory."""
    return torch.as_strided(t, (t.numel(),), (1,))


def pack_mask(inside: Tensor, like: Tensor) -> Tensor:
    """One bit per element in the storage order of ``like``, low bit first."""
    flat = storage_flat(torch.empty_like(like, dtype=torch.bool).copy_(inside))
    bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)  # made there: a list would be copied, a sync
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask[:, None] >> shifts) & 1).reshape(-1)[: like.numel()].bool()
    inside = torch.empty_like(like, dtype=torch.bool)
    storage_flat(inside).copy_(bits)
    return inside
