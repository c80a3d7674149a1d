"""Sums, means and maxima of bags of rows of an int8 table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import embedding_checks, library, samples
from ..reference import int8_embedding_bag as reference


def _samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() != 2 or x.dtype != torch.float32 or 0 in x.shape:
        return
    rows, columns = x.shape
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(rows, (9,), generator=generator)
    data, zero_point = samples.codes(rows, columns), samples.codes(rows, 1)
    scale = torch.rand(rows, 1, generator=generator) / 100
    offsets = torch.tensor([0, 4, 4, 7])
    yield data, scale, zero_point, indices, offsets, torch.rand(9, generator=generator), "sum", -1, False
    for mode in embedding_checks.MODES:
        last = torch.tensor([0, 3, 9], dtype=torch.int32)
        yield data, scale.bfloat16(), None, indices.int(), last, None, mode, 0, True


def _fake(
    data: Tensor, scale: Tensor, zero_point: Any, indices: Tensor, offsets: Tensor, weights: Any, mode: str,
    padding_idx: int, include_last_offset: bool,
) -> Tensor:  # fmt: skip
    bags = offsets.shape[0] - int(include_last_offset)
    return data.new_empty((bags, data.shape[1]), dtype=torch.float32)


int8_embedding_bag_op = library.define(
    "int8_embedding_bag",
    "(Tensor data, Tensor scale, Tensor? zero_point, Tensor indices, Tensor offsets, Tensor? weights, str mode, "
    "SymInt padding_idx, bool include_last_offset) -> Tensor",
    reference.int8_embedding_bag,
    _fake,
    cpu=("avx512", "avx2", "scalar"),
    samples=_samples,
    sums=(0,),
)


def int8_embedding_bag(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    mode: str = "sum",
    padding_idx: int = -1,
    include_last_offset: bool = False,
) -> Tensor:
    """``F.embedding_bag`` in a table of int8 codes, of which a row's values are (code − zero_point)·scale in fp32.

    Args:
        data: [R, D] int8.
        scale, zero_point: [R, G] fp32, bf16 or fp16, and int8; each is for D/G neighbouring columns.
        indices: [L] int32 or int64: the rows of all bags, one bag after the other.
        offsets: [B] int32 or int64: where each bag begins; with include_last_offset [B + 1], and the last bag ends at
            the last offset.
        weights: [L] floating: factors of the rows, with mode "sum" alone.
        mode: "sum", "mean" or "max"; an empty bag gives zeros.
        padding_idx: a row that bags leave out; −1: none.

    Returns:
        [B, D] fp32. Rows are added in fp32 in their order. Not differentiable.

    Raises:
        RuntimeError: another shape, dtype, index or offset.
    """
    result: Tensor = int8_embedding_bag_op(
        data, scale, zero_point, indices, offsets, weights, mode, padding_idx, include_last_offset
    )
    return result
