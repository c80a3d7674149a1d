"""The scale of what a training step quantizes, from its range, against amin, amax and the formula."""

from __future__ import annotations

import pytest
import torch
from operands import Compare
from torch import Tensor

from qkernels.ops.follow_range import follow_range


@pytest.mark.parametrize("shape", [(1,), (512, 1), (1, 4608)], ids=["per tensor", "per row", "per column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_follow_range(compare: Compare, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The scale of what a training step quantizes, from its range."""
    x, scale = torch.randn(512, 4608).to(dtype), torch.ones(shape)
    dims = [dim for dim, size in enumerate(shape) if size == 1] if len(shape) > 1 else None

    def ours() -> Tensor:
        follow_range(x, scale, quant_min=-127, quant_max=127)
        return scale

    def eager() -> Tensor:
        low, high = (end.float().reshape(shape) for end in (torch.amin(x, dims or ()), torch.amax(x, dims or ())))
        return torch.maximum(-low, high) / 127

    compare(ours, {"amin, amax and the formula": eager}, eager())
