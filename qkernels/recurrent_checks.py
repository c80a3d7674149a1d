"""The rules of arguments of the steps of recurrent layers; see ``checks``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gemm_checks
from .checks import int8_range, require, values

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
STATES = {"LSTM": 2, "GRU": 1, "RNN_TANH": 1, "RNN_RELU": 1}


def floats(name: str, t: Tensor, dims: int, shape: str) -> None:
    require(t.dtype == torch.float32, f"{name}: got {t.dtype}; accepted: torch.float32")
    require(t.dim() == dims, f"{name}: got shape {list(t.shape)}; accepted: {shape}")


def rows_of_steps(sizes: Sequence[int], rows: int, n: int) -> list[int]:
    """The rows of each step: the given ones, or n each if none are given, or n alone."""
    if not sizes or list(sizes) == [n]:
        require(
            (rows % n == 0) if n else rows == 0,
            f"gates: got {rows} rows; accepted: a multiple of the {n} rows of states, or sizes",
        )
        return [n] * (rows // n) if n else []
    falls = all(before >= after >= 1 for before, after in zip([n, *sizes], sizes, strict=False))
    require(falls, f"sizes: got {list(sizes)}; accepted: from at most {n}, the rows of states, down to at least 1")
    require(sum(sizes) == rows, f"sizes: got a sum of {sum(sizes)}; accepted: the rows of gates, {rows}")
    return list(sizes)


def _hidden(
    float_hidden: bool, scale: Tensor | None, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> None:
    if float_hidden:
        none = scale is None and zero_point is None
        return require(none, "hidden_scale, hidden_zero_point: got a tensor with float_hidden; accepted: None")
    if scale is not None:
        return gemm_checks.static("hidden", scale, zero_point, quant_min, quant_max)
    require(zero_point is None, "hidden_zero_point: got a tensor without hidden_scale; accepted: both, or neither")
    int8_range(quant_min, quant_max)


def int8_recurrent(
    gates: Tensor,
    states: Tensor,
    sizes: Sequence[int],
    mode: str,
    data: Tensor,
    colsum: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    float_hidden: bool,
    hidden_scale: Tensor | None,
    hidden_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    cell_scale: Tensor | None,
    cell_zero_point: Tensor | None,
    cell_min: int,
    cell_max: int,
) -> list[int]:
    """Checks the arguments and returns the rows of each step."""
    require(mode in GATES, f"mode: got {mode!r}; accepted: {', '.join(GATES)}")
    floats("gates", gates, 2, "[rows, gates·H]")
    floats("states", states, 3, f"[{STATES[mode]}, N, H]")
    gemm_checks.devices(
        gates, "gates", states=states, data=data, colsum=colsum, scale=scale, bias=bias, hidden_scale=hidden_scale,
        hidden_zero_point=hidden_zero_point, cell_scale=cell_scale, cell_zero_point=cell_zero_point,
    )  # fmt: skip
    count, n, hidden = states.shape
    require(count == STATES[mode], f"states: got shape {list(states.shape)}; accepted: [{STATES[mode]}, N, H]")
    width = GATES[mode] * hidden
    require(gates.shape[1] == width, f"gates: got shape {list(gates.shape)}; accepted: [rows, {width}]")
    gemm_checks.max_k("states", hidden)
    gemm_checks.vector("scale", scale, width, "[N]")
    values("scale", scale)
    gemm_checks.bias_of(bias, width)
    gemm_checks.vector("colsum", colsum, width, "[N]")
    gemm_checks.int32_sums("colsum", colsum)
    gemm_checks.int8_data(data, width, hidden)
    _hidden(float_hidden, hidden_scale, hidden_zero_point, quant_min, quant_max)
    if cell_scale is not None:
        require(mode == "LSTM", f"cell_scale: got a tensor with mode={mode!r}; accepted: None")
        gemm_checks.static("cell", cell_scale, cell_zero_point, cell_min, cell_max)
    return rows_of_steps(sizes, gates.shape[0], n)
