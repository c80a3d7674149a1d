"""The rules of arguments of bags of rows; see ``checks``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gemm_checks
from .checks import require, values

MODES = ("sum", "mean", "max")


def _indices(name: str, t: Tensor) -> None:
    require(t.dtype in (torch.int32, torch.int64), f"{name}: got {t.dtype}; accepted: torch.int32, torch.int64")
    require(t.dim() == 1, f"{name}: got shape {list(t.shape)}; accepted: one dim")


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
) -> None:
    require(data.dtype == torch.int8, f"data: got {data.dtype}; accepted: torch.int8")
    require(
        data.dim() == 2 and data.is_contiguous(),
        f"data: got shape {list(data.shape)}; accepted: contiguous [rows, columns]",
    )
    gemm_checks.devices(
        data, "data", scale=scale, zero_point=zero_point, indices=indices, offsets=offsets, weights=weights
    )
    rows, columns = data.shape
    gemm_checks.scale_dtype("scale", scale)
    fits = scale.dim() == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and columns % scale.shape[1] == 0
    require(
        fits and scale.is_contiguous(),
        f"scale: got shape {list(scale.shape)}; accepted: contiguous [rows, groups] for data's shape "
        f"{list(data.shape)}",
    )
    if zero_point is not None:
        require(zero_point.dtype == torch.int8, f"zero_point: got {zero_point.dtype}; accepted: torch.int8")
        require(
            zero_point.shape == scale.shape and zero_point.is_contiguous(),
            f"zero_point: got shape {list(zero_point.shape)}; accepted: contiguous, of scale's shape "
            f"{list(scale.shape)}",
        )
    _indices("indices", indices)
    _indices("offsets", offsets)
    count = indices.shape[0]
    require(
        offsets.shape[0] >= int(include_last_offset),
        "offsets: got none; accepted: at least the last one, as include_last_offset says",
    )
    require(mode in MODES, f"mode: got {mode!r}; accepted: {', '.join(MODES)}")
    if weights is not None:
        require(mode == "sum", f"weights: got a tensor with mode={mode!r}; accepted: None")
        gemm_checks.vector("weights", weights, count, "[L]")
        values("weights", weights)
    require(-1 <= padding_idx < rows, f"padding_idx: got {padding_idx}; accepted: -1 to {rows - 1}")
    if data.device.type == "cpu":
        _values(indices.tolist(), offsets.tolist(), rows)


def _values(indices: list[int], offsets: list[int], rows: int) -> None:
    for index in indices:
        require(0 <= index < rows, f"indices: got {index}; accepted: 0 to {rows - 1}")
    before, count = 0, len(indices)
    for at, offset in enumerate(offsets):
        require(
            before <= offset <= count and (at > 0 or offset == 0),
            f"offsets: got {offset} at {at}; accepted: 0, and from there on at least the one before and at most the "
            f"number of indices, {count}",
        )
        before = offset
