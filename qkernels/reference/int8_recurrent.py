"""The steps of a recurrent layer on int8 weights in plain torch: one product a step, then the gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import recurrent_checks
from .activation import relu, tanh, tanh_times_sigmoid, times_sigmoid
from .fake_quantize import fake_quantize_forward
from .int8_gemm import TINY, epilogue, int8_unpack, quantize_rows

LARGEST = 0x7F7F7F  # the largest integer whose three bytes are all codes


def lstm(x: Tensor, h: Tensor, states: Tensor) -> Tensor:
    i, f, g, o = (x + h).chunk(4, -1)
    c = times_sigmoid(states[1], f) + tanh_times_sigmoid(g, i)
    return torch.stack([tanh_times_sigmoid(c, o), c])


def gru(x: Tensor, h: Tensor, states: Tensor) -> Tensor:
    (rx, zx, nx), (rh, zh, nh) = x.chunk(3, -1), h.chunk(3, -1)
    n = tanh(nx + times_sigmoid(nh, rx + rh))
    return (n + times_sigmoid(states[0] - n, zx + zh))[None]


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "LSTM": lstm,
    "GRU": gru,
    "RNN_TANH": lambda x, h, states: tanh(x + h)[None],
    "RNN_RELU": lambda x, h, states: relu(x + h)[None],
}


def three_codes(h: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of floats in 24 bits, as three codes for each element, and the values [3, rows, 1] of their ones.

    An element is their sum to half of the least one, which is at most 2⁻²² of the largest element of its row.
    """
    amax = h.abs().amax(1, keepdim=True) if h.shape[1] else h.new_zeros(len(h), 1)
    bits = (amax / LARGEST).clamp(min=TINY).view(torch.int32) + 0x7FFFFF
    least = torch.where(amax.isfinite(), (bits & -0x800000).view(torch.float32), torch.nan)  # the next power of two
    q = (h * (1 / least)).round().clamp(-LARGEST, LARGEST)
    q = torch.where(q.isnan(), 0, q).int() + 0x808080
    codes = torch.stack([(q >> shift & 255) - 128 for shift in (16, 8, 0)])
    return codes.double(), torch.stack([least * 2.0**shift for shift in (16, 8, 0)])


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
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    hidden = hidden_scale, hidden_zero_point, quant_min, quant_max
    cell = cell_scale, cell_zero_point, cell_min, cell_max
    rows = recurrent_checks.int8_recurrent(
        gates, states, sizes, mode, data, colsum, scale, bias, float_hidden, *hidden, *cell
    )
    weight = int8_unpack(data, gates.shape[1], states.shape[2]).double().t()

    def product(h: Tensor) -> Tensor:
        if float_hidden:
            codes, unit = three_codes(h)
            high, middle, low = (codes @ weight).float() * scale.float() * unit
            y = high + middle + low
            return y if bias is None else y + bias.float()
        q, scale_h, zero_point = quantize_rows(h, *hidden)
        acc = (q.double() @ weight).long() - zero_point * colsum.long()
        return epilogue(acc, scale_h, scale, bias, "none", torch.float32, None, None)

    last, y = states.detach().clone(memory_format=torch.contiguous_format), gates.new_empty(len(gates), states.shape[2])
    parts = list(zip(gates.detach().split(rows), y.split(rows), rows, strict=True))
    for part, out, m in reversed(parts) if reverse else parts:
        read = last[:, :m]
        if cell_scale is not None:
            c = fake_quantize_forward(read[1], cell_scale, cell_zero_point, cell_min, cell_max)
            read = torch.stack([read[0], c])
        last[:, :m] = STEPS[mode](part, product(last[0, :m]), read)
        out.copy_(last[0, :m])
    return y, last
