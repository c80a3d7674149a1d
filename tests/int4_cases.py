"""Codes, scales and zero points of the int4 products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import paths_of
from torch import Tensor

from qkernels import layouts, library
from qkernels.ops.int4_gemm import PackedInt4

FORMS = ("symmetric", "zero points", "minima")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, N, K, group size: every number of rows of a tile, channels around a panel's 32, groups of every kind
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 5),
    (3, 33, 37, 37),
    (4, 31, 16, 16),
    (5, 40, 48, 24),
    (6, 5, 64, 16),
    (7, 70, 96, 32),
    (8, 65, 120, 40),
    (9, 32, 128, 64),
    (10, 64, 384, 128),
    (11, 17, 130, 130),
    (12, 100, 256, 256),
    (13, 33, 72, 72),
    (29, 34, 80, 16),
    (1, 130, 1056, 32),
    (2, 96, 4104, 4104),
    # What matrix tiles pay for: 3 blocks of 13 rows, of which the last two overlap, and groups that no tile divides.
    (37, 70, 600, 200),
    (20, 33, 1030, 1030),
]
EMPTY = [(0, 3, 32, 16), (3, 0, 32, 16), (3, 4, 0, 0), (0, 0, 0, 0)]


@pytest.fixture(params=[*paths_of("int4_linear"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def ran(kernel: str) -> bool:
    return kernel == "reference" or f"cpu_{library.host.last_isa()}" == kernel


def codes(*shape: int, low: int = -8, high: int = 7) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def parts(n: int, k: int, group_size: int, form: str, dtype: torch.dtype = torch.float32, bits: int = 4) -> tuple:
    """q, scale of either sign, zero point and minimum."""
    low, high = layouts.code_range(bits)
    groups = k // group_size if k else 1
    scale = ((torch.rand(n, groups) + 0.1) * torch.where(torch.rand(n, groups) < 0.2, -0.01, 0.01)).to(dtype)
    zero_point = codes(n, groups, low=low, high=high) if form == "zero points" else None
    minimum = (torch.randn(n, groups) * 0.1).to(dtype) if form == "minima" else None
    return codes(n, k, low=low, high=high), scale, zero_point, minimum


def pack(q: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> PackedInt4:
    packed = PackedInt4.from_quantized(q, scale, zero_point, minimum=minimum)
    assert isinstance(packed, PackedInt4)
    return packed


def in_order(
    a: Tensor, scale_x: Tensor, zero_x: int, q: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None
) -> Tensor:
    """The docstring's arithmetic, spelled out here and not shared with the reference: int64 sums, fp32 steps."""
    n, groups = scale.shape
    size = q.shape[1] // groups
    s, y = scale.float(), torch.zeros(a.shape[0], n)
    for g in range(groups):
        rows, weights = (t[:, g * size : (g + 1) * size].long() for t in (a, q))
        if zero_point is None and minimum is None:
            y = y + s[:, g] * (rows[:, None] * weights).sum(-1).float()
            continue
        offset = -(zero_point[:, g].float() + 8) * s[:, g] if minimum is None else minimum[:, g].float()
        y = y + offset * rows.sum(1, keepdim=True).float()
        y = y + s[:, g] * (rows[:, None] * (weights + 8)).sum(-1).float()
    if zero_x:
        y = y - zero_x * pack(q, scale, zero_point, minimum).weight_sum
    return y * scale_x


def exact_weight(q: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> Tensor:
    size = q.shape[1] // scale.shape[1]
    s = scale.double().repeat_interleave(size, 1)
    if minimum is not None:
        return (q.double() + 8) * s + minimum.double().repeat_interleave(size, 1)
    return (q.double() - (0 if zero_point is None else zero_point.double().repeat_interleave(size, 1))) * s
