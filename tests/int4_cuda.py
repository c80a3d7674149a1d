"""Arguments of the int4 linear layer in a GPU's layout, and how its results are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels import layouts, library, registry
from qkernels.reference import int4_gemm as reference

emulated = pytest.mark.skipif(library.gpu != "cpu", reason="the CUDA kernels are not emulated")
HALF_TYPES = (torch.bfloat16, torch.float16)
KINDS = ("symmetric", "zero_point", "minimum")


def arguments(
    m: int,
    n: int,
    k: int,
    group_size: int,
    kind: str = "symmetric",
    dtype: torch.dtype = torch.bfloat16,
    *,
    scale_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = torch.float32,
    out_dtype: torch.dtype | None = None,
    whole: bool = False,
) -> tuple[Any, ...]:
    """Of qkernels::int4_linear, in a GPU's layout; ``whole``: of numbers whose sums fp32 holds exactly."""
    groups = k // group_size
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    x, scale, minimum = torch.randn(m, k), torch.rand(n, groups) * 0.2 + 0.01, torch.randn(n, groups)
    scale *= torch.where(torch.rand(n, groups) < 0.2, -1, 1)
    bias = torch.randn(n)
    if whole:
        x, bias = torch.randint(-4, 5, (m, k)).float(), torch.randint(-9, 9, (n,)).float()
        scale, minimum = 2.0 ** torch.randint(-2, 3, (n, groups)), torch.randint(-16, 17, (n, groups)) / 4
    scale, minimum = scale.to(scale_dtype), minimum.to(scale_dtype) if kind == "minimum" else None
    zero_point = torch.randint(-8, 8, (n, groups), dtype=torch.int8) if kind == "zero_point" else None
    offset = reference.offset_of(scale, zero_point, minimum)
    weight_sum = reference.weight_of(q, scale, offset, group_size).sum(1).float()
    by_group = (None if t is None else t.t().contiguous() for t in (scale, zero_point, minimum))
    return (
        x.to(dtype), layouts.int4_to_halves(q, group_size), *by_group, weight_sum,
        None if bias_dtype is None else bias.to(bias_dtype), group_size, 16, None, None, -128, 127, out_dtype or dtype,
    )  # fmt: skip


def check(y: Tensor, args: tuple[Any, ...]) -> None:
    """y against the product in fp64, within the bound that int4_linear's documentation gives."""
    x, data, scale, zero_point, minimum, weight_sum, bias, group_size = (
        t.cpu() if isinstance(t, Tensor) else t for t in args[:8]
    )
    n, k = weight_sum.numel(), x.shape[-1]
    scale, zero_point, minimum = (None if t is None else t.t() for t in (scale, zero_point, minimum))
    offset = reference.offset_of(scale, zero_point, minimum)
    weight = reference.weight_of(layouts.int4_unpack(data, n, k, group_size), scale, offset, group_size)
    most = 15 * scale.double().abs() + (0 if offset is None else offset.double().abs())
    exact = x.double() @ weight.t()
    bound = (k + 4) * 2**-23 * (x.double().abs() @ most.repeat_interleave(k // scale.shape[1], 1).t())
    if bias is not None:
        exact = exact + bias.double()
        bound = bound + exact.abs() * 2**-23
    assert y.dtype == args[-1]
    assert y.shape == exact.shape
    rounding = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
    error = (y.cpu().double() - exact).abs()
    assert (error <= bound * (1 + rounding) + exact.abs() * rounding).all(), (error / bound).max()


def run(args: tuple[Any, ...]) -> Tensor:
    with qk.use_kernel("cuda"):
        return registry.run("int4_linear", *args)


# Rows in every class, channels of whole and of cut tiles, k in every kind of group and rows of data that end half way
# through a tile; three processors, so that columns are shared by many blocks, and blocks have parts in many columns.
SHAPES = [
    (1, 128, 1024, 128),
    (3, 100, 256, 64),
    (8, 33, 128, 32),
    (9, 257, 512, 256),
    (16, 128, 192, 64),
    (16, 130, 96, 32),
    (17, 64, 640, 128),
    (30, 300, 192, 192),
    (32, 1, 256, 32),
    (33, 129, 384, 96),
    (63, 70, 320, 160),
    (64, 256, 256, 128),
    (5, 40, 200, 200),
    (2, 40, 8, 8),
    (4, 5000, 128, 64),
    (7, 1281, 384, 384),
    (6, 200, 1152, 384),  # these have stripes that begin within a group
    (11, 150, 960, 192),
    (20, 90, 960, 96),
]
