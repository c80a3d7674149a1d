"""Codes, layouts and arguments of the int8 products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import paths_of
from torch import Tensor

from qkernels import library

SHAPES = [
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (1, 1, 1),
    (1, 33, 31),
    (2, 3, 5),
    (3, 32, 64),
    (4, 31, 63),
    (5, 70, 129),
    (13, 33, 67),
    (16, 64, 130),
    (17, 5, 3),
    (31, 65, 257),
    (37, 70, 270),  # 3 blocks of 13 rows, of which the last two overlap, and tiles of 56 codes that end beyond K
    (64, 96, 200),
    (9, 200, 101),  # packed 4 panels and then 3 at once, 64, 32 and 5 k
    (2, 130, 300),
]
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32 = torch.iinfo(torch.int32)


@pytest.fixture(params=[*paths_of("int8_mm"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def ran(kernel: str) -> bool:
    return kernel == "reference" or f"cpu_{library.host.last_isa()}" == kernel


def codes(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """int64 sums by another way than the reference's."""
    return (a.long()[:, :, None] * b.long()[None]).sum(1)


def layouts(rows: int, cols: int) -> dict[str, Tensor]:
    """The same matrix, or one of its shape, in every memory layout that a caller may come with."""
    return {
        "contiguous": codes(rows, cols),
        "transposed": codes(cols, rows).t(),
        "sliced": codes(2 * rows + 1, 3 * cols + 1)[1::2, 1::3][:rows, :cols],
        "expanded rows": codes(1, cols).expand(rows, cols),
        "expanded cols": codes(rows, 1).expand(rows, cols),
        "offset": codes(rows * cols + 3)[3:].view(rows, cols),
    }


def scaled_args(m: int, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    scales_a = (
        torch.rand(()),
        torch.rand(1),
        torch.rand(1, 1),
        torch.rand(m),
        torch.rand(m, 1),
        torch.rand(m).bfloat16(),
    )
    scales_b = (torch.rand(()), torch.rand(1), torch.rand(n), torch.rand(1, n), torch.rand(2 * n)[::2].double())
    zero_points = (
        None,
        torch.tensor(-128),
        torch.tensor([127], dtype=torch.uint8),
        codes(m),
        codes(m, 1).int(),
        torch.randint(INT32.min, INT32.max, (m,)),
    )
    for i in range(6):
        bias = (None, torch.randn(n), torch.randn(n).half(), torch.randn(2 * n)[::2])[i % 4]
        yield scales_a[i], scales_b[i % 5], zero_points[i], bias


OUTPUTS = [
    ("relu", torch.float32, None, None),
    ("gelu", torch.bfloat16, None, None),
    ("silu", torch.float16, None, None),
    ("none", torch.int8, torch.tensor([0.5]), None),
    ("relu", torch.int8, torch.tensor(0.03), torch.tensor([-128], dtype=torch.int32)),
    ("gelu", torch.int8, torch.tensor(0.02).double(), torch.tensor(-120, dtype=torch.int8)),
    ("silu", torch.int8, torch.tensor([[0.02]]), torch.tensor(-100)),
    ("silu", torch.int8, torch.tensor(-1.0), torch.tensor(7)),
]


ACTIVATIONS = [
    (None, None, -128, 127),
    (None, None, -8, 7),
    (torch.tensor(0.02), None, -128, 127),
    (torch.tensor([0.03]), torch.tensor(-128, dtype=torch.int32), -128, 127),
    (torch.tensor([[0.03]]), torch.tensor([127], dtype=torch.int8), -128, 127),
    (torch.tensor(0.25), torch.tensor(7), -8, 7),
]


def plain(dtype: torch.dtype) -> tuple[str, torch.dtype, None, None]:
    """The last arguments of the raw ops: no activation, a floating output."""
    return "none", dtype, None, None


def linear_input(m: int, k: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(m, k)
    if m > 4 and k > 3:
        x[0, 2] = torch.nan
        x[1, 1] = torch.inf
        x[2, 3] = -torch.inf
        x[3] = 0
        x[4] = 1e-42
    return x.to(dtype)


def sample_args(op: str) -> tuple:
    data, colsum = torch.ops.qkernels.int8_pack(codes(6, 9))
    return {
        "int8_mm": (codes(3, 9), codes(6, 9).t()),
        "int8_scaled_mm": (
            codes(3, 9),
            codes(9, 6),
            torch.rand(3, 1),
            torch.rand(6),
            torch.tensor(3),
            None,
            torch.randn(6),
            *plain(torch.bfloat16),
        ),
        "int8_pack": (codes(6, 9),),
        "int8_unpack": (data, 6, 9),
        "int8_linear": (
            torch.randn(2, 3, 9),
            data,
            colsum,
            torch.rand(6),
            torch.randn(6),
            torch.tensor(0.1),
            torch.tensor(1),
            -128,
            127,
            *plain(torch.float32),
        ),
    }[op]
