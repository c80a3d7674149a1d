"""Sample arguments, on which the self-check and the tests try an op's kernels: their declaration, and common ones.

An op's samples are a function of one floating tensor x of any shape, dtype and strides. It yields the arguments of one
call after another, and none if the op cannot take such an x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Samples = Callable[[Tensor], Iterator[tuple[Any, ...]]]

INT4 = (-8, 7)
INT8 = (-128, 127)


@dataclass(frozen=True)
class Trial:
    """How to compare the kernels of an op with its reference.

    Attributes:
        samples: the arguments of calls.
        sums: indices of the outputs that are sums over many elements; kernels may add these in another order.
        given: for an op whose first outputs follow exactly from such a sum: (arguments, a kernel's outputs) -> the
            reference's first outputs, computed from the kernel's sum.
        on_gpu: turns the arguments into those for a GPU's kernels, which want packed weights in another layout.
        mutates: whether the op writes to some of its arguments.
    """

    samples: Samples
    sums: tuple[int, ...] = ()
    given: Callable[..., Any] | None = None
    on_gpu: Callable[..., tuple[Any, ...]] | None = None
    mutates: bool = False


trials: dict[str, Trial] = {}  # op -> its trial; library.define fills it


def qparams(x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and zero points per tensor, per row and per channel."""
    yield torch.tensor([0.3]), None
    yield torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
    if x.dim() >= 2:
        for dim in (0, 1):
            shape = [size if at == dim else 1 for at, size in enumerate(x.shape)]
            yield 0.01 + torch.rand(shape), torch.randint(-8, 8, shape, dtype=torch.int32)


def quantizer(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for scale, zero_point in qparams(x):
        yield x, scale, zero_point, *INT4


def backward(forward_args: Callable[[Tensor], Iterator[tuple[Any, ...]]]) -> Callable[[Tensor], Any]:
    def args(x: Tensor) -> Iterator[tuple[Any, ...]]:
        for case in forward_args(x):
            yield torch.randn(x.shape).to(x.dtype), *case

    return args


def learnable(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():  # sums of NaN are NaN in any order, but infinities can cancel
        for case in backward(quantizer)(x):
            yield *case, 0.5


def with_lsq(args: Callable[[Tensor], Iterator[tuple[Any, ...]]]) -> Callable[[Tensor], Any]:
    """Every case of an op with its default convention and with "lsq"."""

    def both(x: Tensor) -> Iterator[tuple[Any, ...]]:
        for case in args(x):
            yield case
            yield *case, True

    return both


def dynamic(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for symmetric in (True, False):
        yield x, 0, *INT8, symmetric
        if x.dtype in (torch.float32, torch.bfloat16) and x.dim() > 0 and x.isfinite().all():
            yield x.clamp(-1, 1) * 3e38, -1, *INT4, symmetric  # a range beyond fp32
        if x.dim() > 0:
            yield x, -1, *INT4, symmetric
        if x.dim() > 0 and x.shape[-1] % 8 == 0 and x.shape[-1] > 0:
            yield x, 8, *INT4, symmetric


def granularities(x: Tensor) -> Iterator[tuple[int, ...]]:
    yield (1,)
    for dim in range(x.dim() if x.dim() >= 2 else 0):
        yield tuple(size if at == dim else 1 for at, size in enumerate(x.shape))


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)
