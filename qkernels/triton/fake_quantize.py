"""Fake quantization in Triton: elementwise bit for bit as the reference; sums in a fixed order, without atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import fake_quantize as reference
from . import configs, granularity
from .granularity import block_index, block_params, granularity_of
from .launch import launch
from .numerics import clamp, is_inside, narrow, rint, store_bits, widen


def unsupported(op: str, *args: Any) -> str | None:
    """Why the kernels do not take a call of ``op``, or None."""
    if op in ("fake_quantize_forward", "fake_quantize_forward_mask"):
        return granularity.unsupported(args[0], args[1])
    if op in ("fake_quantize_backward", "fake_quantize_learnable_backward"):
        return granularity.unsupported(args[1], args[2])
    if op == "observe_fake_quantize":
        return granularity.unsupported(args[0], args[5])
    return None


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the memory layout of ``like``, a dense tensor of its shape."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)


def dense_and_like(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """x in a memory layout without gaps and an empty tensor in the same one, which is that of ``empty_like``."""
    y = torch.empty_like(x, dtype=dtype)
    return laid_out(x, y), y


def empty_mask(x: Tensor) -> Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def zero_point_kind(scale: Tensor, zero_point: Tensor | None) -> int:
    """The kernels' ZERO_POINT: 0 none, 1 one for each scale, 2 one for all."""
    return 0 if zero_point is None else 1 if zero_point.numel() == scale.numel() else 2


@triton.jit(do_not_specialize=["view"])
def forward_kernel(
    x_ptr, y_ptr, mask_ptr, scale, zero_point, quant_min, quant_max, numel, view,
    MASK: tl.constexpr, ZERO_POINT: tl.constexpr, MODE: tl.constexpr, DIGITS: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = block_index(MODE, BLOCK, INNER)
    here = index < numel - start
    x = widen(tl.load(x_ptr + start + index, mask=here))
    low, high = tl.cast(quant_min, x.dtype), tl.cast(quant_max, x.dtype)
    s, inv, z = block_params(
        start, index, scale, zero_point, low, high, view, x.dtype, ZERO_POINT, MODE, DIGITS, WRAP, BLOCK, INNER
    )
    q = rint(x * inv) + z
    y = (clamp(q, low, high) - z) * s
    tl.store(y_ptr + start + index, narrow(y, y_ptr.dtype.element_ty), mask=here)
    if MASK:
        store_bits(mask_ptr, is_inside(q, low, high) & here, start, numel, BLOCK)


def _forward(
    x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int, y: Tensor, mask: Tensor | None
) -> None:
    """Fills y and mask; x is dense and its scale a tensor, or a number."""
    numel = x.numel()
    if numel == 0:
        return
    block = configs.pointwise(numel)
    if isinstance(scale, Tensor):
        walk = granularity_of(x, scale)
        view, rest = walk.view, configs.walk(walk, block)
        rest["ZERO_POINT"] = zero_point_kind(scale, zero_point)
        scale = scale.contiguous()
        zero_point = zero_point if zero_point is None else zero_point.contiguous()
    else:
        view, rest = granularity.ONE_CHANNEL.view, configs.by_numbers(block)
        rest["ZERO_POINT"] = 0
    launch(
        forward_kernel, (triton.cdiv(numel, block),), x, y, mask, scale, zero_point, float(quant_min),
        float(quant_max), numel, view, MASK=mask is not None, **rest,
    )  # fmt: skip


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    reference.check(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    _forward(x, scale, zero_point, quant_min, quant_max, y, None)
    return y


def fake_quantize_forward_mask(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    reference.check(x, scale, zero_point, quant_min, quant_max)
    x, y = dense_and_like(x)
    mask = empty_mask(x)
    _forward(x, scale, zero_point, quant_min, quant_max, y, mask)
    return y, mask
