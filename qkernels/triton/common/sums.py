"""The backward pass of a learned scale: dx, and in the same pass over x the sums for scale and zero point.

The sums are fp32 (fp64 for fp64) in the first stage and fp64 in the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import ceil_div
from .granularity import channel_of, granularity_of, load_params
from .launch import launch
from .numerics import bits_of, clamp, counts_inside, float_of_bits, narrow, relu, rint, round_to, widen
from .philox import Philox, round_stochastically, uniforms, uniforms_of_blocks
from .pointwise import dense_and_like, laid_out, zero_point_kind
from .reductions import partials_at, regroup, results_at, tile_at


@triton.jit
def terms_of(dy, steps, q, s, z, low, high, delta, TERMS: tl.constexpr):
    """Which elements are inside the range, and what each element adds to dscale and dzero_point.

    The references of the variants hold the formulas. Select, never multiply, so that an infinite dy outside the range
    does not become NaN.
    """
    if TERMS == "pact":
        inside = (steps >= low - z) & (steps < high - z)
        dscale = tl.where(inside, 0.0, dy * (clamp(q, low, high) - z))
    else:
        if TERMS == "ewgs":  # the paper clips before it rounds
            inside = (steps >= low - z) & (steps <= high - z)
        else:
            inside = counts_inside(steps, q, z, low, high, TERMS == "lsq")
        dscale = dy * ((clamp(q, low, high) - z) - tl.where(inside, steps, 0.0))
    if TERMS == "ewgs":
        dscale = tl.where(inside, dscale * (1 + delta * steps), dscale)
    return inside, dscale, tl.where(inside, 0.0, (0.0 - dy) * s)


@triton.jit(do_not_specialize=["view", "repetitions", "steps", "dscale_ptr", "dzero_point_ptr", "delta", "philox"])
def learnable_sums_kernel(
    grad_ptr, x_ptr, dx_ptr, dscale_ptr, dzero_point_ptr, scale, zero_point, quant_min, quant_max, delta, philox, runs,
    repetitions, width, steps, view, TERMS: tl.constexpr, RELU: tl.constexpr, QUADS: tl.constexpr,
    ZERO_POINT: tl.constexpr, DIGITS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The first stage. delta: the bits of EWGS's. QUADS: rows begin at whole blocks of the generator's four numbers."""
    height = repetitions if COLUMNS else runs
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    low, high = tl.cast(quant_min, dtype), tl.cast(quant_max, dtype)
    row, col = tile_at(0, steps, COLUMNS, ROWS, COLS)
    if COLUMNS:
        position = tl.minimum(col, width - 1) // view.inner
    else:
        position = tl.minimum(row, height - 1) % view.period
    s, inv, z = load_params(scale, zero_point, channel_of(position, view, DIGITS), low, high, dtype, ZERO_POINT)
    dscale_sum = tl.zeros([ROWS, COLS], dtype)
    dzero_point_sum = tl.zeros([ROWS, COLS], dtype)
    step = 0
    while step < steps:
        row, col = tile_at(step, steps, COLUMNS, ROWS, COLS)
        # Lanes beyond the end have dy = 0 and x = 0: they add nothing, unless a parameter is not finite.
        here = (row < height) & (col < width)
        at = row * width + col
        x = widen(tl.load(x_ptr + at, mask=here, other=0.0))
        grad = tl.load(grad_ptr + at, mask=here, other=0.0)
        dy = widen(grad)
        v = (relu(x) if RELU else x) * inv
        if TERMS == "stochastic":
            if QUADS:
                row, quad = tile_at(step, steps, COLUMNS, ROWS, COLS // 4)
                u = uniforms_of_blocks(row * (width // 4) + quad, philox, dtype)
            else:
                u = uniforms(at, philox, dtype)
            q = round_stochastically(v, u) + z
        else:
            q = rint(v) + z
        signed_delta = 0.0
        if TERMS == "ewgs":
            signed_delta = float_of_bits(delta, dtype)
            signed_delta = tl.where(dy >= 0, signed_delta, -signed_delta)
        inside, dscale, dzero_point = terms_of(dy, v, q, s, z, low, high, signed_delta, TERMS)
        if TERMS == "pass":
            dx = grad
        elif TERMS == "ewgs":
            dx = narrow(tl.where(inside, dy * (1 + signed_delta * (v - rint(v))), 0.0), dx_ptr.dtype.element_ty)
        else:
            if RELU:
                inside = inside & (x > 0)
            dx = tl.where(inside, grad, tl.zeros_like(grad))
        tl.store(dx_ptr + at, dx, mask=here)
        dscale_sum += dscale
        dzero_point_sum += dzero_point
        step += 1
    at, exists = results_at(height, width, COLUMNS, ROWS, COLS)
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    tl.store(dscale_ptr + at, tl.sum(dscale_sum, AXIS), mask=exists)
    tl.store(dzero_point_ptr + at, tl.sum(dzero_point_sum, AXIS), mask=exists)


@triton.jit(do_not_specialize=["outer", "period", "inner", "dscale_ptr", "dzero_point_ptr", "grad_factor"])
def learnable_join_kernel(
    dscale_ptr, dzero_point_ptr, out_scale_ptr, out_zero_point_ptr, outer, period, inner, grad_factor,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The second stage: sums in fp64, times grad_factor (its bits), rounded once to scale's dtype."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    dscale = tl.zeros([CHANNELS, PARTS], tl.float64)
    dzero_point = tl.zeros([CHANNELS, PARTS], tl.float64)
    first = 0
    while first < outer * inner:
        at, here = partials_at(first, channel, outer, period, inner, PARTS)
        dscale += tl.load(dscale_ptr + at, mask=here, other=0.0).to(tl.float64)
        dzero_point += tl.load(dzero_point_ptr + at, mask=here, other=0.0).to(tl.float64)
        first += PARTS
    factor = float_of_bits(grad_factor, tl.float64)
    dtype: tl.constexpr = out_scale_ptr.dtype.element_ty
    here = channel < period
    tl.store(out_scale_ptr + channel, round_to(tl.sum(dscale, 1) * factor, dtype), mask=here)
    tl.store(out_zero_point_ptr + channel, round_to(tl.sum(dzero_point, 1) * factor, dtype), mask=here)


def learnable_backward(
    terms: str,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    *,
    rectify: bool = False,
    delta: float = 0.0,
    philox: Philox | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dzero_point of arguments that were checked; terms: clip, lsq, pass, pact, ewgs or stochastic."""
    x, dx = dense_and_like(x)
    if x.numel() == 0:
        return dx, scale.new_zeros(scale.shape), scale.new_zeros(scale.shape)
    granularity = granularity_of(x, scale)
    cut = configs.cut(granularity, x.numel())
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(2, cut.outer * cut.period * cut.inner, dtype=dtype, device=x.device)
    launch(
        learnable_sums_kernel, cut.grid, laid_out(grad, x), x, dx, *partial.unbind(), scale.contiguous(),
        zero_point if zero_point is None else zero_point.contiguous(), float(quant_min), float(quant_max),
        bits_of(delta), philox, *cut.sizes, granularity.view, TERMS=terms, RELU=rectify,
        QUADS=philox is not None and cut.width % 4 == 0, ZERO_POINT=zero_point_kind(scale, zero_point),
        DIGITS=granularity.digits, **cut.tile,
    )  # fmt: skip
    partial, (outer, period, inner) = regroup(
        partial, cut, granularity, lambda part, dims: part.double().sum([d + 1 for d in dims])
    )
    dscale, dzero_point = (torch.empty(scale.shape, dtype=scale.dtype, device=x.device) for _ in range(2))
    tile = configs.join(outer, period, inner)
    launch(
        learnable_join_kernel, (ceil_div(period, tile["CHANNELS"]),), *partial.unbind(), dscale, dzero_point, outer,
        period, inner, bits_of(grad_factor), **tile,
    )  # fmt: skip
    return dx, dscale, dzero_point
