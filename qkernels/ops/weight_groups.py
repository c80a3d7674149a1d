"""Quantizes weights in groups along K, and brings scales and zero points to the shape [N, groups]."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, gemm_checks, layouts
from ..reference.ranges import stored
from .dynamic import quantize_dynamic
from .quantize import quantize


def resolved_group_size(bits: int, group_size: int, k: int, scale_dtype: torch.dtype) -> int:
    """Checks what a weight of 2 to 4 bits is made with and returns the group size, with −1 resolved."""
    gemm_checks.bits(bits)
    gemm_checks.scale_dtype("scale_dtype", torch.empty(0, dtype=scale_dtype))
    group_size = k if group_size == -1 else group_size
    gemm_checks.weight_group_size(group_size, k)
    return group_size


def quantize_groups(
    w: Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K] int8, scales and int8 zero points [N, K/group_size], which has to divide K."""
    checks.finite_weight(w)
    values = w.detach().float().contiguous()
    n, k = w.shape
    size = k if group_size == -1 else group_size
    low, high = layouts.code_range(bits)
    q, scale, zero_point = quantize_dynamic(
        values, bits=bits, group_size=-1 if size == k else size, symmetric=symmetric
    )
    scale = scale.reshape(n, -1).expand(n, layouts.groups_of(k, size))
    zero_point = zero_point.reshape(n, -1).expand_as(scale)
    if scale_dtype != torch.float32:
        if scale_dtype not in gemm_checks.SCALE_DTYPES:
            raise RuntimeError(
                f"scale_dtype: got {scale_dtype}; accepted: torch.float32, torch.bfloat16, torch.float16"
            )
        rounded = stored(scale, scale_dtype)
        if not bool(rounded.isfinite().all()):
            raise ValueError(f"w: got scales up to {float(scale.max()):g}; accepted: what {scale_dtype} holds")
        scale = rounded
        if not symmetric and k:  # a subnormal scale may be rounded up by half, which moves the zero point
            least = values.view(n, -1, size).amin(2).clamp(max=0)
            own = (low - (least / scale.float()).round()).clamp(low, high).to(torch.int32)
            zero_point = torch.where(scale < torch.finfo(scale_dtype).tiny, own, zero_point)
        q = quantize(values, scale.float(), zero_point, quant_min=low, quant_max=high)
    return q, scale, None if symmetric else zero_point.to(torch.int8)


def grouped(name: str, t: Tensor, n: int, k: int, groups: int | None = None) -> Tensor:
    """t as [N, groups]; K must be divisible into that number of groups."""
    t = t.detach()
    if t.numel() == 1 or t.shape == (n,):
        t = t.reshape(-1, 1).expand(n, 1)
    fits = t.dim() == 2 and t.shape[0] == n and (groups is None or t.shape[1] == groups)
    if fits and groups is None:
        per = t.shape[1]
        fits = per == 1 or (per > 0 and k % per == 0 and k // per >= 16 and k // per % 8 == 0)
    accepted = f"one element, [{n}] or [{n}, K / group_size] with group_size K = {k} or a multiple of 8 from 16 on"
    checks.require(
        fits,
        f"{name}: got shape {list(t.shape)}; accepted: {accepted if groups is None else [n, groups]}",
    )
    return t
