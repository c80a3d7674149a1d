"""Stochastic rounding in plain torch, from a counter-based generator.

q = floor(v) + (u < v − floor(v)) + zero_point with v = x/scale and u uniform in [0, 1). The comparison of u with the
fraction is exact, whereas floor(v + u) would round v + u. u depends only on (seed, offset) and on the element's place
in memory: no kernel, device or number of threads can change it, and a second forward pass (activation checkpointing)
repeats the first. Places count in memory order, not in index order, because kernels run through memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..layouts import pack_mask, storage_flat
from .fake_quantize import qparams
from .fake_quantize_learnable import sum_to

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit words, computed in int64 without overflow."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four random words from a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = multiply(c0, MULTIPLIERS[0])
        high1, low1 = multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def uniform(x: Tensor, seed: int, offset: int, offset_tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """u for every element of x: multiples of 2**-24 in [0, 1).

    Element i in memory order takes word i % 4 of Philox at counter (i // 4, offset), both of 64 bits, low word first;
    the key is the seed. u is the word's 24 high bits, as many as an fp32 fraction holds, times 2**-24.
    """
    blocks = torch.arange((x.numel() + 3) // 4, device=x.device)
    number = torch.full((), offset, device=x.device) + (0 if offset_tensor is None else offset_tensor.reshape(()))
    counter = blocks & WORD, blocks >> 32, number & WORD, (number >> 32) & WORD
    words = torch.stack(philox(counter, (seed & WORD, (seed >> 32) & WORD)), 1).reshape(-1)
    u = torch.empty_like(x, dtype=dtype)
    storage_flat(u).copy_((words[: x.numel()] >> 8).to(dtype) * 2.0**-24)
    return u


def round_stochastically(steps: Tensor, u: Tensor) -> Tensor:
    low = steps.floor()
    # The fraction of an infinity is NaN, so the comparison is false, and low + 1 is the infinity again.
    return torch.where(u >= steps - low, low, low + 1)


def fake_quantize_stochastic_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int,
    offset_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the packed mask: set where x was not clipped."""
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.offset(offset_tensor, x)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = round_stochastically(x.to(s.dtype) * inv, uniform(x, seed, offset, offset_tensor, s.dtype)) + z
    y = torch.empty_like(x).copy_((q.clamp(quant_min, quant_max) - z) * s)
    return y, pack_mask((q >= quant_min) & (q <= quant_max), y)


def fake_quantize_stochastic_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int,
    offset_tensor: Tensor | None,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSQ's gradients of x, scale and zero point, with the q that the forward pass drew."""
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.grad(grad, x)
    checks.offset(offset_tensor, x)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    dy, steps = grad.to(s.dtype), x.to(s.dtype) * inv
    q = round_stochastically(steps, uniform(x, seed, offset, offset_tensor, s.dtype)) + z
    inside = (q >= quant_min) & (q <= quant_max)
    dscale = dy * ((q.clamp(quant_min, quant_max) - z) - torch.where(inside, steps, 0))
    dzp = torch.where(inside, 0, -dy * s)
    return (
        torch.empty_like(x).copy_(torch.where(inside, grad, 0)),
        (sum_to(dscale, scale) * grad_factor).to(scale.dtype),
        (sum_to(dzp, scale) * grad_factor).to(scale.dtype),
    )


def quantize_stochastic(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    seed: int,
    offset: int,
    offset_tensor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    checks.range_of_dtype(quant_min, quant_max, dtype)
    checks.fake_quantize(x, scale, zero_point, quant_min, quant_max)
    checks.offset(offset_tensor, x)
    s, inv, z = qparams(x, scale, zero_point, quant_min, quant_max)
    q = round_stochastically(x.to(s.dtype) * inv, uniform(x, seed, offset, offset_tensor, s.dtype)) + z
    q = q.clamp(quant_min, quant_max)
    return torch.empty_like(x, dtype=dtype).copy_(torch.where(q.isnan(), z, q))
