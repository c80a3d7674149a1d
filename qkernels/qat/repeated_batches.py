"""Batches that a model is run on several times, with the same random numbers each time."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .calibrate import check_batches, check_max_batches, tensors_in


@contextlib.contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Gives the random generators of Python and torch their state back."""
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    state = random.getstate()
    try:
        with torch.random.fork_rng([device for device in devices if device is not None]):
            yield
    finally:
        random.setstate(state)


def seed(device: torch.device) -> None:
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def batches_of(batches: Any, max_batches: int | None) -> list[Any]:
    """The batches as a list, because they are run several times; those without elements are left out."""
    check_batches(batches)
    check_max_batches(max_batches)
    found = list(itertools.islice(batches, max_batches))
    full = [batch for batch in found if not (sizes := [t.numel() for t in tensors_in(batch)]) or any(sizes)]
    if not full:
        raise ValueError(
            f"batches: got {'none' if not found else f'{len(found)} without samples'}; accepted: at least one batch of "
            "inputs (a generator or iterator can be read once only)"
        )
    return full
