"""Packing of 2-, 3- and 4-bit codes in Triton. Eight codes fill whole bytes; the kernels hold them as one integer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gemm_checks, layouts
from .common.configs import ceil_div
from .common.launch import launch

BLOCK = 512  # times eight codes for each program


@triton.jit
def place(EIGHTS: tl.constexpr, eights, length):
    """For EIGHTS times eight codes: their row, their place in it, and whether they exist."""
    at = tl.program_id(0).to(tl.int64) * EIGHTS + tl.arange(0, EIGHTS)[:, None]
    return at // eights, at % eights, at < length


@triton.jit(do_not_specialize=["total"])
def pack_bits_kernel(
    packed_ptr, q_ptr, total, eights, k_end, row_bytes, BITS: tl.constexpr, EIGHTS: tl.constexpr
):  # fmt: skip
    """Codes [rows, K] to bytes [rows, row_bytes]; ``eights`` of a row, ``total`` of all rows."""
    row, eight, there = place(EIGHTS, eights, total)
    i = tl.arange(0, 8)[None, :]
    k = eight * 8 + i
    code = tl.load(q_ptr + row * k_end + k, mask=there & (k < k_end), other=0)
    stream = tl.sum((code.to(tl.uint32) & ((1 << BITS) - 1)) << (i * BITS).to(tl.uint32), 1)[:, None]
    j = tl.arange(0, 4)[None, :]
    byte = eight * BITS + j
    octet = (stream >> (j * 8).to(tl.uint32)).to(tl.uint8)
    tl.store(packed_ptr + row * row_bytes + byte, octet, mask=there & (j < BITS) & (byte < row_bytes))


@triton.jit(do_not_specialize=["total"])
def unpack_bits_kernel(
    q_ptr, packed_ptr, total, eights, k_end, row_bytes, BITS: tl.constexpr, EIGHTS: tl.constexpr
):  # fmt: skip
    """Bytes [rows, row_bytes] to codes [rows, K]."""
    row, eight, there = place(EIGHTS, eights, total)
    j = tl.arange(0, 4)[None, :]
    byte = eight * BITS + j
    octet = tl.load(packed_ptr + row * row_bytes + byte, mask=there & (j < BITS) & (byte < row_bytes), other=0)
    stream = tl.sum(octet.to(tl.uint32) << (j * 8).to(tl.uint32), 1)[:, None]
    i = tl.arange(0, 8)[None, :]
    SIGN: tl.constexpr = 1 << (BITS - 1)
    code = ((stream >> (i * BITS).to(tl.uint32)) & ((1 << BITS) - 1)) ^ SIGN
    k = eight * 8 + i
    tl.store(q_ptr + row * k_end + k, (code.to(tl.int32) - SIGN).to(tl.int8), mask=there & (k < k_end))


def grid_and_sizes(k: int, bits: int, rows: int) -> tuple[tuple[int], tuple[int, int, int, int]]:
    eights = ceil_div(k, 8)
    return (ceil_div(rows * eights, BLOCK),), (rows * eights, eights, k, layouts.packed_length(k, bits))


def pack_bits(q: Tensor, bits: int) -> Tensor:
    gemm_checks.pack_bits(q, bits)
    if q.device.type == "cpu":  # the interpreter; on a GPU a look at the codes would wait for them
        gemm_checks.codes_of_bits("q", q, bits)
    k = q.shape[-1]
    packed = torch.empty((*q.shape[:-1], layouts.packed_length(k, bits)), dtype=torch.uint8, device=q.device)
    if q.numel():
        grid, sizes = grid_and_sizes(k, bits, q.numel() // k)
        launch(pack_bits_kernel, grid, packed, q.contiguous(), *sizes, BITS=bits, EIGHTS=BLOCK)
    return packed


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    gemm_checks.unpack_bits(packed, bits, k)
    q = torch.empty((*packed.shape[:-1], k), dtype=torch.int8, device=packed.device)
    if q.numel():
        grid, sizes = grid_and_sizes(k, bits, q.numel() // k)
        launch(unpack_bits_kernel, grid, q, packed.contiguous(), *sizes, BITS=bits, EIGHTS=BLOCK)
    return q
