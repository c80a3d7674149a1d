"""The rules of arguments, each once: what Python kernels and layers refuse, in the words of the C++ and CUDA kernels.

The rules that many ops share come first, then those of single ops under their names. Every function returns or raises
RuntimeError with "name: got …; accepted: …". No function looks at values on a GPU, because that would wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EXACT_INT = 2**24  # fp32 holds every integer up to this magnitude
MAX_BINS = 2**20
LEVELS = (2, 256)  # the least and the largest number of levels of a codebook
CODE_DTYPES = (torch.int8, torch.uint8, torch.int32)
ACTIVATIONS = ("none", "relu", "gelu", "silu")
# The straight-through conventions beside "clip". The ops of "clip" take "lsq" as an argument; those of WITH_TERMS have
# terms of their own.
WITH_TERMS = ("pass", "pact", "ewgs")
VARIANTS = ("lsq", *WITH_TERMS)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def dense(name: str, t: Tensor) -> None:
    """t holds plain values in strided memory."""
    if not isinstance(t, Tensor):  # a Proxy, while torch.fx traces
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


def values(name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise RuntimeError(
            f"{name}: got {t.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16"
        )


def floating(name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise RuntimeError(f"{name}: got {dtype}; accepted: a floating dtype")


def device(name: str, t: Tensor, other: Tensor, of: str = "x") -> None:
    if t.device != other.device:
        raise RuntimeError(f"{name}: got a tensor on {t.device}; accepted: {of}'s device, {other.device}")


def quant_range(quant_min: int, quant_max: int) -> None:
    if quant_min > quant_max:
        raise RuntimeError(f"quant_min: got {quant_min}, above quant_max {quant_max}; accepted: at most quant_max")
    if quant_min < -EXACT_INT or quant_max > EXACT_INT:
        raise RuntimeError(
            f"quant_min, quant_max: got {quant_min}, {quant_max}; accepted: {-EXACT_INT} to {EXACT_INT}, the integers "
            "that fp32 holds exactly"
        )


def floats_and_range(x: Tensor, quant_min: int, quant_max: int) -> None:
    values("x", x)
    quant_range(quant_min, quant_max)


def int8_range(quant_min: int, quant_max: int) -> None:
    require(
        -128 <= quant_min < quant_max <= 127,
        f"quant_min, quant_max: got {quant_min}, {quant_max}; accepted: -128 <= quant_min < quant_max <= 127",
    )


def code_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in CODE_DTYPES:
        raise RuntimeError(f"{name}: got {dtype}; accepted: torch.int8, torch.uint8, torch.int32")


def range_of_dtype(quant_min: int, quant_max: int, dtype: torch.dtype) -> None:
    """dtype can hold every code of the range."""
    code_dtype("dtype", dtype)
    info = torch.iinfo(dtype)
    if quant_min < info.min or quant_max > info.max:
        raise RuntimeError(
            f"quant_min, quant_max: got {quant_min}, {quant_max}; accepted: what {dtype} holds, {info.min} to "
            f"{info.max}"
        )


def zero_point_value(zero_point: int, quant_min: int, quant_max: int) -> None:
    if not quant_min <= zero_point <= quant_max:
        raise RuntimeError(
            f"zero_point: got {zero_point}; accepted: quant_min to quant_max, {quant_min} to {quant_max}"
        )


def granularity(name: str, param: Tensor, x: Tensor) -> None:
    """param has one element, or dims that each divide x's."""
    if param.numel() == 1:
        return
    if param.dim() != x.dim() or any(p != n and (p == 0 or n % p) for p, n in zip(param.shape, x.shape, strict=True)):
        raise RuntimeError(
            f"{name}: got shape {list(param.shape)}; accepted: one element, or {x.dim()} dims that each divide x's "
            f"shape {list(x.shape)}"
        )


def scale_of(scale: Tensor, x: Tensor) -> None:
    device("scale", scale, x)
    granularity("scale", scale, x)
    floating("scale", scale.dtype)


def scale_and_zero_point(scale: Tensor, zero_point: Tensor | None, x: Tensor) -> None:
    """Both have a granularity of x; zero_point has scale's or one element."""
    for name, param in (("scale", scale), ("zero_point", zero_point)):
        if param is not None:
            device(name, param, x)
            granularity(name, param, x)
    floating("scale", scale.dtype)
    if zero_point is not None and zero_point.numel() not in (1, scale.numel()):
        raise RuntimeError(
            f"zero_point: got shape {list(zero_point.shape)}; accepted: one element or scale's shape "
            f"{list(scale.shape)}"
        )


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    """The rules of every op with a scale, a zero point and a range."""
    floats_and_range(x, quant_min, quant_max)
    scale_and_zero_point(scale, zero_point, x)
    if zero_point is None:
        return
    # Values are checked only without synchronisation, and not under vmap, which has many for one.
    seen = x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(zero_point)
    if seen and not zero_point.is_floating_point():
        z = zero_point.long()
        outside = z[(z < quant_min) | (z > quant_max)]
        zero_point_value(int(outside[0]) if outside.numel() else quant_min, quant_min, quant_max)


def finite_weight(w: Tensor) -> None:
    """w is a finite floating matrix, else ValueError."""
    dense("w", w)
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w: got {w.dtype} of shape {list(w.shape)}; accepted: floating [N, K]")
    if not bool(w.detach().float().isfinite().all()):
        raise ValueError("w: got NaN or infinite values; accepted: finite weights")


def grad(grad: Tensor, x: Tensor) -> None:
    device("grad", grad, x)
    if grad.dtype != x.dtype:
        raise RuntimeError(f"grad: got {grad.dtype}; accepted: x's dtype, {x.dtype}")
    if grad.shape != x.shape:
        raise RuntimeError(f"grad: got shape {list(grad.shape)}; accepted: x's shape {list(x.shape)}")


def mask(mask: Tensor, grad: Tensor) -> None:
    values("grad", grad)
    device("mask", mask, grad, "grad")
    if mask.dtype != torch.uint8 or mask.numel() != (grad.numel() + 7) // 8 or not mask.is_contiguous():
        raise RuntimeError(
            f"mask: got {mask.dtype} of shape {list(mask.shape)}; accepted: contiguous torch.uint8, one bit for each "
            f"of grad's {grad.numel()} elements"
        )


def straight_through(variant: str, ewgs_delta: float, accepted: tuple[str, ...]) -> None:
    if variant not in accepted:
        raise RuntimeError(f"straight_through: got '{variant}'; accepted: {', '.join(accepted)}")
    if not 0 <= ewgs_delta < math.inf:
        raise RuntimeError(f"ewgs_delta: got {ewgs_delta:g}; accepted: finite, at least 0")


def clip_or_lsq(variant: str) -> None:
    straight_through(variant, 0.0, ("clip", "lsq"))


def dynamic(x: Tensor, group_size: int) -> None:
    """x can be quantized in groups of its last dim (−1: whole rows, 0: the whole tensor)."""
    values("x", x)
    if group_size == 0:
        return
    if x.dim() == 0:
        raise RuntimeError("x: got 0 dims; accepted: at least 1, or group_size None")
    if group_size < -1 or (group_size > 0 and x.shape[-1] % group_size):
        raise RuntimeError(
            f"group_size: got {group_size}; accepted: -1 (a row), None (the whole tensor), or a divisor of x's last "
            f"dim {x.shape[-1]}"
        )


def dynamic_range(quant_min: int, quant_max: int, dtype: torch.dtype | None) -> None:
    """The range of an op that takes scales from x itself; dtype of its codes, or None for fake quantization."""
    if dtype is not None:
        range_of_dtype(quant_min, quant_max, dtype)
    quant_range(quant_min, quant_max)


def channel_views(x: Tensor, axis: int, *params: Tensor) -> list[Tensor]:
    """Views of per-channel [C] parameters with x's rank, so that their granularity is dim ``axis`` of x."""
    dims = x.dim()
    if not -dims <= axis < dims:
        raise RuntimeError(f"axis: got {axis}; accepted: {-dims} to {dims - 1}, x has {dims} dims")
    shape = [1] * dims
    axis %= dims
    shape[axis] = channels = x.size(axis)
    for name, param in zip(("scale", "zero_point", "running_min", "running_max"), params, strict=False):
        if param.dim() != 1 or param.numel() != channels:
            raise RuntimeError(
                f"{name}: got shape {list(param.shape)}; accepted: one value for each of x's {channels} channels "
                f"(dim {axis})"
            )
    return [param.view(shape) for param in params]


def bytes_mask(mask: Tensor, grad: Tensor) -> None:
    values("grad", grad)
    if mask.dtype != torch.bool or mask.shape != grad.shape:
        raise RuntimeError(
            f"mask: got {mask.dtype} of shape {list(mask.shape)}; accepted: torch.bool of grad's shape "
            f"{list(grad.shape)}"
        )


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
    code_dtype("q", q.dtype)
    floating("dtype", dtype)
    scale_and_zero_point(scale, zero_point, q)


def codebook_of(codebook: Tensor, x: Tensor) -> None:
    floating("codebook", codebook.dtype)
    if codebook.dim() != 1 or not LEVELS[0] <= codebook.numel() <= LEVELS[1]:
        raise RuntimeError(f"codebook: got shape {list(codebook.shape)}; accepted: one dim of 2 to 256 levels")
    device("codebook", codebook, x)


def codebook(x: Tensor, scale: Tensor, codebook: Tensor) -> None:
    values("x", x)
    scale_of(scale, x)
    codebook_of(codebook, x)


def dequantize_codebook(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> None:
    if codes.dtype != torch.uint8:
        raise RuntimeError(f"codes: got {codes.dtype}; accepted: torch.uint8")
    floating("dtype", dtype)
    scale_of(scale, codes)
    codebook_of(codebook, codes)


def offset(offset_tensor: Tensor | None, x: Tensor) -> None:
    """The offset tensor of stochastic rounding."""
    if offset_tensor is None:
        return
    if offset_tensor.dtype != torch.int64 or offset_tensor.numel() != 1:
        raise RuntimeError(
            f"offset: got {offset_tensor.dtype} of shape {list(offset_tensor.shape)}; accepted: an int, or one "
            "torch.int64 element on x's device"
        )
    device("offset", offset_tensor, x)


def observe(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> None:
    floats_and_range(x, quant_min, quant_max)
    for name, stat in (("running_min", running_min), ("running_max", running_max), ("scale", scale)):
        device(name, stat, x)
        granularity(name, stat, x)
        if stat.dtype != torch.float32 or not stat.is_contiguous() or stat.numel() != scale.numel():
            raise RuntimeError(
                f"{name}: got {stat.dtype} of shape {list(stat.shape)}; accepted: contiguous torch.float32 of one "
                "shape for all statistics"
            )
    device("zero_point", zero_point, x)
    granularity("zero_point", zero_point, x)
    integers = zero_point.dtype in (torch.int32, torch.int64)
    if not integers or not zero_point.is_contiguous() or zero_point.numel() != scale.numel():
        raise RuntimeError(
            f"zero_point: got {zero_point.dtype} of shape {list(zero_point.shape)}; accepted: contiguous torch.int32 "
            f"or torch.int64 of scale's shape {list(scale.shape)}"
        )
    for name, flag in (("observer_on", observer_on), ("fake_quant_on", fake_quant_on)):
        device(name, flag, x)
        if flag.numel() != 1:
            raise RuntimeError(f"{name}: got shape {list(flag.shape)}; accepted: one element, on x's device")


def follow_range(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, up: float, down: float
) -> None:
    floats_and_range(x, quant_min, quant_max)
    scale_and_zero_point(scale, zero_point, x)
    if scale.dtype != torch.float32 or not scale.is_contiguous():
        raise RuntimeError(f"scale: got {scale.dtype} of shape {list(scale.shape)}; accepted: contiguous torch.float32")
    for name, part in (("up", up), ("down", down)):
        if not 0 <= part <= 1:
            raise RuntimeError(f"{name}: got {part:g}; accepted: 0 to 1")
    if zero_point is None:
        return
    whole = up in (0, 1) and down in (0, 1)
    dtype = zero_point.dtype
    fits = dtype.is_floating_point or (dtype == torch.int32 and whole)
    if not fits or not zero_point.is_contiguous() or zero_point.numel() != scale.numel():
        raise RuntimeError(
            f"zero_point: got {dtype} of shape {list(zero_point.shape)} with up {up:g} and down {down:g}; accepted: "
            f"contiguous, of scale's shape {list(scale.shape)} and a floating dtype, or torch.int32 where up and down "
            "are 0 or 1"
        )


def foreach(xs: Sequence[Tensor], **others: Sequence[object]) -> None:
    """All lists have one length, and the tensors are on one device."""
    for name, given in others.items():
        if len(given) != len(xs):
            raise RuntimeError(f"{name}: got {len(given)} values; accepted: one for each of the {len(xs)} tensors")
    devices = [x.device for x in xs]
    for at, device in enumerate(devices):
        if device != devices[0]:
            raise RuntimeError(f"xs[{at}]: got a tensor on {device}; accepted: the first one's device, {devices[0]}")


def quantize_transposed(x: Tensor, quant_max: int) -> None:
    if x.dim() != 2:
        raise RuntimeError(f"x: got shape {list(x.shape)}; accepted: 2 dims")
    values("x", x)
    if not 1 <= quant_max <= 127:
        raise RuntimeError(f"quant_max: got {quant_max}; accepted: 1 to 127")


def rms_norm(x: Tensor, weight: Tensor | None, group_size: int) -> None:
    dynamic(x, group_size)
    if x.dim() == 0:
        raise RuntimeError("x: got 0 dims; accepted: at least 1, the last of which is normalised")
    if weight is None:
        return
    values("weight", weight)
    if weight.shape != x.shape[-1:]:
        raise RuntimeError(f"weight: got shape {list(weight.shape)}; accepted: x's last dim, {list(x.shape[-1:])}")
    device("weight", weight, x)


def rms_norm_rstd(rstd: Tensor, x: Tensor) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if rstd.dtype != dtype or rstd.shape != (*x.shape[:-1], 1):
        raise RuntimeError(
            f"rstd: got {rstd.dtype} of shape {list(rstd.shape)}; accepted: what the forward op gave, {dtype} of shape "
            f"{[*x.shape[:-1], 1]}"
        )
    device("rstd", rstd, x)


def silu_mul(gate: Tensor, up: Tensor, group_size: int) -> None:
    values("gate", gate)
    if up.dtype != gate.dtype:
        raise RuntimeError(f"up: got {up.dtype}; accepted: gate's dtype, {gate.dtype}")
    if up.shape != gate.shape:
        raise RuntimeError(f"up: got shape {list(up.shape)}; accepted: gate's shape {list(gate.shape)}")
    device("up", up, gate, "gate")
    dynamic(gate, group_size)


def histogram(x: Tensor, low: Tensor, high: Tensor, bins: int) -> None:
    values("x", x)
    if not 1 <= bins <= MAX_BINS:
        raise RuntimeError(f"bins: got {bins}; accepted: 1 to {MAX_BINS}")
    for name, param in (("low", low), ("high", high)):
        device(name, param, x)
        floating(name, param.dtype)
        granularity(name, param, x)
    if high.shape != low.shape:
        raise RuntimeError(f"high: got shape {list(high.shape)}; accepted: low's shape {list(low.shape)}")


def quantization_errors(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    floats_and_range(x, quant_min, quant_max)
    floating("scale", scale.dtype)
    for name, param in (("scale", scale), ("zero_point", zero_point)):
        if param is not None:
            device(name, param, x)
    if scale.dim() == 0:
        raise RuntimeError("scale: got 0 dims; accepted: a first dim for the candidates, then the granularity")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise RuntimeError(
            f"zero_point: got shape {list(zero_point.shape)}; accepted: scale's shape {list(scale.shape)}"
        )
    granularity("scale[0]", scale.new_empty(scale.shape[1:]), x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        device(name, t, q, "q")
        require(
            t.dtype == torch.float32 and t.dim() == 4,
            f"{name}: got {t.dtype} of shape {list(t.shape)}; accepted: torch.float32 [batch, heads, rows, size]",
        )
    batch, heads, _, size = q.shape
    require(
        k.shape[0] == batch and k.shape[1] > 0 and heads % k.shape[1] == 0 and k.shape[2] > 0 and k.shape[3] == size,
        f"k: got shape {list(k.shape)}; accepted: [{batch}, a divisor of {heads}, at least 1, {size}]",
    )
    require(
        v.shape[:3] == k.shape[:3],
        f"v: got shape {list(v.shape)}; accepted: k's shape but for the last dim, {list(k.shape)}",
    )
