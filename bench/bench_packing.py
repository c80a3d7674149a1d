"""Packing of 2-, 3- and 4-bit codes into dense bytes against shifts in eager torch, and compiled."""

from __future__ import annotations

import peers
import pytest
import torch
from operands import Compare

import qkernels as qk
from qkernels.reference import packing as reference


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pack(compare: Compare, bits: int) -> None:
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (1024, 4096), dtype=torch.int8)
    fused = peers.compiled(peers.pack)
    compare(
        lambda: qk.pack_bits(q, bits),
        {
            "eager": lambda: peers.pack(q, bits),
            "compile": peers.find("torch.compile", lambda: lambda: fused(q, bits)),
        },
        reference.pack_bits(q, bits),
        tolerance=0.0,
        peer_tolerance=0.0,
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unpack(compare: Compare, bits: int) -> None:
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (1024, 4096), dtype=torch.int8)
    packed = qk.pack_bits(q, bits)
    fused = peers.compiled(peers.unpack)
    compare(
        lambda: qk.unpack_bits(packed, bits, 4096),
        {
            "eager": lambda: peers.unpack(packed, bits),
            "compile": peers.find("torch.compile", lambda: lambda: fused(packed, bits)),
        },
        q,
        tolerance=0.0,
        peer_tolerance=0.0,
    )
