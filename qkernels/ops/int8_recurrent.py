"""The steps of a recurrent layer whose hidden state is multiplied by int8 weights, a whole sequence in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import library, recurrent_checks, samples
from ..reference import int8_gemm
from ..reference import int8_recurrent as reference


def _samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() != 2 or x.dtype != torch.float32 or 0 in x.shape:
        return
    n, hidden = x.shape
    generator = torch.Generator().manual_seed(0)
    for mode, gates in recurrent_checks.GATES.items():
        codes = samples.codes(gates * hidden, hidden)
        data, colsum = int8_gemm.int8_pack(codes)
        states = torch.rand(recurrent_checks.STATES[mode], n, hidden, generator=generator) - 0.5
        states[0] = x
        parts = torch.randn(3 * n, gates * hidden, generator=generator)
        scale, bias = torch.full((gates * hidden,), 0.02 / hidden**0.5), torch.linspace(-1, 1, gates * hidden)
        plain, step = (None, None, *samples.INT8), torch.tensor([1 / 127])
        cell: tuple[Any, ...] = (None, None, -8, 7)
        weight = data, colsum, scale
        yield parts, states, [], mode, *weight, bias, False, *plain, *cell, False
        zero_point = torch.tensor([5], dtype=torch.int32)
        cell = (torch.tensor([0.25]), None, -8, 7) if mode == "LSTM" else cell
        sizes = [n, (n + 1) // 2, 1]
        some = parts[: sum(sizes)]
        for reverse in (False, True):
            of_h = step, zero_point, *samples.INT8
            yield some, states, sizes, mode, *weight, None, False, *of_h, *cell, reverse
        yield parts, states, [], mode, *weight, bias, True, *plain, *cell, True


def _fake(gates: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return gates.new_empty((gates.shape[0], states.shape[2])), torch.empty_like(
        states, memory_format=torch.contiguous_format
    )


int8_recurrent_op = library.define(
    "int8_recurrent",
    "(Tensor gates, Tensor states, SymInt[] sizes, str mode, Tensor data, Tensor colsum, Tensor scale, Tensor? bias, "
    "bool float_hidden, Tensor? hidden_scale, Tensor? hidden_zero_point, SymInt quant_min, SymInt quant_max, "
    "Tensor? cell_scale, Tensor? cell_zero_point, SymInt cell_min, SymInt cell_max, bool reverse) "
    "-> (Tensor y, Tensor last)",
    reference.int8_recurrent,
    _fake,
    cpu=("amx", "avx512vnni", "avx2", "scalar"),
    samples=_samples,
)


def int8_recurrent(
    gates: Tensor,
    states: Tensor,
    mode: str,
    data: Tensor,
    colsum: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int] = (),
    float_hidden: bool = False,
    hidden_scale: Tensor | None = None,
    hidden_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    cell_scale: Tensor | None = None,
    cell_zero_point: Tensor | None = None,
    cell_min: int = -128,
    cell_max: int = 127,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One direction of one layer of an LSTM, GRU or RNN, from the gates of its inputs on.

    Each step multiplies the codes of the hidden state h by the weight, exactly in int32, scales as ``qk.int8_linear``
    does, adds the gates of the inputs, and computes the new states in fp32 as torch's layers define them. The functions
    sigmoid and tanh are within 5 units in the last place.

    Args:
        gates: [rows, gates·H] fp32, inputs times their weight and with their bias, the rows of one step after those of
            another; gates are in torch's order.
        states: [states, N, H] fp32: h and, of an LSTM, c before the first step.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU": 4, 3, 1, 1 gates and 2, 1, 1, 1 states.
        data, colsum, scale: the weight [gates·H, H], as ``PackedInt8`` holds it.
        bias: [gates·H], floating.
        sizes: the rows of each step, which do not grow, as in a PackedSequence; none, or [N]: N rows each.
        float_hidden: whether h is not quantized. It is then rounded to 24 bits below the largest of its row, as exact
            as sums in fp32 are, and multiplied as three codes for each element.
        hidden_scale, hidden_zero_point, quant_min, quant_max: how h is quantized, as the input of ``qk.int8_linear``;
            without a scale each row has its own.
        cell_scale, cell_zero_point, cell_min, cell_max: if given, a step reads c fake-quantized by them.
        reverse: whether steps run from the last to the first.

    Returns:
        h of all steps [rows, H], in the order of gates, and the last states [states, N, H]. Not differentiable.

    Raises:
        RuntimeError: another shape, dtype or range.
    """
    rows = list(sizes) or [states.shape[1]]  # AOTInductor hands no empty list to an op
    result: tuple[Tensor, Tensor] = int8_recurrent_op(
        gates, states, rows, mode, data, colsum, scale, bias, float_hidden, hidden_scale, hidden_zero_point,
        quant_min, quant_max, cell_scale, cell_zero_point, cell_min, cell_max, reverse,
    )  # fmt: skip
    return result
