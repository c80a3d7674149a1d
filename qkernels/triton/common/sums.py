"""dx and the sums for scale and zero point, in two stages and a fixed order.

The first stage walks memory as a matrix and keeps one of its dims. Where runs are long the matrix is [runs, inner], and
each run is summed on its own; where they are short it is [repetitions, period · inner], and each column is. Partial
sums are fp32 (fp64 for fp64); torch adds them in fp64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, granularity
from .granularity import channel_of, granularity_of, load_params
from .launch import launch
from .numerics import clamp, is_inside, narrow, rint, widen
from .philox import round_stochastically, uniforms, uniforms_of_blocks
from .pointwise import dense_and_like, laid_out, zero_point_kind


@triton.jit
def terms(dy, steps, q, s, z, low, high, delta, VARIANT: tl.constexpr):
    """What elements add to dx, dscale and dzero_point; see the references of the variants."""
    end = clamp(q, low, high) - z
    inside = is_inside(q, low, high)
    if VARIANT == "ewgs":  # the paper clips before it rounds
        inside = (steps >= low - z) & (steps <= high - z)
    if VARIANT == "pact":
        inside = (steps >= low - z) & (steps < high - z)
        dscale = tl.where(inside, 0.0, dy * end)
    else:
        dscale = dy * (end - tl.where(inside, steps, 0.0))
    dx = dy if VARIANT == "pass" else tl.where(inside, dy, 0.0)
    if VARIANT == "ewgs":
        d = tl.where(dy >= 0, delta, -delta)
        dx = tl.where(inside, dy * (1 + d * (steps - rint(steps))), 0.0)
        dscale = tl.where(inside, dscale * (1 + d * steps), dscale)
    return dx, dscale, tl.where(inside, 0.0, -dy * s)


@triton.jit(do_not_specialize=["view", "seed", "offset"])
def sums_kernel(
    grad_ptr, x_ptr, dx_ptr, dscale_ptr, dzero_point_ptr, scale, zero_point, quant_min, quant_max, delta, seed, offset,
    offset_ptr, kept, reduced, view,
    VARIANT: tl.constexpr, RUNS: tl.constexpr, QUADS: tl.constexpr, ZERO_POINT: tl.constexpr, DIGITS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr, BLOCK_REDUCED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(kept, BLOCK_KEPT)
    piece = tl.program_id(0) // blocks
    keep = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    position = (keep if RUNS else keep // view.inner) % view.period  # one channel has a period of 1
    channel = channel_of(tl.where(keep < kept, position, 0), view, DIGITS)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    low, high = tl.cast(quant_min, dtype), tl.cast(quant_max, dtype)
    d = tl.load(delta) if dtype == tl.float64 else delta
    s, inv, z = load_params(scale, zero_point, channel, low, high, dtype, ZERO_POINT)
    AXIS: tl.constexpr = 1 if RUNS else 0
    if RUNS:
        scale_sum = tl.zeros([BLOCK_KEPT, BLOCK_REDUCED], dtype)
    else:
        scale_sum = tl.zeros([BLOCK_REDUCED, BLOCK_KEPT], dtype)
    zero_point_sum = scale_sum
    s, inv, z = tl.expand_dims(s, AXIS), tl.expand_dims(inv, AXIS), tl.expand_dims(z, AXIS)
    for step in range(STEPS):
        first = (piece.to(tl.int64) * STEPS + step) * BLOCK_REDUCED
        over = first + tl.arange(0, BLOCK_REDUCED)
        if RUNS:
            element = keep[:, None] * reduced + over[None, :]
            here = (keep < kept)[:, None] & (over < reduced)[None, :]
        else:
            element = over[:, None] * kept + keep[None, :]
            here = (over < reduced)[:, None] & (keep < kept)[None, :]
        dy = widen(tl.load(grad_ptr + element, mask=here, other=0))
        steps = widen(tl.load(x_ptr + element, mask=here, other=0)) * inv
        if VARIANT == "stochastic":
            if QUADS:  # rows begin at whole blocks of four elements
                if RUNS:
                    quad = first // 4 + tl.arange(0, BLOCK_REDUCED // 4)
                    block = keep[:, None] * (reduced // 4) + quad[None, :]
                else:
                    quad = (tl.program_id(0) % blocks).to(tl.int64) * (BLOCK_KEPT // 4) + tl.arange(0, BLOCK_KEPT // 4)
                    block = over[:, None] * (kept // 4) + quad[None, :]
                u = uniforms_of_blocks(block, seed, offset, offset_ptr, dtype)
            else:
                u = uniforms(element, seed, offset, offset_ptr, dtype)
            q = round_stochastically(steps, u) + z
        else:
            q = rint(steps) + z
        dx, dscale, dzero_point = terms(dy, steps, q, s, z, low, high, d, VARIANT)
        tl.store(dx_ptr + element, narrow(dx, dx_ptr.dtype.element_ty), mask=here)
        scale_sum += tl.where(here, dscale, 0.0)
        zero_point_sum += tl.where(here, dzero_point, 0.0)
    out = piece.to(tl.int64) * kept + keep
    tl.store(dscale_ptr + out, tl.sum(scale_sum, AXIS), mask=keep < kept)
    tl.store(dzero_point_ptr + out, tl.sum(zero_point_sum, AXIS), mask=keep < kept)


def backward(
    variant: str,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    *,
    delta: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    offset_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dzero_point of arguments that were checked."""
    x, dx = dense_and_like(x)
    numel = x.numel()
    if numel == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    walk = granularity_of(x, scale)
    assert walk is not None  # see unsupported
    inner, period = (numel, 1) if walk.channels == 1 else (walk.view.inner, walk.view.period)
    tile = configs.sums(inner, period, numel)
    kept, reduced = (numel // inner, inner) if tile["RUNS"] else (period * inner, numel // (period * inner))
    pieces = triton.cdiv(reduced, tile["BLOCK_REDUCED"] * tile["STEPS"])
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty((2, pieces, kept), dtype=accumulator, device=x.device)
    # A number reaches a kernel in fp32.
    number = x.new_full((), delta) if accumulator == torch.float64 else delta
    launch(
        sums_kernel, (pieces * triton.cdiv(kept, tile["BLOCK_KEPT"]),), laid_out(grad, dx), x, dx, partial[0],
        partial[1], scale.contiguous(), zero_point if zero_point is None else zero_point.contiguous(),
        float(quant_min), float(quant_max), number, seed, offset, offset_tensor, kept, reduced, walk.view,
        VARIANT=variant, ZERO_POINT=zero_point_kind(scale, zero_point), DIGITS=walk.digits, **tile,
    )  # fmt: skip
    totals = partial.sum(1, dtype=torch.float64)
    totals = totals.view(2, -1, period).sum(1) if tile["RUNS"] else totals.view(2, period, inner).sum(2)
    dscale, dzero_point = _per_channel(totals, x, scale) * grad_factor
    return dx, dscale.to(scale.dtype), dzero_point.to(scale.dtype)


def _per_channel(totals: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """[2, runs of a period] summed into [2, *scale.shape]."""
    if scale.numel() == 1:
        return totals.view(2, *scale.shape)
    factors = list(granularity.factors_of(tuple(x.shape), tuple(x.stride()), tuple(scale.shape)))
    factors = factors[factors[0][1] == 0 :]
    factors = factors[: len(factors) - (factors[-1][1] == 0)]
    totals = totals.view(2, *(size for size, _ in factors))
    order = sorted((at for at, (_, stride) in enumerate(factors) if stride), key=lambda at: -factors[at][1])
    shared = [at + 1 for at, (_, stride) in enumerate(factors) if not stride]
    totals = totals.permute(0, *(at + 1 for at in order), *shared)
    return totals.reshape(2, *scale.shape, math.prod(totals.shape[1 + len(order) :])).sum(-1)
