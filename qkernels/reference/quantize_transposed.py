"""Dynamic int8 quantization of a matrix along its rows and, as a transposed copy, along its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, layouts
from .dynamic import dynamic_qparams
from .quantize import quantize
from .stochastic import quantize_stochastic


def quantize_dynamic_transposed(
    x: Tensor, quant_max: int, seed: int | None, offset: int, offset_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales [rows, 1] of x's rows, then of those of x.t(); one random number per element serves both."""
    checks.quantize_transposed(x, quant_max)
    x = x.contiguous()  # element i, counted row by row, draws the i-th number, whatever x's strides

    def codes(scale: Tensor) -> Tensor:
        if seed is None:
            return quantize(x, scale, None, -quant_max, quant_max, torch.int8)
        return quantize_stochastic(
            x, scale, None, -quant_max, quant_max, seed, offset, offset_tensor, torch.int8
        )  # fmt: skip

    rows, columns = x.shape
    scale = dynamic_qparams(x, -1, -quant_max, quant_max, True)[0]
    scale_t = dynamic_qparams(x.t(), -1, -quant_max, quant_max, True)[0]
    q = layouts.empty_aligned_rows(x, rows, columns).copy_(codes(scale))
    return q, scale, layouts.empty_aligned_rows(x, columns, rows).copy_(codes(scale_t.t()).t()), scale_t
