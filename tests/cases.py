"""Shapes, dtypes and granularities as data, for the tests and the benchmarks alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def special(dtype: torch.dtype) -> Tensor:
    """Values at which quantization goes wrong: NaN, infinities, denormals, signed zeros, ties, huge and tiny steps."""
    values = [float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 0.0, -0.0, 1e30, -1e30, 3.4e38]
    ties = [k / 2 for k in range(-20, 21)]
    return torch.tensor(values + ties, dtype=torch.float64).to(dtype).repeat(2)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


# name: (x, shapes of scale that divide it)
INPUTS: dict[str, tuple[Callable[[torch.dtype], Tensor], list[tuple[int, ...]]]] = {
    "0-dim": (lambda d: torch.tensor(1.3, dtype=d), [(), (1,)]),
    "one element": (lambda d: torch.full((1, 1), -2.7, dtype=d), [(1,), (1, 1)]),
    "empty": (lambda d: torch.empty(0, 4, dtype=d), [(1,), (1, 4), (0, 1)]),
    "empty rows": (lambda d: torch.empty(3, 0, dtype=d), [(1,), (3, 1)]),
    "special values": (special, [(1,), (17,), (51,), (102,)]),
    "odd": (lambda d: torch.randn(7, 33, dtype=d) * 2, [(1,), (7, 1), (1, 33), (7, 33), (7, 3), (1, 11), (7, 11)]),
    "three odd dims": (lambda d: torch.randn(5, 3, 17, dtype=d), [(5, 1, 1), (1, 3, 1), (1, 1, 17), (5, 1, 17)]),
    "short runs": (lambda d: torch.randn(300, 40, 9, dtype=d), [(1, 40, 1), (300, 40, 1), (1, 40, 3)]),
    "few channels last": (lambda d: torch.randn(2000, 3, dtype=d), [(1, 3)]),
    "many channels last": (lambda d: torch.randn(700, 1030, dtype=d), [(1, 1030), (700, 1)]),
    "long rows": (lambda d: torch.randn(3, 40000, dtype=d), [(1,), (3, 1), (3, 1250)]),
    "blocks of both dims": (lambda d: torch.randn(64, 96, dtype=d), [(2, 3), (64, 3), (4, 96)]),
    "blocks of three dims": (lambda d: torch.randn(6, 4, 10, dtype=d), [(2, 2, 5), (3, 1, 2)]),
    "image": (lambda d: torch.randn(3, 5, 7, 7, dtype=d), [(1, 5, 1, 1), (3, 1, 1, 1), (3, 5, 1, 1), (1, 1, 7, 1)]),
    "channels_last": (
        lambda d: channels_last(torch.randn(3, 5, 8, 7, dtype=d)),
        [(1,), (1, 5, 1, 1), (3, 5, 1, 1), (1, 5, 4, 1), (1, 1, 1, 7)],
    ),
    "transposed": (lambda d: torch.randn(96, 64, dtype=d).t(), [(1,), (64, 1), (64, 3), (1, 96), (2, 96)]),
    "sliced": (lambda d: torch.randn(9, 70, dtype=d)[:, ::2], [(1,), (9, 1), (9, 5), (1, 35)]),
    "misaligned": (lambda d: torch.randn(1 + 6 * 37, dtype=d)[1:].view(6, 37), [(1,), (6, 1), (1, 37)]),
    "expanded": (lambda d: torch.randn(5, 1, dtype=d).expand(5, 48), [(1,), (5, 1), (5, 3), (1, 48)]),
}
GRANULARITIES = [(name, shape) for name, (_, shapes) in INPUTS.items() for shape in shapes]


def clamp(q: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """torch.clamp with a gradient of 1 on the bounds themselves, where torch's own is 0 or 0.5 from 2.14 on."""
    return torch.where(q < low, low, torch.where(q > high, high, q))


def scale_of(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) * 0.1 + 0.01


def zero_points(shape: tuple[int, ...]) -> list[Tensor | None]:
    """None, integers, fractions, and one for all channels."""
    return [None, torch.randint(-8, 8, shape, dtype=torch.int32), torch.randn(shape) * 6, torch.tensor([-8])]
