"""Fake quantization in plain torch.

y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale. Arithmetic is fp32 (fp64 for
fp64 inputs), 1/scale is taken once, rounding is half to even, and the output is rounded once to x's dtype. The shape of
scale is the granularity: one element, or x's rank with every dim dividing x's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import pack_mask, unpack_mask

EXACT_INT = 2**24  # every integer up to here is an fp32


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_dense(name: str, t: Tensor) -> None:
    """Raises RuntimeError where t is not plain values in strided memory."""
    if not isinstance(t, Tensor):  # what stands for one, where a graph is traced
        return
    if t.is_nested:
        got, way = "a nested tensor", "as its unbind() gives"
    elif t.is_quantized:
        got, way = f"a quantized tensor of {t.dtype}", "as dequantize() and int_repr() give"
    elif t.layout is not torch.strided:
        got, way = f"a tensor of layout {t.layout}", "as to_dense() gives"
    else:
        return
    raise RuntimeError(f"{name}: got {got}; accepted: a dense tensor of layout torch.strided, {way}")


def check_input(x: Tensor, quant_min: int, quant_max: int) -> None:
    """Raises RuntimeError where x or the range is not one that can be quantized."""
    if not x.is_floating_point():
        raise RuntimeError(f"x: got {x.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16")
    if quant_min > quant_max:
        raise RuntimeError(f"quant_min: got {quant_min}, above quant_max {quant_max}; accepted: at most quant_max")
    if quant_min < -EXACT_INT or quant_max > EXACT_INT:
        raise RuntimeError(
            f"quant_min, quant_max: got {quant_min}, {quant_max}; accepted: {-EXACT_INT} to {EXACT_INT}, the integers "
            "that fp32 holds exactly"
        )


def check(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    """Raises RuntimeError where the arguments of a fake-quantize op do not fit together."""
    check_input(x, quant_min, quant_max)
    for name, param in (("scale", scale), ("zero_point", zero_point)):
        if param is None:
            continue
        if param.device != x.device:
            raise RuntimeError(f"{name}: got a tensor on {param.device}; accepted: x's device, {x.device}")
        check_granularity(name, param, x)
    if not scale.is_floating_point():
        raise RuntimeError(f"scale: got {scale.dtype}; accepted: a floating dtype")
    if zero_point is not None:
        if zero_point.numel() not in (1, scale.numel()):
            raise RuntimeError(
                f"zero_point: got shape {list(zero_point.shape)}; accepted: one element or scale's shape "
                f"{list(scale.shape)}"
            )
        # Values are looked at only where that costs no synchronisation, and where there is one of each.
        seen = x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(zero_point)
        if seen and not zero_point.is_floating_point() and zero_point.numel():
            check_zero_point(int(zero_point.min()), int(zero_point.max()), quant_min, quant_max)


def check_zero_point(low: int, high: int, quant_min: int, quant_max: int) -> None:
    if low < quant_min or high > quant_max:
        raise RuntimeError(
            f"zero_point: got {low if low < quant_min else high}; accepted: quant_min to quant_max, {quant_min} to "
            f"{quant_max}"
        )


def check_granularity(name: str, param: Tensor, x: Tensor) -> None:
    if param.numel() == 1:
        return
    if param.dim() != x.dim() or any(p != n and (p == 0 or n % p) for p, n in zip(param.shape, x.shape, strict=True)):
        raise RuntimeError(
            f"{name}: got shape {list(param.shape)}; accepted: one element, or {x.dim()} dims that each divide x's "
            f"shape {list(x.shape)}"
        )


def check_grad(grad: Tensor, x: Tensor) -> None:
    if grad.dtype != x.dtype:
        raise RuntimeError(f"grad: got {grad.dtype}; accepted: x's dtype, {x.dtype}")
    if grad.shape != x.shape:
        raise RuntimeError(f"grad: got shape {list(grad.shape)}; accepted: x's shape {list(x.shape)}")


def expand(param: Tensor, x: Tensor) -> Tensor:
    """``param`` repeated to the blocks of x that it speaks for."""
    if param.numel() == 1:
        return param.reshape(())
    for dim, (blocks, size) in enumerate(zip(param.shape, x.shape, strict=True)):
        if 1 < blocks < size:
            param = param.repeat_interleave(size // blocks, dim)
    return param


def qparams(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """scale, 1/scale and zero point in the compute dtype, expanded to x.

    A scale below the smallest normal fp32 acts as that value; a negative or NaN one gives NaN. A float zero point is
    rounded half to even and clamped into the range, forward and backward alike; an integer one outside it, which
    ``check`` cannot see on a GPU, gives NaN.
    """
    dtype = compute_dtype(x)
    s = expand(scale.detach(), x).to(dtype)
    s = torch.where(s < 0, torch.nan, s.clamp(min=torch.finfo(torch.float32).tiny))
    if zero_point is None:
        z = torch.zeros((), dtype=dtype, device=x.device)
    else:
        z = expand(zero_point.detach(), x).to(dtype)
        if zero_point.is_floating_point():
            z = z.round().clamp(quant_min, quant_max)
        else:
            z = torch.where((z < quant_min) | (z > quant_max), torch.nan, z)
    return s, 1 / s, z


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    check(x, scale, zero_point, quant_min, quant_max)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = (x.to(s.dtype) * inv).round() + z
    return torch.empty_like(x).copy_((q.clamp(quant_min, quant_max) - z) * s)


def inside_range(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> Tensor:
    """Where the gradient of x passes: a bool tensor, False for NaN.

    The rounded code lies in the range, bounds included: nothing is clipped. Or, with lsq, x/scale + zero_point lies in
    it before rounding, bounds excluded.
    """
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    return counts_inside(x.to(s.dtype) * inv, z, quant_min, quant_max, lsq)


def counts_inside(steps: Tensor, z: Tensor, quant_min: int, quant_max: int, lsq: bool) -> Tensor:
    if lsq:
        return (steps > quant_min - z) & (steps < quant_max - z)
    q = steps.round() + z
    return (q >= quant_min) & (q <= quant_max)


def fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, lsq: bool = False
) -> tuple[Tensor, Tensor]:
    y = fake_quantize_forward(x, scale, zero_point, quant_min, quant_max)
    return y, pack_mask(inside_range(x, scale, zero_point, quant_min, quant_max, lsq), y)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    lsq: bool = False,
) -> Tensor:
    check(x, scale, zero_point, quant_min, quant_max)
    check_grad(grad, x)
    inside = inside_range(x, scale, zero_point, quant_min, quant_max, lsq)
    return torch.empty_like(x).copy_(torch.where(inside, grad, 0))


def check_mask(mask: Tensor, grad: Tensor) -> None:
    if mask.numel() != (grad.numel() + 7) // 8:
        raise RuntimeError(
            f"mask: got {mask.numel()} bytes; accepted: one bit for each of grad's {grad.numel()} elements"
        )


def fake_quantize_backward_mask(grad: Tensor, mask: Tensor) -> Tensor:
    check_mask(mask, grad)
    return torch.where(unpack_mask(mask, grad), grad, 0)
