"""Non-uniform quantization in Triton: elementwise bit for bit as the reference; sums in a fixed order, no atomics.

One small kernel sorts the codebook on the device; the others find the nearest level by a binary search of its
midpoints, which stay in L1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..reference.fake_quantize import compute_dtype
from .common import configs
from .common.configs import ceil_div, power_of_two
from .common.granularity import block_index, block_params, granularity_of, unsupported_granularity
from .common.launch import launch
from .common.numerics import effective_scale, is_inside, narrow, reciprocal, store_bits, widen
from .common.pointwise import blocks, dense_and_like, empty_mask, in_blocks, laid_out


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    if op == "fake_quantize_codebook_learnable_backward":
        x, scale = args[1], args[2]
        if scale.numel() == 1 or x.numel() == 0 or scale.dim() != x.dim():
            return None
        if any(blocks == 0 or size % blocks for blocks, size in zip(scale.shape, x.shape, strict=True)):
            return None  # refused with a message, later
        like = torch.empty_like(x, device="meta")
        granularity = granularity_of(like, scale)
        if granularity.digits != 1 or granularity.channels != granularity.runs:
            return f"takes scales of stretches of memory, got {list(scale.shape)} for strides {list(like.stride())}"
        return None
    if op == "fake_quantize_codebook_backward":
        return unsupported_granularity(args[1], args[2])
    return unsupported_granularity(args[0], args[1])


# A prepared codebook is three tables of SIZE numbers, a power of two: the levels in ascending order, the midpoints
# between them (infinity after the last), and the levels as given. Beside them lies the order of the levels in int32.


@triton.jit(do_not_specialize=["count"])
def prepare_codebook_kernel(codebook, tables, order, count, SIZE: tl.constexpr):
    dtype: tl.constexpr = tables.dtype.element_ty
    i = tl.arange(0, SIZE)
    level = widen(tl.load(codebook + i, mask=i < count, other=0.0)).to(dtype)
    bad = tl.sum((tl.abs(level) < float("inf")).to(tl.int32), 0) < SIZE
    # A stable sort: the rank of a level is how many stand before it, the next level the least of those after it.
    rank = tl.zeros_like(i)
    following = tl.full([SIZE], float("inf"), dtype)
    for j in range(SIZE):
        other = widen(tl.load(codebook + j, mask=j < count, other=0.0)).to(dtype)
        before = (other < level) | ((other == level) & (j < i))
        after = (other > level) | ((other == level) & (j > i))
        rank += (before & (j < count)).to(tl.int32)
        following = tl.where(after & (j < count), tl.minimum(following, other), following)
    midpoint = tl.where(bad, float("inf"), level * 0.5 + following * 0.5)
    level = tl.where(bad, float("nan"), level)
    here = i < count
    rank = tl.where(here & (bad == 0), rank, i)
    tl.store(tables + rank, level, mask=here)
    tl.store(tables + SIZE + rank, tl.where(here, midpoint, float("inf")))
    tl.store(tables + 2 * SIZE + i, level, mask=here)
    tl.store(order + rank, i, mask=here)


def prepared(codebook: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, int]]:
    """The tables, the order, and the constexprs that tell their size."""
    codebook = codebook.contiguous()
    size = power_of_two(codebook.numel())
    tables = torch.empty(3 * size, dtype=dtype, device=codebook.device)
    order = torch.empty(size, dtype=torch.int32, device=codebook.device)
    launch(prepare_codebook_kernel, (1,), codebook, tables, order, codebook.numel(), SIZE=size)
    return tables, order, {"SIZE": size, "STEPS": size.bit_length() - 1}


@triton.jit
def nearest(v, tables, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """How many midpoints lie below v; 0 for NaN."""
    index = tl.zeros_like(v).to(tl.int32)
    for step in tl.static_range(STEPS):
        half = SIZE >> (step + 1)
        index += tl.where(v > tl.load(tables + SIZE + index + (half - 1)), half, 0)
    return index


@triton.jit(do_not_specialize=["view", "count"])
def fake_quantize_codebook_forward_kernel(
    x_ptr, y_ptr, mask_ptr, scale, tables, count, numel, view,
    MASK: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr,
    WRAP: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here, other=0.0))
    s, inv, _ = block_params(start, index, scale, None, 0, 0, view, x.dtype, 0, MODE, DIGITS, WRAP, BLOCK, INNER)
    v = x * inv
    y = tl.where(v == v, tl.load(tables + nearest(v, tables, SIZE, STEPS)), v) * s
    tl.store(y_ptr + start + index, narrow(y, y_ptr.dtype.element_ty), mask=here)
    if MASK:
        inside = is_inside(v, tl.load(tables), tl.load(tables + count - 1))
        store_bits(mask_ptr, inside & here, start, numel, BLOCK)


def _forward(x: Tensor, scale: Tensor, codebook: Tensor, y: Tensor, mask: Tensor | None) -> None:
    numel = x.numel()
    if numel == 0:
        return
    tables, _, size = prepared(codebook, compute_dtype(x))
    view, constexprs = in_blocks(x, scale)
    launch(
        fake_quantize_codebook_forward_kernel, blocks(numel, constexprs), x, y, mask, scale.contiguous(), tables,
        codebook.numel(), numel, view, MASK=mask is not None, **size, **constexprs,
    )  # fmt: skip


def fake_quantize_codebook_forward(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    checks.codebook(x, scale, codebook)
    x, y = dense_and_like(x)
    _forward(x, scale, codebook, y, None)
    return y


def fake_quantize_codebook_forward_mask(x: Tensor, scale: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    checks.codebook(x, scale, codebook)
    x, y = dense_and_like(x)
    mask = empty_mask(x)
    _forward(x, scale, codebook, y, mask)
    return y, mask


@triton.jit(do_not_specialize=["view", "count"])
def fake_quantize_codebook_backward_kernel(
    grad_ptr, x_ptr, dx_ptr, scale, tables, count, numel, view,
    MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here, other=0.0))
    _, inv, _ = block_params(start, index, scale, None, 0, 0, view, x.dtype, 0, MODE, DIGITS, WRAP, BLOCK, INNER)
    inside = is_inside(x * inv, tl.load(tables), tl.load(tables + count - 1))
    grad = tl.load(grad_ptr + start + index, mask=here & inside, other=0.0)
    tl.store(dx_ptr + start + index, grad, mask=here)


def fake_quantize_codebook_backward(grad: Tensor, x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    checks.values("x", x)
    checks.grad(grad, x)
    checks.codebook(x, scale, codebook)
    x, dx = dense_and_like(x)
    numel = x.numel()
    if numel:
        tables, _, _ = prepared(codebook, compute_dtype(x))
        view, constexprs = in_blocks(x, scale)
        launch(
            fake_quantize_codebook_backward_kernel, blocks(numel, constexprs), laid_out(grad, dx), x, dx,
            scale.contiguous(), tables, codebook.numel(), numel, view, **constexprs,
        )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["count", "pieces"])
def fake_quantize_codebook_learnable_backward_kernel(
    grad_ptr, x_ptr, dx_ptr, scale, tables, of_runs, of_levels, count, runs, inner, pieces,
    CODEBOOK: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr, RUNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of COLUMNS elements of each of RUNS runs; their sums for each run, and for each level in all."""
    program = tl.program_id(0).to(tl.int64)
    piece = program % pieces
    run = program // pieces * RUNS + tl.arange(0, RUNS)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    at = run[:, None] * inner + column[None, :]
    here = (run < runs)[:, None] & (column < inner)[None, :]
    x = widen(tl.load(x_ptr + at, mask=here, other=0.0))
    dy = widen(tl.load(grad_ptr + at, mask=here, other=0.0))
    s = effective_scale(widen(tl.load(scale + run, mask=run < runs, other=1.0)).to(x.dtype))
    v = x * reciprocal(s)[:, None]
    inside = is_inside(v, tl.load(tables), tl.load(tables + count - 1))
    tl.store(dx_ptr + at, narrow(tl.where(inside, dy, 0.0), dx_ptr.dtype.element_ty), mask=here)
    index = nearest(v, tables, SIZE, STEPS)
    level = tl.where(v == v, tl.load(tables + index), v)
    terms = tl.where(here, dy * (level - tl.where(inside, v, 0.0)), 0.0)
    tl.store(of_runs + run * pieces + piece, tl.sum(terms, 1), mask=run < runs)
    if CODEBOOK:
        terms = tl.where(here, dy * s[:, None], 0.0)
        for i in range(SIZE):
            tl.store(of_levels + program * SIZE + i, tl.sum(tl.sum(tl.where(index == i, terms, 0.0), 1), 0))


def fake_quantize_codebook_learnable_backward(
    grad: Tensor, x: Tensor, scale: Tensor, codebook: Tensor, grad_factor: float, learn_codebook: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.values("x", x)
    checks.grad(grad, x)
    checks.codebook(x, scale, codebook)
    x, dx = dense_and_like(x)
    count = codebook.numel()
    dcodebook = codebook.new_zeros(count if learn_codebook else 0)
    if x.numel() == 0:
        return dx, scale.new_zeros(scale.shape), dcodebook
    tables, order, size = prepared(codebook, compute_dtype(x))
    runs, inner = scale.numel(), x.numel() // scale.numel()
    rows, columns = configs.codebook_sums(inner)
    pieces = ceil_div(inner, columns)
    programs = ceil_div(runs, rows) * pieces
    of_runs = torch.empty(runs, pieces, dtype=tables.dtype, device=x.device)
    of_levels = torch.empty(programs, size["SIZE"], dtype=tables.dtype, device=x.device) if learn_codebook else None
    launch(
        fake_quantize_codebook_learnable_backward_kernel, (programs,), laid_out(grad, dx), x, dx, scale.contiguous(),
        tables, of_runs, of_levels, count, runs, inner, pieces, CODEBOOK=learn_codebook, RUNS=rows, COLUMNS=columns,
        **size,
    )  # fmt: skip
    dscale = (of_runs.sum(1, dtype=torch.float64) * grad_factor).to(scale.dtype).reshape(scale.shape)
    if of_levels is not None:
        sums = of_levels[:, :count].sum(0, dtype=torch.float64) * grad_factor
        dcodebook.scatter_(0, order[:count].long(), sums.to(codebook.dtype))
    return dx, dscale, dcodebook


@triton.jit(do_not_specialize=["view"])
def quantize_codebook_kernel(
    x_ptr, codes_ptr, scale, tables, order, numel, view,
    SIZE: tl.constexpr, STEPS: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here, other=0.0))
    _, inv, _ = block_params(start, index, scale, None, 0, 0, view, x.dtype, 0, MODE, DIGITS, WRAP, BLOCK, INNER)
    v = x * inv
    code = tl.load(order + nearest(tl.where(v == v, v, 0.0), tables, SIZE, STEPS))
    tl.store(codes_ptr + start + index, code.to(tl.uint8), mask=here)


def quantize_codebook(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    checks.codebook(x, scale, codebook)
    x, codes = dense_and_like(x, torch.uint8)
    numel = x.numel()
    if numel:
        tables, order, size = prepared(codebook, compute_dtype(x))
        view, constexprs = in_blocks(x, scale)
        launch(
            quantize_codebook_kernel, blocks(numel, constexprs), x, codes, scale.contiguous(), tables, order, numel,
            view, **size, **constexprs,
        )  # fmt: skip
    return codes


@triton.jit(do_not_specialize=["view", "count"])
def dequantize_codebook_kernel(
    codes_ptr, y_ptr, scale, tables, count, numel, view,
    SIZE: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tables.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    code = tl.load(codes_ptr + start + index, mask=here, other=0).to(tl.int32)
    s, _, _ = block_params(start, index, scale, None, 0, 0, view, dtype, 0, MODE, DIGITS, WRAP, BLOCK, INNER)
    level = tl.load(tables + 2 * SIZE + code, mask=code < count, other=float("nan"))
    tl.store(y_ptr + start + index, narrow(level * s, y_ptr.dtype.element_ty), mask=here)


def dequantize_codebook(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    checks.dequantize_codebook(codes, scale, codebook, dtype)
    codes, y = dense_and_like(codes, dtype)
    numel = codes.numel()
    if numel:
        tables, _, size = prepared(codebook, compute_dtype(y))
        view, constexprs = in_blocks(codes, scale)
        launch(
            dequantize_codebook_kernel, blocks(numel, constexprs), codes, y, scale.contiguous(), tables,
            codebook.numel(), numel, view, SIZE=size["SIZE"], **constexprs,
        )  # fmt: skip
    return y
