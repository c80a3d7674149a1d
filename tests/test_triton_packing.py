"""Low-bit packing in Triton against the reference, on the GPU or interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import kernels_of

import qkernels as qk
from qkernels import layouts
from qkernels.reference import packing as reference

if "triton" not in kernels_of("pack_bits"):
    pytest.skip(str(dict(qk.which("pack_bits"))["triton"]), allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("bits", layouts.BITS)
@pytest.mark.parametrize("shape", [(1,), (5,), (8,), (3, 17), (2, 3, 40), (0, 4), (4, 0), (700, 33)])
def test_equals_the_reference(shape: tuple[int, ...], bits: int) -> None:
    low, high = layouts.code_range(bits)
    q = torch.randint(low, high + 1, shape, dtype=torch.int8)
    for codes in (q, q.transpose(0, -1), q[..., ::2]):
        with qk.use_kernel("triton"):
            packed = torch.ops.qkernels.pack_bits(codes.to(DEVICE), bits)
            assert packed.is_contiguous()
            assert torch.equal(packed.cpu(), reference.pack_bits(codes, bits))
            assert torch.equal(torch.ops.qkernels.unpack_bits(packed, bits, codes.shape[-1]).cpu(), codes)


def test_errors_are_those_of_the_reference() -> None:
    with qk.use_kernel("triton"):
        for q, bits, message in (
            (torch.zeros(4, dtype=torch.int8), 5, "bits: got 5"),
            (torch.zeros(4), 4, "q: got torch.float32"),
            (torch.tensor(1, dtype=torch.int8), 4, "q: got 0 dims"),
        ):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.qkernels.pack_bits(q.to(DEVICE), bits)
        with pytest.raises(RuntimeError, match=r"packed: got shape \[4\]; accepted: \[..., 3\]"):
            torch.ops.qkernels.unpack_bits(torch.zeros(4, dtype=torch.uint8, device=DEVICE), 3, 8)
        if DEVICE.type == "cpu":
            with pytest.raises(RuntimeError, match="q: got 8"):
                torch.ops.qkernels.pack_bits(torch.tensor([8], dtype=torch.int8), 4)
