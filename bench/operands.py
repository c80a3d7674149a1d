"""Operands and cases that several benchmarks share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Compare = Callable[..., None]
INT8 = (-128, 127)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
granularities = pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])


def operands(rows: int, columns: int, per_channel: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a scale that clips about 1 % of it, zero points; per channel means per row."""
    x = torch.randn(rows, columns).to(dtype)
    scale = (2.6 / 127) * (0.9 + 0.2 * torch.rand(rows if per_channel else 1))
    return x, scale, torch.zeros(scale.shape, dtype=torch.int32)


def as_granularity(t: Tensor) -> Tensor:
    return t.view(-1, 1) if t.numel() > 1 else t
