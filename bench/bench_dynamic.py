"""Ranges from x itself against torchao's formula in eager torch and torch.compile; codes against torch's own."""

from __future__ import annotations

import peers
import pytest
import torch
from laps import forward_backward
from operands import INT8, Compare, dtypes

import qkernels as qk
from qkernels.reference import dynamic as reference


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, -1)], ids=["int4-group-32", "int8-per-token"])
@dtypes
def test_forward_backward(compare: Compare, dtype: torch.dtype, bits: int, group_size: int) -> None:
    x = torch.randn(1024, 1024).to(dtype).requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    size = x.shape[-1] if group_size == -1 else group_size
    fused = peers.compiled(peers.dynamic)
    quant_min, quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = reference.fake_quantize_dynamic_forward(x.detach(), group_size, quant_min, quant_max, True)[0]
    compare(
        forward_backward(lambda: qk.fake_quantize_dynamic(x, bits=bits, group_size=group_size), [x], grad),
        {
            "eager": forward_backward(lambda: peers.dynamic(x, bits, size), [x], grad),
            "compile": peers.find("torch.compile", lambda: forward_backward(lambda: fused(x, bits, size), [x], grad)),
        },
        (expected, grad),
        peer_tolerance=0.35,  # torchao's scale differs by 7.5/7, and it gives the clipped maxima no gradient
    )


@dtypes
def test_codes(compare: Compare, dtype: torch.dtype) -> None:
    """int8 codes of each row, its scale, and zero points that are 0."""
    x = torch.randn(1024, 1024).to(dtype)
    fused = peers.compiled(peers.codes_of_rows)
    compare(
        lambda: qk.quantize_dynamic(x)[:2],
        {
            "eager": lambda: peers.codes_of_rows(x),
            "compile": peers.find("torch.compile", lambda: lambda: fused(x)),
        },
        reference.quantize_dynamic(x, -1, *INT8, True)[:2],
    )
