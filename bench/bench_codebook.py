"""Non-uniform quantization of weights in blocks of 64 against the formula in eager torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
from laps import forward_backward
from operands import dtypes
from torch import Tensor

import qkernels as qk
from qkernels.reference import codebook as reference

Compare = Callable[..., None]
sizes = pytest.mark.parametrize("levels", [16, 256])


def operands(levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch._dynamo.reset()  # the peer is compiled anew for each case, more often than one function may be
    x = torch.randn(1024, 1024).to(dtype)
    scale = x.float().abs().reshape(1024, -1, 64).amax(-1)
    return x, scale, qk.codebooks.normal_float(levels.bit_length() - 1)


@sizes
@dtypes
def test_forward(compare: Compare, dtype: torch.dtype, levels: int) -> None:
    args = operands(levels, dtype)
    fused = peers.compiled(peers.codebook_bucketize)
    competitors = {
        "eager bucketize": lambda: peers.codebook_bucketize(*args),
        "compile": peers.find("torch.compile", lambda: lambda: fused(*args)),
    }
    if levels == 16:  # distances to 256 levels would take 1 GiB
        competitors["eager argmin"] = lambda: peers.codebook_argmin(*args)
    with torch.no_grad():
        expected = reference.fake_quantize_codebook_forward(*args)
        compare(lambda: qk.fake_quantize_codebook(*args), competitors, expected)


@sizes
def test_learned(compare: Compare, levels: int) -> None:
    """Gradients of weight, scales and codebook."""
    args = [t.requires_grad_() for t in operands(levels, torch.float32)]
    data = [t.detach() for t in args]
    grad = torch.randn(args[0].shape)
    fused = peers.compiled(peers.codebook_bucketize)
    expected = reference.fake_quantize_codebook_learnable_backward(grad, *data, 1.0, True)
    compare(
        forward_backward(lambda: qk.fake_quantize_codebook(*args), args, grad),
        {
            "eager bucketize": forward_backward(lambda: peers.codebook_bucketize(*args), args, grad),
            "compile": peers.find("torch.compile", lambda: forward_backward(lambda: fused(*args), args, grad)),
        },
        (reference.fake_quantize_codebook_forward(*data), *expected),
        tolerance=1e-4,
    )
