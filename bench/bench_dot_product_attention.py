"""Attention in fp32 against torch's function, on q, k and v that lie side by side as one layer gives them."""

from __future__ import annotations

import pytest
import torch
from operands import Compare
from torch.nn import functional as F

import qkernels.ops  # noqa: F401  defines the ops

# batch, heads, rows, size of a head, causal
SHAPES = {
    "GPT, batch 1": (1, 12, 128, 64, True),
    "ViT-S, batch 1": (1, 6, 197, 64, False),
    "ViT-S, batch 16": (16, 6, 197, 64, False),
    "1024 rows": (1, 12, 1024, 64, True),
}


@pytest.mark.parametrize("case", SHAPES)
def test_attention(compare: Compare, case: str) -> None:
    batch, heads, rows, size, causal = SHAPES[case]
    q, k, v = torch.randn(batch, rows, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    scale = size**-0.5
    compare(
        lambda: torch.ops.qkernels.dot_product_attention(q, k, v, causal, scale),
        {"torch": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)},
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale),
        tolerance=1e-4,
    )
