"""The gradients of a learned scale and zero point in plain torch, in every straight-through convention."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .fake_quantize import counts_inside, qparams


def fake_quantize_straight_through_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    straight_through: str,
    ewgs_delta: float,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero point, with v = x/scale; "clip" is in ``fake_quantize_learnable_backward``.

    pass: dx = dy; the sums are those of "clip".
    pact: dx = dy where quant_min − zp <= v < quant_max − zp; only elements outside count in the sums
    (arXiv 1805.06085, whose alpha is scale·(quant_max − zp)).
    ewgs: dx = dy·(1 + d·(v − round(v))) where quant_min − zp <= v <= quant_max − zp, with d = ewgs_delta·sign(dy)
    (arXiv 2104.00903, which clips before it rounds). By the chain rule the scale's term dy·(round(v) − v) becomes
    dy·(round(v) − v)·(1 + d·v).
    """
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    checks.straight_through(straight_through, ewgs_delta, checks.WITH_TERMS)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    dy, steps = grad.to(s.dtype), x.to(s.dtype) * inv
    q = steps.round() + z
    end = q.clamp(quant_min, quant_max) - z
    inside = (q >= quant_min) & (q <= quant_max)
    if straight_through == "ewgs":
        inside = (steps >= quant_min - z) & (steps <= quant_max - z)
    if straight_through == "pact":
        inside = (steps >= quant_min - z) & (steps < quant_max - z)
        dx, dscale = torch.where(inside, dy, 0), torch.where(inside, 0, dy * end)
    else:
        dx, dscale = dy, dy * (end - torch.where(inside, steps, 0))
    if straight_through == "ewgs":
        d = torch.where(dy >= 0, 1, -1) * torch.full((), ewgs_delta, dtype=s.dtype, device=x.device)
        dx = torch.where(inside, dy * (1 + d * (steps - steps.round())), 0)
        dscale = torch.where(inside, dscale * (1 + d * steps), dscale)
    dzp = torch.where(inside, 0, -dy * s)
    return (
        torch.empty_like(x).copy_(dx),
        (sum_to(dscale, scale) * grad_factor).to(scale.dtype),
        (sum_to(dzp, scale) * grad_factor).to(scale.dtype),
    )


def sum_to(terms: Tensor, param: Tensor) -> Tensor:
    """The adjoint of ``expand``: sums over the blocks, in fp64."""
    terms = terms.double()
    if param.numel() == 1:
        return terms.sum().reshape(param.shape)
    split = [n for p, size in zip(param.shape, terms.shape, strict=True) for n in (p, size // max(p, 1))]
    return terms.reshape(split).sum(dim=tuple(range(1, len(split), 2)))


def fake_quantize_learnable_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    lsq: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero point (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

    dscale sums dy·{quant_min − zp | quant_max − zp | (q − zp) − x/scale} (below, above, inside the range); dzp sums
    −dy·scale over elements outside; both are multiplied by grad_factor. With lsq an element is inside if x/scale + zp
    before rounding lies in the range, bounds excluded, as in both papers; else if q does, bounds included, as in torch.
    """
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    steps = x.to(s.dtype) * inv
    q = steps.round() + z
    inside = counts_inside(steps, z, quant_min, quant_max, lsq)
    dy = grad.to(s.dtype)
    dscale = dy * ((q.clamp(quant_min, quant_max) - z) - torch.where(inside, steps, 0))
    dzp = torch.where(inside, 0, -dy * s)
    return (
        torch.empty_like(x).copy_(torch.where(inside, grad, 0)),
        (sum_to(dscale, scale) * grad_factor).to(scale.dtype),
        (sum_to(dzp, scale) * grad_factor).to(scale.dtype),
    )
