"""The functions of which every kernel has the same bits: right in fp64 terms, and their constants what they claim."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qkernels.reference import activation as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exponential(dtype: torch.dtype) -> None:
    c = reference.EXP[dtype]
    x = torch.cat([torch.linspace(c.low, c.high - 1, 100_001, dtype=dtype), torch.linspace(-1, 1, 10_001, dtype=dtype)])
    tolerance = 2**-23 if dtype == torch.float32 else 2**-51
    torch.testing.assert_close(reference.exp(x).double(), x.double().exp(), rtol=tolerance, atol=0)
    edges = torch.tensor([0.0, -0.0, 1e9, math.inf, math.nan], dtype=dtype)
    want = torch.tensor([1, 1, math.inf, math.inf, math.nan], dtype=dtype)
    torch.testing.assert_close(reference.exp(edges), want, rtol=0, atol=0, equal_nan=True)
    assert 0 < reference.exp(torch.tensor(-math.inf, dtype=dtype)) < 1e-37


def test_the_constants_are_numbers_of_their_dtype() -> None:
    c = reference.EXP[torch.float32]
    for value in (c.low, c.high, c.log2e, c.ln2_high, c.ln2_low, *c.coefficients):
        assert torch.tensor(value).item() == value
    for dtype, digits in ((torch.float32, 24), (torch.float64, 53)):
        c = reference.EXP[dtype]
        steps = (c.exponent_bias + 1) * c.ln2_high * 2.0 ** (digits - c.exponent_bias.bit_length())
        assert steps == int(steps), "n·ln2_high is exact"
    for value in (reference.SQRT_HALF, reference.GELU_STEP, *reference.GELU):
        assert torch.tensor(value).item() == value


def test_gelu() -> None:
    x = torch.linspace(-12, 12, 1_000_001)
    torch.testing.assert_close(reference.gelu(x).double(), F.gelu(x.double()), rtol=0, atol=4e-7)
    small = torch.linspace(-1e-3, 1e-3, 100_001)
    torch.testing.assert_close(reference.gelu(small).double(), F.gelu(small.double()), rtol=2**-20, atol=0)


def test_gates() -> None:
    """Products with sigmoid and tanh by one division: relative errors, also where the functions are tiny."""
    x = torch.cat(
        [torch.linspace(-20, 20, 200_001), torch.linspace(-1e-3, 1e-3, 10_001), torch.tensor([1e-30, -1e-30])]
    )
    other, exact = x.flip(0), x.double()
    for got, want in (
        (reference.expm1(-x.abs()), torch.expm1(-exact.abs())),
        (reference.tanh(x), exact.tanh()),
        (reference.times_sigmoid(other, x), other.double() * exact.sigmoid()),
        (reference.tanh_times_sigmoid(x, other), exact.tanh() * other.double().sigmoid()),
    ):
        torch.testing.assert_close(got.double(), want, rtol=5 * 2**-24, atol=0)
    edges = torch.tensor([math.inf, -math.inf, 100.0, math.nan])
    torch.testing.assert_close(reference.tanh(edges), edges.tanh(), rtol=0, atol=0, equal_nan=True)
