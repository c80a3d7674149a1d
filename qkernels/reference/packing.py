"""Low-bit codes in dense bytes: a stream of b-bit two's complement codes along the last dim, low bits first."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gemm_checks, layouts


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Eight codes fill ``bits`` whole bytes: each group of eight becomes one integer, and that integer its bytes."""
    gemm_checks.pack_bits(q, bits)
    if q.device.type == "cpu":
        gemm_checks.codes_of_bits("q", q, bits)
    k = q.shape[-1]
    eights = torch.nn.functional.pad(q, (0, -k % 8)).unflatten(-1, (-1, 8)).to(torch.int32) & (1 << bits) - 1
    stream = torch.zeros_like(eights[..., 0])
    for i in range(8):
        stream |= eights[..., i] << i * bits  # 8 codes of 4 bits fill an int32 with its sign bit
    octets = torch.stack([stream >> 8 * i & 255 for i in range(bits)], -1).to(torch.uint8)
    return octets.flatten(-2)[..., : layouts.packed_length(k, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    gemm_checks.unpack_bits(packed, bits, k)
    octets = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    stream = torch.zeros_like(octets[..., 0])
    for i in range(bits):
        stream |= octets[..., i] << 8 * i
    sign = 1 << bits - 1
    codes = [((stream >> i * bits & (1 << bits) - 1) ^ sign) - sign for i in range(8)]
    return torch.stack(codes, -1).to(torch.int8).flatten(-2)[..., :k].contiguous()
