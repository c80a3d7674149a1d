"""Layers whose class is made at run time: a copy or a pickle holds what the class is made of, as no module holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def made_again(maker: Callable[..., Any], *arguments: Any) -> nn.Module:
    """A layer without state, of the class that ``maker(*arguments)`` makes; the first part of a ``__reduce_ex__``."""
    kind = maker(*arguments)
    made: nn.Module = kind.__new__(kind)
    return made
