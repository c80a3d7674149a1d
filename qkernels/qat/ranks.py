"""Ranks: the processes whose statistics calibration combines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Status:
    """How calibration went on one rank, before any scale is set."""

    error: str | None
    names: tuple[str, ...]  # of the quantizers
    reached: tuple[bool, ...]  # which of them got values
    batches: int
    samples: bool  # whether any of the batches had samples


class Ranks:
    """The ranks of a process group; without torch.distributed, this process alone.

    Objects are exchanged, not tensors: they work on every backend, and what is exchanged is small.
    """

    def __init__(self, group: Any) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        if group is not None and not initialized:
            raise ValueError(f"group: got {group!r} without torch.distributed being initialized; accepted: None")
        self.group, self.size, self.rank = group, 1, 0
        if initialized:
            self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
            if self.rank < 0:
                raise ValueError("group: got one that this process is not in; accepted: a group of this process")

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; every rank has to take part."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, status: Status) -> list[Status]:
        """The statuses of all ranks.

        Raises:
            RuntimeError: another rank failed, or has another model.
        """
        statuses = self.gather(status)
        if status.error is not None:
            return statuses
        for rank, other in enumerate(statuses):
            if other.error is not None:
                raise RuntimeError(f"batches: rank {rank} failed: {other.error}; no rank's scales have changed")
            if other.names != status.names:
                differ = sorted({*other.names} ^ {*status.names})
                raise RuntimeError(
                    f"model: rank {rank} has other quantizers ({', '.join(differ[:3]) or 'in another order'}); "
                    "accepted: the same model on all ranks of the group"
                )
        return statuses
