"""Fake quantization in plain torch.

y = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale. Arithmetic is fp32 (fp64 for
fp64 inputs), 1/scale is taken once, rounding is half to even, and the output is rounded once to x's dtype. The shape of
scale is the granularity: one element, or x's rank with every dim dividing x's.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def sum_to(terms: Tensor, param: Tensor) -> Tensor:
    """The adjoint of ``expand``: sums over the blocks, in fp64."""
    terms = terms.double()
    if param.numel() == 1:
        return terms.sum().reshape(param.shape)
    split = [n for p, size in zip(param.shape, terms.shape, strict=True) for n in (p, size // max(p, 1))]
    return terms.reshape(split).sum(dim=tuple(range(1, len(split), 2)))


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

    dscale sums dy·{quant_min − zp | quant_max − zp | (q − zp) − x/scale} (below, above, inside the range), dzp sums
    −dy·scale over what is outside; both times grad_factor. With lsq the range is asked of x/scale + zp before rounding,
    bounds excluded, as in both papers; else of q, bounds included, as torch does.
    """
    check(x, scale, zero_point, quant_min, quant_max)
    check_grad(grad, x)
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


def fake_quantize_dynamic_forward(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, scale, zero point (int32) and the packed mask, with ranges taken from each group of x itself."""
    scale, zero_point = dynamic_qparams(x, group_size, quant_min, quant_max, symmetric)
    y, mask = fake_quantize_forward_mask(x, scale, zero_point, quant_min, quant_max)
    return y, scale, zero_point, mask if not symmetric else mask.new_empty(0)


def dynamic_qparams(
    x: Tensor, group_size: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and int32 zero point of each group: of the whole of x (0), of each row (-1), of group_size elements."""
    check_group_size(x, group_size)
    values = x.detach().to(compute_dtype(x))
    rows = x.shape[:-1]
    shape = [1] * x.dim() if group_size == 0 else [*rows, 1 if group_size == -1 else x.shape[-1] // group_size]
    count = torch.Size(shape).numel()
    groups = values.reshape(count, values.numel() // max(count, 1))
    if groups.shape[1] == 0:
        groups = groups.new_zeros(groups.shape[0], 1)
    scale, zero_point = qparams_of_range(groups.amin(1), groups.amax(1), quant_min, quant_max, symmetric, 0.0)
    return scale.reshape(shape), zero_point.reshape(shape)


def check_group_size(x: Tensor, group_size: int) -> None:
    if not x.is_floating_point():
        raise RuntimeError(f"x: got {x.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16")
    if group_size == 0:
        return
    if x.dim() == 0:
        raise RuntimeError("x: got 0 dims; accepted: at least 1, or group_size None")
    if group_size < -1 or (group_size > 0 and x.shape[-1] % group_size):
        raise RuntimeError(
            f"group_size: got {group_size}; accepted: -1 (a row), None (the whole tensor), or a divisor of x's last "
            f"dim {x.shape[-1]}"
        )


def qparams_of_range(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and int32 zero point that cover [low, high] and zero.

    Symmetric: scale = max(|low|, |high|) / ((quant_max − quant_min) // 2), so that neither end is ever clipped, and
    the zero point is the middle code. Asymmetric: scale = (high − low) / (quant_max − quant_min), also where high − low
    is beyond the dtype; zero point quant_min − round(low / scale). Scales are floored at eps and at the smallest normal
    fp32.
    """
    low, high = within_reach(low.clamp(max=0)), within_reach(high.clamp(min=0))
    floor = max(eps, torch.finfo(torch.float32).tiny)
    if symmetric:
        half = (quant_max - quant_min) // 2
        scale = (torch.maximum(-low, high) / half).clamp(min=floor)
        return scale, torch.full_like(scale, quant_max - half, dtype=torch.int32)
    scale = step_of(low, high, quant_max - quant_min).clamp(min=floor)
    zero_point = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(quant_min).to(torch.int32)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A positive scale as the nearest that dtype holds and quantizers take: at least fp16's smallest subnormal."""
    info = torch.finfo(dtype)
    return scale.to(dtype).clamp(min=max(info.tiny * info.eps, torch.finfo(torch.float32).tiny))


def within_reach(end: Tensor) -> Tensor:
    """The end of a range; a finite one less than four roundings below the dtype's largest number, as it is there.

    Without that, the multiple of a scale that was rounded up would be infinite where the end is not.
    """
    top = torch.finfo(end.dtype).max * (1 - 2.0**-22)
    return torch.where(end.isinf(), end, end.clamp(-top, top))


def step_of(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """(high − low) / steps, as half the range over half the steps: the same bits, and no range overflows."""
    return (high * 0.5 - low * 0.5) / (steps * 0.5)


def storage_flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order they lie in memory."""
    return torch.as_strided(t, (t.numel(),), (1,))


def pack_mask(inside: Tensor, like: Tensor) -> Tensor:
    """One bit per element in the storage order of ``like``, low bit first."""
    flat = storage_flat(torch.empty_like(like, dtype=torch.bool).copy_(inside))
    bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)  # made there: a list would be copied, a sync
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask[:, None] >> shifts) & 1).reshape(-1)[: like.numel()].bool()
    inside = torch.empty_like(like, dtype=torch.bool)
    storage_flat(inside).copy_(bits)
    return inside


def observe_fake_quantize(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    symmetric_steps: float,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    """Moving-average observer and fake quantization in one: updates the four statistics in place, returns y and mask.

    running += averaging_const · (batch − running), from the first batch on where running is infinite. Statistics are
    fp32 and have the shape of scale. symmetric_steps is the number of steps that cover max(|min|, |max|), with the
    zero point symmetric_zero_point; 0 means asymmetric. A batch that is empty or whose range is not finite leaves the
    statistics as they are.
    """
    check_granularity("running_min", running_min, x)
    low, high = range_of(x, running_min)
    learn = observer_on.bool() & low.isfinite() & high.isfinite()
    for running, batch in ((running_min, low), (running_max, high)):
        running.copy_(torch.where(learn, moving_average(running, batch, averaging_const), running))
    s, z = observed_qparams(running_min, running_max, quant_min, quant_max, symmetric_steps, symmetric_zero_point)
    scale.copy_(torch.where(learn, s, scale))
    zero_point.copy_(torch.where(learn, z, zero_point))
    y, mask = fake_quantize_forward_mask(x, scale, zero_point, quant_min, quant_max)
    on = fake_quant_on.bool().reshape(())
    return torch.where(on, y, x, out=torch.empty_like(x)), torch.where(on, mask, 255)


def moving_average(running: Tensor, batch: Tensor, averaging_const: float) -> Tensor:
    """running + averaging_const · (batch − running), also where that difference is beyond fp32."""
    momentum = torch.full_like(running, averaging_const)
    distance = batch - running
    near, far = running + momentum * distance, (1 - momentum) * running + momentum * batch
    return torch.where(running.isinf(), batch, torch.where(distance.isinf(), far, near))


def range_of(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block of x that one element of ``stats`` speaks for; NaN where x holds one."""
    if x.numel() == 0:
        return torch.full_like(stats, torch.inf), torch.full_like(stats, -torch.inf)
    x = x.detach().float()
    if stats.numel() == 1:
        return x.amin().reshape(stats.shape), x.amax().reshape(stats.shape)
    split = [n for p, size in zip(stats.shape, x.shape, strict=True) for n in (p, size // p)]
    blocks = x.reshape(split)
    inner = tuple(range(1, len(split), 2))
    return blocks.amin(inner), blocks.amax(inner)


def observed_qparams(
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric_steps: float,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    """As torch.ao's observers by default: the scale is floored at fp32's epsilon."""
    low, high = within_reach(low.clamp(max=0)), within_reach(high.clamp(min=0))
    eps = torch.finfo(torch.float32).eps
    if symmetric_steps:
        scale = (torch.maximum(-low, high) / symmetric_steps).clamp(min=eps)
        return scale, torch.full_like(scale, symmetric_zero_point, dtype=torch.int32)
    scale = step_of(low, high, quant_max - quant_min).clamp(min=eps)
    return scale, (quant_min - (low / scale).round()).clamp(quant_min, quant_max).to(torch.int32)
