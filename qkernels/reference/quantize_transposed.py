"""Dynamic int8 quantization of a matrix along its rows and, as a transposed copy, along its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .dynamic import dynamic_qparams
from .quantize import quantize
from .stochastic import quantize_stochastic

ALIGNMENT = 16  # bytes; a row of codes that begins at a multiple is loaded in one piece by any matrix unit


def check(x: Tensor, quant_max: int) -> None:
    if x.dim() != 2:
        raise RuntimeError(f"x: got shape {list(x.shape)}; accepted: 2 dims")
    if not x.is_floating_point():
        raise RuntimeError(f"x: got {x.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16")
    if not 1 <= quant_max <= 127:
        raise RuntimeError(f"quant_max: got {quant_max}; accepted: 1 to 127")


def empty_codes(x: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] int8 whose rows begin at multiples of 16 bytes."""
    stride = (columns + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return x.new_empty_strided((rows, columns), (stride, 1), dtype=torch.int8)


def quantize_dynamic_transposed(
    x: Tensor, quant_max: int, seed: int | None, offset: int, offset_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales [rows, 1] of the rows of x, then those of the rows of x.t(); one draw serves both."""
    check(x, quant_max)
    x = x.contiguous()  # element i draws the i-th number: row by row, however x lies in memory

    def codes(scale: Tensor) -> Tensor:
        if seed is None:
            return quantize(x, scale, None, -quant_max, quant_max, torch.int8)
        return quantize_stochastic(
            x, scale, None, -quant_max, quant_max, seed, offset, offset_tensor, torch.int8
        )  # fmt: skip

    rows, columns = x.shape
    scale = dynamic_qparams(x, -1, -quant_max, quant_max, True)[0]
    scale_t = dynamic_qparams(x.t(), -1, -quant_max, quant_max, True)[0]
    q = empty_codes(x, rows, columns).copy_(codes(scale))
    return q, scale, empty_codes(x, columns, rows).copy_(codes(scale_t.t()).t()), scale_t
