"""Packs 2-, 3- and 4-bit codes into dense bytes, the form in which files hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks, gemm_checks, layouts, library
from ..reference import packing as reference


def _pack_bits_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() > 0:
        for bits in layouts.BITS:
            low, high = layouts.code_range(bits)
            yield torch.randint(low, high + 1, x.shape, dtype=torch.int8), bits


def _unpack_bits_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for q, bits in _pack_bits_samples(x):
        yield reference.pack_bits(q, bits), bits, q.shape[-1]


def _fake_pack(q: Tensor, bits: int) -> Tensor:
    gemm_checks.pack_bits(q, bits)
    return q.new_empty((*q.shape[:-1], layouts.packed_length(q.shape[-1], bits)), dtype=torch.uint8)


def _fake_unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.int8)


_pack_bits = library.define(
    "pack_bits",
    "(Tensor q, int bits) -> Tensor",
    reference.pack_bits,
    _fake_pack,
    cpu=("avx512", "avx2", "scalar"),
    triton=True,
    samples=_pack_bits_samples,
)
_unpack_bits = library.define(
    "unpack_bits",
    "(Tensor packed, int bits, SymInt k) -> Tensor",
    reference.unpack_bits,
    _fake_unpack,
    cpu=("avx512", "avx2", "scalar"),
    triton=True,
    samples=_unpack_bits_samples,
)


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes: code i of a row takes the bits from i·bits on, low bits first.

    Args:
        q: [..., K] int8, signed codes of ``bits`` bits.
        bits: 2, 3 or 4.

    Returns:
        uint8 [..., ⌈K·bits/8⌉], contiguous; zeros fill up the last byte of a row. Not differentiable.

    Raises:
        RuntimeError: a dtype other than int8, other bits, or on the CPU a code out of range. On a GPU, where a check of
            values would stop the stream, the op takes the low bits of each code.
    """
    return _pack_bits(q, bits)


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """The codes of ``pack_bits``, exactly.

    Args:
        packed: uint8 [..., ⌈k·bits/8⌉].
        bits: 2, 3 or 4.
        k: length of a row.

    Returns:
        [..., k] int8.

    Raises:
        RuntimeError: packed is not uint8, or its last dim is not the length of k codes.
    """
    return _unpack_bits(packed, bits, k)


def pack_int4(q: Tensor) -> Tensor:
    """Packs int4 codes two to a byte along the last dim, low nibble first: ``pack_bits`` of 4 bits.

    Args:
        q: [..., K] int8, codes −8…7.

    Returns:
        uint8 [..., ⌈K/2⌉].

    Raises:
        RuntimeError: as ``pack_bits``.
    """
    return _pack_bits(q, 4)


def unpack_int4(packed: Tensor, k: int | None = None) -> Tensor:
    """The codes of ``pack_int4``.

    Args:
        packed: uint8 [..., ⌈k/2⌉].
        k: length of a row: twice packed's last dim (the default), or one less.

    Returns:
        [..., k] int8, codes −8…7.

    Raises:
        RuntimeError: as ``unpack_bits``.
    """
    if k is None:
        checks.dense("packed", packed)
        k = 2 * packed.shape[-1]
    return _unpack_bits(packed, 4, k)
