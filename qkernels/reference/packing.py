"""Low-bit codes in dense bytes: a stream of b-bit two's complement codes along the last dim, low bits first."""

from __future__ import annotations

import torch
from torch import Tensor

from .int8_gemm import check

BITS = (2, 3, 4)


def code_range(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def packed_length(k: int, bits: int) -> int:
    """Bytes of a row of k codes; the bits beyond the last code are zeros."""
    return (k * bits + 7) // 8


def check_bits(bits: int) -> None:
    check(bits in BITS, f"bits: got {bits}; accepted: 2, 3, 4")


def check_pack(q: Tensor, bits: int) -> None:
    check_bits(bits)
    check(q.dtype == torch.int8, f"q: got {q.dtype}; accepted: torch.int8")
    check(q.dim() >= 1, "q: got 0 dims; accepted: [..., K]")


def check_unpack(packed: Tensor, bits: int, k: int) -> None:
    check_bits(bits)
    check(packed.dtype == torch.uint8, f"packed: got {packed.dtype}; accepted: torch.uint8")
    check(
        packed.dim() >= 1 and k >= 0 and packed.shape[-1] == packed_length(k, bits),
        f"packed: got shape {list(packed.shape)}; accepted: [..., {packed_length(max(k, 0), bits)}], what K = {k} "
        f"codes of {bits} bits take",
    )


def check_codes(name: str, q: Tensor, bits: int) -> None:
    """Codes out of range would change silently; on a GPU this waits for it, so ops do not ask there."""
    low, high = code_range(bits)
    if q.numel() == 0 or q.is_meta:
        return
    least, most = (int(value) for value in torch.aminmax(q))
    bad = least if least < low else most
    check(low <= least and most <= high, f"{name}: got {bad}; accepted: the codes of {bits} bits, {low} to {high}")


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Eight codes fill ``bits`` whole bytes: each group of eight becomes one integer, and that integer its bytes."""
    check_pack(q, bits)
    if q.device.type == "cpu":
        check_codes("q", q, bits)
    k = q.shape[-1]
    eights = torch.nn.functional.pad(q, (0, -k % 8)).unflatten(-1, (-1, 8)).to(torch.int32) & (1 << bits) - 1
    stream = torch.zeros_like(eights[..., 0])
    for i in range(8):
        stream |= eights[..., i] << i * bits  # 8 codes of 4 bits fill an int32: its sign bit is the last code's
    octets = torch.stack([stream >> 8 * i & 255 for i in range(bits)], -1).to(torch.uint8)
    return octets.flatten(-2)[..., : packed_length(k, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    check_unpack(packed, bits, k)
    octets = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    stream = torch.zeros_like(octets[..., 0])
    for i in range(bits):
        stream |= octets[..., i] << 8 * i
    sign = 1 << bits - 1
    codes = [((stream >> i * bits & (1 << bits) - 1) ^ sign) - sign for i in range(8)]
    return torch.stack(codes, -1).to(torch.int8).flatten(-2)[..., :k].contiguous()
