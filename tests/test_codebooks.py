"""qkernels.codebooks: as published, of every width, and fitted to data."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels import codebooks

pytestmark = pytest.mark.sanitized

# Codebooks.

PUBLISHED_NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def test_nf4_is_as_published() -> None:
    assert codebooks.nf4().tolist() == [float(value) for value in PUBLISHED_NF4.split()]


def test_codebooks_by_hand() -> None:
    assert codebooks.powers_of_two(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert codebooks.powers_of_two(2, signed=False).tolist() == [0, 0.25, 0.5, 1]
    assert (codebooks.fp4_e2m1() * 12).tolist() == [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]
    # Signed, 4 bits: sums of {0, 1/2, 1/4, 1/16} and {0, 1/8}.
    # Unsigned: of {0, 1/2, 1/8, 1/32} and {0, 1/4, 1/16, 1/64}.
    half = [0, 1, 2, 3, 4, 6, 8, 10]
    torch.testing.assert_close(codebooks.apot(4)[7:] * 10, torch.tensor(half).float())
    sums = sorted({a + b for a in (0, 32, 8, 2) for b in (0, 16, 4, 1)})
    torch.testing.assert_close(codebooks.apot(4, signed=False) * 48, torch.tensor(sums).float())
    torch.testing.assert_close(codebooks.apot(5, k=1), torch.linspace(-1, 1, 31))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codebooks_of_every_width(bits: int) -> None:
    made = [codebooks.normal_float(bits), codebooks.powers_of_two(bits)]
    if bits < 8:
        made.append(codebooks.powers_of_two(bits, signed=False))
    for signed in (True, False):
        for k in range(1, bits - signed + 1):
            if bits - signed >= 2:
                made.append(codebooks.apot(bits, k, signed=signed))
    for codebook in made:
        assert codebook.dtype == torch.float32
        assert 2 <= len(codebook) <= 2**bits
        assert (codebook.diff() > 0).all()
        assert (codebook == 0).sum() == 1
        assert not codebook[codebook == 0].signbit()
        assert codebook.abs().max() == 1


def squared_error(x: Tensor, codebook: Tensor, scale: Tensor, weight: Tensor | None = None) -> float:
    y = qk.fake_quantize_codebook(x.double(), scale.double(), codebook.double())
    error = (y - x.double()).square()
    return float((error if weight is None else error * weight).sum())


@pytest.mark.parametrize("levels", [2, 3, 16, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_lowers_the_error(levels: int, weighted: bool) -> None:
    x = torch.cat([torch.randn(3000), torch.randn(200) * 9, torch.tensor([50.0])]).reshape(3, -1)
    weight = torch.rand(x.shape) if weighted else None
    errors = []
    for iterations in (0, 1, 2, 4, 8, 30, 100):
        codebook, scale = codebooks.kmeans(x, levels, weight=weight, iterations=iterations)
        assert codebook.shape == (levels,)
        assert codebook.abs().max() == 1
        assert (codebook.diff() >= 0).all()
        errors.append(squared_error(x, codebook, scale, weight))
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-6), errors
    if levels == 16:
        uniform = torch.linspace(-1, 1, 16)
        assert errors[-1] < 0.2 * squared_error(x, uniform, x.abs().max().reshape(1), weight)


def test_kmeans_finds_the_optimum_of_known_data() -> None:
    x = torch.tensor([[3.0, -1, 3, 7], [7, -1, 5, 5]])
    codebook, scale = codebooks.kmeans(x, 4)
    torch.testing.assert_close(codebook * scale, torch.tensor([-1.0, 3, 5, 7]))
    codebook, scale = codebooks.kmeans(torch.randn(200_000), 16)
    assert abs(squared_error(torch.randn(200_000), codebook, scale) / 200_000 - 0.0095) < 3e-4  # Lloyd–Max, 16 levels
    codebook, scale = codebooks.kmeans(torch.zeros(9), 4)
    assert (qk.fake_quantize_codebook(torch.zeros(9), scale, codebook) == 0).all()
