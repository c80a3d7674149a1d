"""The differentiable ops as expressions in torch's ops, for torch.func's transforms and for forward mode.

The kernels have one rule of differentiation, reverse mode in an autograd.Function. Here an op returns the kernels'
value, bit for bit, with the derivatives of a model. The model is a short expression that states the op's
straight-through convention; grad, vmap, jvp and every nest of them follow from it. It detaches what it takes for
constant. Second derivatives are the model's too: zero in the range, where rounding has the derivative 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import codebook as codebooks
from . import stochastic
from .dynamic import dynamic_qparams
from .fake_quantize import compute_dtype, counts_inside, expand, qparams
from .silu_mul_quantize import product


def as_if(value: Tensor, model: Tensor) -> Tensor:
    """value, differentiated as if it were model, which is finite. The subtraction of +0 keeps every bit, also −0's."""
    return value - (model.detach() - model).to(value.dtype)


def no_change(t: Tensor, factor: float = 1.0) -> Tensor:
    """Zeros, whose derivative in t is factor."""
    return (t - t.detach()) * factor


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


class _Ewgs(torch.autograd.Function):
    """The identity, whose gradient dy becomes dy·(1 + delta·sign(dy)·error)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, error: Tensor, delta: float) -> Tensor:
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.delta = inputs[2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (error,) = ctx.saved_tensors
        d = torch.where(dy >= 0, 1, -1) * torch.full((), ctx.delta, dtype=dy.dtype, device=dy.device)
        return dy * (1 + d * error), None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            'straight_through: got "ewgs" in forward mode; accepted: reverse mode, as EWGS looks at the sign of the '
            "gradient"
        )


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    straight_through: str = "clip",
    ewgs_delta: float = 0.0,
) -> Tensor:
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    s, inv, _ = qparams(x, scale, zero_point, quant_min, quant_max)
    steps = x.detach().to(s.dtype) * inv
    return _learned(
        x, scale, zero_point, quant_min, quant_max, grad_factor, steps, steps.round(), straight_through, ewgs_delta
    )


def _learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    steps: Tensor,
    integer: Tensor,
    straight_through: str = "clip",
    ewgs_delta: float = 0.0,
) -> Tensor:
    """y from ``steps``, which is x/scale, and ``integer``, to which steps was rounded."""
    s, _, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = integer + z
    end = q.clamp(quant_min, quant_max) - z
    if straight_through == "pact":
        inside = (steps >= quant_min - z) & (steps < quant_max - z)
    elif straight_through == "ewgs":
        inside = (steps >= quant_min - z) & (steps <= quant_max - z)
    elif straight_through == "lsq":
        inside = counts_inside(steps, z, quant_min, quant_max, lsq=True)
    else:
        inside = (q >= quant_min) & (q <= quant_max)
    # With v = x/scale, inside the range y = round(v)·scale, where round has the derivative 1; so the model is
    # x − scale·v + scale·round(v) with v and round(v) constant. Outside the model is (bound − zero_point)·scale.
    # grad_factor multiplies the derivatives in scale and zero point.
    values, learned = x.to(s.dtype), s + expand(no_change(scale.to(s.dtype), grad_factor), x)
    outside = end
    if zero_point is not None and zero_point.is_floating_point():
        outside = end - expand(no_change(zero_point.to(s.dtype), grad_factor), x)
    if straight_through == "pact":
        model = torch.where(inside, values, learned * outside)
    elif straight_through == "pass":
        model = finite(values) + torch.where(inside, learned * (end - steps), learned * outside)
    else:
        through = torch.where(inside, values - learned * steps, 0)
        if straight_through == "ewgs":
            through = _Ewgs.apply(through, torch.where(inside, steps - steps.round(), 0), ewgs_delta)
        model = through + learned * torch.where(inside, end, outside)
    return as_if((end * s).to(x.dtype), model)


def fake_quantize_straight_through(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    straight_through: str,
    ewgs_delta: float,
    grad_factor: float,
) -> Tensor:
    return fake_quantize(x, scale, zero_point, quant_min, quant_max, grad_factor, straight_through, ewgs_delta)


def fake_quantize_stochastic(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int,
    offset_tensor: Tensor | None,
    grad_factor: float,
) -> Tensor:
    """Under vmap each sample draws the numbers that it would draw alone."""
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.offset(offset_tensor, x)
    s, inv, _ = qparams(x, scale, zero_point, quant_min, quant_max)
    steps = x.detach().to(s.dtype) * inv
    alone = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    place = torch.empty_strided(x.shape, torch.empty_like(alone).stride(), dtype=x.dtype, device=x.device)
    integer = stochastic.round_stochastically(steps, stochastic.uniform(place, seed, offset, offset_tensor, s.dtype))
    return _learned(x, scale, zero_point, quant_min, quant_max, grad_factor, steps, integer)


def fake_quantize_dynamic(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, scale and zero point; the derivatives take the range for a constant."""
    checks.dynamic(x, group_size)
    checks.dynamic_range(quant_min, quant_max, None)
    scale, zero_point = dynamic_qparams(x, group_size, quant_min, quant_max, symmetric)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = (x.detach().to(s.dtype) * inv).round() + z
    values = x.to(s.dtype)
    model = finite(values) if symmetric else torch.where((q >= quant_min) & (q <= quant_max), values, 0)
    return as_if(((q.clamp(quant_min, quant_max) - z) * s).to(x.dtype), model), scale, zero_point


def rms_norm_fake_quantize_dynamic(
    x: Tensor, weight: Tensor | None, eps: float, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> Tensor:
    checks.rms_norm(x, weight, group_size)
    values = x.to(compute_dtype(x))
    mean = values.square().sum(-1, keepdim=True, dtype=torch.float64).to(values.dtype) / x.shape[-1]
    v = values * (1 / (mean + eps).sqrt())
    if weight is not None:
        v = v * weight.to(v.dtype)
    return fake_quantize_dynamic(v, group_size, quant_min, quant_max, symmetric)[0].to(x.dtype)


def silu_mul_fake_quantize_dynamic(
    gate: Tensor, up: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> Tensor:
    checks.silu_mul(gate, up, group_size)
    g = gate.to(compute_dtype(gate))
    # The value is product's, whose exponential torch cannot differentiate; the derivatives are those of torch's silu.
    v = as_if(product(gate.detach(), up.detach()), torch.nn.functional.silu(g) * up.to(g.dtype))
    return fake_quantize_dynamic(v, group_size, quant_min, quant_max, symmetric)[0].to(gate.dtype)


def fake_quantize_codebook(x: Tensor, scale: Tensor, codebook: Tensor, grad_factor: float) -> Tensor:
    checks.codebook(x, scale, codebook)
    v, s, levels = codebooks.scaled(x, scale, codebook)
    inside, nearest = codebooks.inside_levels(v, levels), codebooks.nearest(v, levels)
    level = torch.where(v.isnan(), v, levels.ascending[nearest])
    learned = s + expand(no_change(scale.to(s.dtype), grad_factor), x)
    change = no_change(codebook.to(s.dtype), grad_factor)[levels.order][nearest]
    model = torch.where(inside, x.to(s.dtype) - learned * v, 0) + learned * (level + change)
    return as_if((level * s).to(x.dtype), model)


def observe_fake_quantize(
    x: Tensor,
    fake_quant_on: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """y, after the statistics were updated; the derivatives take these for constants."""
    y = fake_quantize(x, scale.detach(), zero_point.detach(), quant_min, quant_max)
    return torch.where(fake_quant_on.bool().reshape(()), y, x)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    checks.dequantize(q, scale, zero_point, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    s = _floored(expand(scale.to(compute), q))
    codes = q.to(compute)
    if zero_point is not None:
        z = expand(zero_point.to(compute), q)
        codes = codes - as_if(z.detach().round(), z)
    return (codes * s).to(dtype)


def dequantize_codebook(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    checks.dequantize_codebook(codes, scale, codebook, dtype)
    levels = codebook.to(compute_dtype(torch.empty(0, dtype=dtype)))
    levels = torch.where(codebook.isfinite().all(), levels, torch.nan)
    s = _floored(expand(scale.to(levels.dtype), codes))
    padded = torch.nn.functional.pad(levels, (0, checks.LEVELS[1] - levels.numel()), value=torch.nan)
    return (padded[codes.long()] * s).to(dtype)


def _floored(s: Tensor) -> Tensor:
    return torch.where(s < 0, torch.nan, s.clamp(min=torch.finfo(torch.float32).tiny))
