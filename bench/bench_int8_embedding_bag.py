"""Bags of rows of an int8 table, against torch's fp32 embedding_bag and its 8-bit one, embedding_bag_byte."""

from __future__ import annotations

import pytest
import torch
from operands import Compare
from torch import nn

import qkernels as qk


@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize(("rows", "bags", "length"), [(1_000_000, 512, 20), (1000, 64, 20), (1000, 1, 20)])
def test_bags(compare: Compare, rows: int, bags: int, length: int, columns: int) -> None:
    """A table that no cache holds, and one that does; sums of rows that lie anywhere."""
    bag = nn.EmbeddingBag(rows, columns, mode="sum")
    made = qk.nn.Int8EmbeddingBag.from_float(bag)
    indices, offsets = torch.randint(rows, (bags * length,)), torch.arange(0, bags * length, length)
    bytes_of = torch.ops.quantized.embedding_bag_byte_prepack(bag.weight.detach())
    ops = torch.ops.quantized
    with torch.no_grad():
        compare(
            lambda: made(indices, offsets),
            {
                "fp32": lambda: bag(indices, offsets),
                "embedding_bag_byte": lambda: ops.embedding_bag_byte_rowwise_offsets(bytes_of, indices, offsets),
            },
            bag(indices, offsets),
            tolerance=0.02,
            peer_tolerance=0.05,
        )
