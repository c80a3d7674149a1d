"""Codebooks for ``fake_quantize_codebook``: ascending fp32 levels, divided by the largest magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _codebook(levels: Sequence[float] | Tensor, signed: bool = False) -> Tensor:
    """The distinct levels, with their negatives if signed, ascending, divided by the largest magnitude."""
    t = torch.as_tensor(levels, dtype=torch.float32)
    t = torch.unique(torch.cat([-t, t]) if signed else t)
    return t / t.abs().max() + 0.0  # turns −0 into 0


def normal_float(bits: int) -> Tensor:
    """NormalFloat: 2**bits levels with equally many standard normal values each, and an exact 0.

    The levels are quantiles of the normal distribution: at 2**(bits−1) + 1 probabilities from 1/2 up for the positive
    side, at one fewer for the negative side. The last probability is below 1 by the mean of 1/2**(bits+1) and
    1/(2**(bits+1) − 2) (QLoRA, arXiv 2305.14314, section 3).

    Args:
        bits: 2 to 8.

    Returns:
        The levels in ascending order, fp32, the largest magnitude 1.

    Raises:
        ValueError: bits is not 2 to 8.
    """
    _check_bits(bits, 2, 8)
    half = 2 ** (bits - 1)
    # This gives the published NF4 bit for bit: 7 digits of the end; probabilities and the final division in fp32.
    end = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)
    positive, negative = (torch.special.ndtri(torch.linspace(end, 0.5, n).double()[:-1]) for n in (half + 1, half))
    return _codebook(torch.cat([-negative, torch.zeros(1), positive]))


def nf4() -> Tensor:
    """The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E). NF4's scales are the absmax of blocks of 64."""
    return normal_float(4)


def fp4_e2m1() -> Tensor:
    """The 15 values of the 4-bit float E2M1, 0 to ±6 before scaling (OCP Microscaling Formats 1.0)."""
    return _codebook([0, 0.5, 1, 1.5, 2, 3, 4, 6], signed=True)


def powers_of_two(bits: int, signed: bool = True) -> Tensor:
    """0 and 1, 1/2, 1/4, …: as many levels as bits encode (LogQuant, arXiv 1603.01025; INQ, arXiv 1702.03044).

    Args:
        bits: 2 to 8; if not signed 1 to 7, where 7 reach the smallest normal fp32.
        signed: True: the levels are ±2**−i for i < 2**(bits−1) − 1. False: 2**−i for i < 2**bits − 1.

    Returns:
        The levels in ascending order, with 0, fp32.

    Raises:
        ValueError: bits has another value.
    """
    _check_bits(bits, 1 + signed, 7 + signed)
    return _codebook([0.0, *(2.0**-i for i in range(2 ** (bits - signed) - 1))], signed)


def apot(bits: int, k: int = 2, signed: bool = True) -> Tensor:
    """Additive powers of two (APoT, arXiv 1909.13144): sums of n terms, each 0 or one of 2**k − 1 powers of two.

    The bits without the sign make n = bits // k terms of k bits, and a shorter term of the remaining bits. The terms
    get the exponents −1, −2, −3, … in turn; the shorter term gets one in the last rounds only.

    Args:
        bits: 2 (signed: 3) to 8.
        k: bits of a term, at least 1; 1 gives uniform levels.
        signed: whether one bit is the sign.

    Returns:
        The levels in ascending order, fp32, the largest magnitude 1.

    Raises:
        ValueError: bits or k has another value.
    """
    _check_bits(bits, 2 + signed, 8)
    magnitude_bits = bits - signed
    if not 1 <= k <= magnitude_bits:
        raise ValueError(f"k: got {k}; accepted: 1 to {magnitude_bits}, the bits of the magnitude")
    terms: list[list[float]] = [[0.0] for _ in range(magnitude_bits // k)]
    shorter: list[float] = [0.0]
    exponent, rounds = 0, 2**k - 1
    for turn in range(rounds):
        takes_part = turn >= rounds - (2 ** (magnitude_bits % k) - 1)
        for term in [shorter, *terms] if takes_part else terms:
            exponent -= 1
            term.append(2.0**exponent)
    sums = torch.zeros(1, dtype=torch.float64)
    for term in [shorter, *terms]:
        sums = (sums[:, None] + torch.tensor(term, dtype=torch.float64)).reshape(-1)
    return _codebook(sums, signed)


def _check_bits(bits: int, low: int, high: int) -> None:
    if not low <= bits <= high:
        raise ValueError(f"bits: got {bits}; accepted: {low} to {high}")


@torch.no_grad()
def kmeans(x: Tensor, levels: int, *, weight: Tensor | None = None, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Codebook and scale (one element) for the values of x by k-means (Lloyd, IEEE Trans. Inf. Theory 28, 1982).

    Args:
        x: finite values, any shape.
        levels: 2 to 256.
        weight: how much each value counts, x's shape, not negative (e.g. squared gradients); None: all the same.
        iterations: rounds of Lloyd's algorithm, none of which raises the (weighted) squared error.

    Returns:
        codebook ``[levels]`` and scale ``[1]``, fp32, for ``fake_quantize_codebook(x, scale, codebook)``; their product
        is the levels found. The density of the first levels is the cube root of that of the values, which is best for
        many levels (Panter and Dite, Proc. IRE 39, 1951). A level that is nearest to no value does not move.

    x is sorted once; the time of a round then depends on the number of levels, not on the size of x.

    Raises:
        ValueError: x is empty or not finite, or levels or weight has another form.
    """
    if not 2 <= levels <= 256:
        raise ValueError(f"levels: got {levels}; accepted: 2 to 256")
    if weight is not None and (weight.shape != x.shape or not bool((weight >= 0).all() & (weight > 0).any())):
        raise ValueError(f"weight: accepted: x's shape {list(x.shape)}, not negative and not all zero")
    if x.numel() == 0 or not bool(x.isfinite().all()):
        raise ValueError("x: got no values, or one that is NaN or infinite; accepted: finite values")
    values, order = torch.sort(x.reshape(-1).float())
    values = values.double()
    shares = torch.ones_like(values) if weight is None else weight.reshape(-1)[order].double()
    # For each value the sums of the weights and of the weighted values before it.
    sums = torch.nn.functional.pad(torch.cumsum(torch.stack([shares, shares * values]), 1), (1, 0))
    best = _lloyd(values, sums, _start(values, sums[0], levels), iterations)
    scale = best.abs().max()
    return (best / torch.where(scale > 0, scale, 1)).float(), scale.float().reshape(1)


def _start(values: Tensor, mass: Tensor, levels: int) -> Tensor:
    """Levels at equal steps of ∫ density^(1/3), which between quantiles of equal mass is Σ gap^(2/3)."""
    shares = torch.linspace(0, 1, 4097, dtype=torch.float64, device=values.device)
    quantiles = values[(torch.searchsorted(mass, shares * mass[-1]) - 1).clamp(0, len(values) - 1)]
    integral = torch.nn.functional.pad(torch.cumsum(torch.diff(quantiles) ** (2 / 3), 0), (1, 0))
    wanted = (torch.arange(levels, dtype=torch.float64, device=values.device) + 0.5) / levels * integral[-1]
    at = torch.searchsorted(integral, wanted).clamp(1, len(integral) - 1)
    part = (wanted - integral[at - 1]) / (integral[at] - integral[at - 1])
    return torch.lerp(quantiles[at - 1], quantiles[at], part.nan_to_num(0.0))


def _lloyd(values: Tensor, sums: Tensor, levels: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        ends = torch.searchsorted(values, (levels[:-1] + levels[1:]) / 2, right=True)
        ends = torch.nn.functional.pad(ends, (1, 1))
        ends[-1] = len(values)
        mass, moment = torch.diff(sums[:, ends])
        levels = torch.where(mass > 0, moment / mass, levels).cummax(0).values
    return levels
