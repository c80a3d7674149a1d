"""Codes of given scales and back, against torch's quantized tensors."""

from __future__ import annotations

import peers
import torch
from operands import Compare, as_granularity, dtypes, granularities, operands

import qkernels as qk
from qkernels.reference import quantize as reference


@granularities
@dtypes
def test_quantize(compare: Compare, dtype: torch.dtype, per_channel: bool) -> None:
    """torch quantizes fp32 alone; the formula in eager torch takes both."""
    x, scale, zero_point = operands(256, 1024, per_channel, dtype)
    spread = as_granularity(scale)

    def torchs() -> torch.Tensor:
        if per_channel:
            return torch.quantize_per_channel(x, scale, zero_point, 0, torch.qint8).int_repr()
        return torch.quantize_per_tensor(x, scale, zero_point, torch.qint8).int_repr()

    compare(
        lambda: qk.quantize(x, spread),
        {
            "torch": peers.find(f"torch.quantize of {dtype}", lambda: torchs),
            "eager": lambda: (x * (1 / spread)).round().clamp(-128, 127).to(torch.int8),
        },
        reference.quantize(x, spread, None, -128, 127, torch.int8),
    )


@granularities
def test_dequantize(compare: Compare, per_channel: bool) -> None:
    x, scale, zero_point = operands(256, 1024, per_channel, torch.float32)
    spread = as_granularity(scale)
    q = qk.quantize(x, spread)
    if per_channel:
        held = torch._make_per_channel_quantized_tensor(q, scale.double(), zero_point.long(), 0)
    else:
        held = torch._make_per_tensor_quantized_tensor(q, scale.item(), 0)
    compare(
        lambda: qk.dequantize(q, spread),
        {"torch": held.dequantize, "eager": lambda: q * spread},
        reference.dequantize(q, spread, None, torch.float32),
    )
