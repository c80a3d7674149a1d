"""An LSTM of two layers of 512 units on int8 weights, against torch's dynamic int8 LSTM and fp32."""

from __future__ import annotations

import peers
import pytest
import torch
from operands import Compare
from torch import nn

import qkernels as qk


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("hidden", ["codes", "float"])
def test_lstm(compare: Compare, batch: int, hidden: str) -> None:
    """128 steps. codes: inputs and hidden states are quantized per token, as torch's per tensor; float: neither is.

    A state in float is multiplied as three codes for each element.
    """
    layer, x = nn.LSTM(512, 512, 2), torch.randn(128, batch, 512)
    made = qk.nn.Int8LSTM.from_float(layer, act_bits=8 if hidden == "codes" else 16)
    with torch.no_grad():
        compare(
            lambda: made(x)[0],
            peers.lstm(layer, x),
            layer(x)[0],
            tolerance=0.02,
            peer_tolerance=0.05,
            blocks=5,
        )
