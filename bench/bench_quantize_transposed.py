"""Codes of rows and of columns in one op, against two calls of quantize_dynamic and against the formula."""

from __future__ import annotations

import peers
import pytest
import torch
from operands import Compare, dtypes
from torch import Tensor

import qkernels as qk
from qkernels.reference import quantize_transposed as reference


def both(x: Tensor) -> tuple[Tensor, ...]:
    return *peers.codes_of_rows(x), *peers.codes_of_rows(x.t().contiguous())


@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 256)], ids=["1024x1024", "4096x256"])
@dtypes
def test_quantize(compare: Compare, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).to(dtype)
    fused = peers.compiled(both)
    compare(
        lambda: qk.quantize_dynamic_transposed(x),
        {
            "quantize_dynamic twice": lambda: (
                *qk.quantize_dynamic(x)[:2],
                *qk.quantize_dynamic(x.t().contiguous())[:2],
            ),
            "eager": lambda: both(x),
            "compile": peers.find("torch.compile", lambda: lambda: fused(x)),
        },
        reference.quantize_dynamic_transposed(x, 127, None, 0, None),
    )
