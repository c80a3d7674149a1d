"""The linear layer with int4 weights against the libraries that users have."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch

import qkernels as qk


@pytest.mark.parametrize("n", [4096, 11008])
@pytest.mark.parametrize("m", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("group_size", [128, 32], ids=lambda group_size: f"g{group_size}")
@pytest.mark.parametrize("act_bits", [8, 16], ids=lambda act_bits: f"w4a{act_bits}")
def test_linear(compare: Callable[..., None], threads: int, act_bits: int, group_size: int, m: int, n: int) -> None:
    """fp32 in and out (torch int4pack and torchao: bf16); w4a8: activations quantized on the way, ours per token."""
    x, (q, scale) = torch.randn(m, 4096), peers.int4_weight(n, 4096, group_size)
    packed = qk.PackedInt4.from_quantized(q, scale)
    with torch.no_grad():
        compare(
            lambda: qk.int4_linear(x, packed, act_bits=act_bits),
            peers.int4_linear(x, q, scale, threads, act_bits),
            x.double() @ peers.dequantized(q, scale).double().t(),
            tolerance=0.02 if act_bits == 8 else 2e-5,  # what 8 bits of activation cost; what sums in fp32 do
            peer_tolerance=0.03 if act_bits == 8 else 0.01,  # activations in groups or per tensor; operands in bf16
        )


@pytest.mark.parametrize("n", [4096, 11008])
@pytest.mark.parametrize("m", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("group_size", [128, 32], ids=lambda group_size: f"g{group_size}")
def test_linear_on_bf16(compare: Callable[..., None], threads: int, group_size: int, m: int, n: int) -> None:
    """Weight-only, bf16 in and out, as a model in bf16 calls it: ours sums in fp32."""
    x, (q, scale) = torch.randn(m, 4096).bfloat16(), peers.int4_weight(n, 4096, group_size)
    packed = qk.PackedInt4.from_quantized(q, scale)
    found = peers.int4_linear(x.float(), q, scale, threads, 16)
    with torch.no_grad():
        compare(
            lambda: qk.int4_linear(x, packed, act_bits=16),
            {name: found[name] for name in ("torch int4pack", "OpenVINO bf16", "bf16")},
            x.double() @ peers.dequantized(q, scale).double().t(),
            tolerance=0.004,
            peer_tolerance=0.01,
        )


@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 4096), (11008, 4096)])
@pytest.mark.parametrize("m", [1, 4, 16, 64])
@pytest.mark.parametrize("group_size", [128, 32], ids=lambda group_size: f"g{group_size}")
@pytest.mark.parametrize("act_bits", [8, 16], ids=lambda act_bits: f"a{act_bits}")
@pytest.mark.parametrize("bits", [2, 3], ids=lambda bits: f"w{bits}")
def test_low_bits(
    compare: Callable[..., None], threads: int, bits: int, act_bits: int, group_size: int, m: int, n: int, k: int
) -> None:
    """fp32 in and out; against the same codes as int4, and for 2 bits on int8 activations against onnxruntime."""
    x, (q, scale) = torch.randn(m, k), peers.int4_weight(n, k, group_size, bits=bits)
    dense, wide = qk.PackedInt.from_quantized(q, scale, bits=bits), qk.PackedInt4.from_quantized(q, scale)
    others = peers.two_bit_linear(x, q, scale, threads) if (bits, act_bits) == (2, 8) else {}
    compare(
        lambda: qk.int4_linear(x, dense, act_bits=act_bits),
        {"int4": lambda: qk.int4_linear(x, wide, act_bits=act_bits), **others},
        x.double() @ peers.dequantized(q, scale).double().t(),
        tolerance=0.02 if act_bits == 8 else 2e-5,
    )
