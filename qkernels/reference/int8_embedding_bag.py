"""Bags of rows of an int8 table in plain torch: the values of all rows, added to the bags that they are in."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import embedding_checks


def int8_embedding_bag(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    mode: str,
    padding_idx: int,
    include_last_offset: bool,
) -> Tensor:
    embedding_checks.int8_embedding_bag(
        data, scale, zero_point, indices, offsets, weights, mode, padding_idx, include_last_offset
    )
    index = indices.long()
    values = data[index].view(len(index), scale.shape[1], data.shape[1] // scale.shape[1]).float()
    if zero_point is not None:
        values = values - zero_point[index].float()[..., None]
    rows = (values * scale.detach()[index].float()[..., None]).flatten(1)
    if weights is not None:
        rows = rows * weights.detach().float()[:, None]
    bags = len(offsets) - int(include_last_offset)
    bag = torch.searchsorted(offsets.long().contiguous(), torch.arange(len(index), device=index.device), right=True) - 1
    bag = torch.where((index == padding_idx) | (bag < 0), bags, bag)  # one more bag takes what belongs to none
    if mode == "max":
        y = rows.new_full((bags + 1, data.shape[1]), -torch.inf).scatter_reduce_(
            0, bag[:, None].expand_as(rows), rows, "amax"
        )
    else:
        y = rows.new_zeros(bags + 1, data.shape[1]).index_add_(0, bag, rows)
    count = rows.new_zeros(bags + 1).index_add_(0, bag, torch.ones_like(bag, dtype=rows.dtype))[:bags, None]
    if mode == "mean":
        return y[:bags] / count.clamp(min=1)
    return torch.where(count > 0, y[:bags], 0)
