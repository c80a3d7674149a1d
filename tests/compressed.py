"""Weights and configs in the manner of compressed-tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qkernels as qk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def codes(n: int, k: int, bits: int) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(k)
    return ((7 * i + 3 * j + i * j) % (1 << bits) - (1 << bits - 1)).to(torch.int8)


def scales(n: int, groups: int) -> Tensor:
    return (2.0 ** -(torch.arange(n * groups).reshape(n, groups) % 5)).bfloat16()


def scheme(*targets: Any, **weights: Any) -> dict[str, Any]:
    return {"targets": list(targets), "weights": {"type": "int", "symmetric": True, **weights}}


def weight(bits: int, n: int, k: int, groups: int, dtype: torch.dtype, asymmetric: bool = False) -> Any:
    low, high = -(1 << bits - 1), 1 << bits - 1
    q = torch.randint(low, high, (n, k), dtype=torch.int8)
    scale = torch.randn(n, groups).to(dtype)  # of any sign
    if bits == 8:
        return qk.PackedInt8.from_quantized(q, scale)
    zero_point = torch.randint(low, high, (n, groups), dtype=torch.int8) if asymmetric else None
    cls = qk.PackedInt4 if bits == 4 else qk.PackedInt
    return cls.from_quantized(q, scale, zero_point, bits=bits)


def whole() -> dict[str, Tensor]:
    return {
        "a.weight_packed": torch.zeros(10, 8, dtype=torch.int32),
        "a.weight_shape": torch.tensor([10, 64]),
        "a.weight_scale": torch.ones(10, 2),
        "a.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32),
        "norm.weight": torch.ones(3),
    }
