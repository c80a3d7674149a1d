from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import paths_of
from torch import Tensor

import qkernels as qk
from qkernels import layouts, library

BITS = (2, 3, 4)
SHAPES = [(0,), (1,), (7,), (8,), (33,), (3, 0), (0, 5), (1, 1), (5, 37), (3, 64), (2, 3, 129), (7, 1000)]


@pytest.fixture(params=[*paths_of("pack_bits"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def codes(bits: int, *shape: int) -> Tensor:
    low, high = layouts.code_range(bits)
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def stream_of(q: Tensor, bits: int) -> list[list[int]]:
    """Bytes of each row by another way: the row as one integer."""
    rows = []
    for row in q.reshape(-1, q.shape[-1]).tolist():
        number = sum((code % (1 << bits)) << i * bits for i, code in enumerate(row))
        rows.append(list(number.to_bytes((len(row) * bits + 7) // 8, "little")))
    return rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing(kernel: str, bits: int, shape: tuple[int, ...]) -> None:
    q = codes(bits, *shape)
    packed = qk.pack_bits(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (*shape[:-1], (shape[-1] * bits + 7) // 8)
    if q.numel():
        assert packed.reshape(-1, packed.shape[-1]).tolist() == stream_of(q, bits)
        assert kernel == "reference" or f"cpu_{library.host.last_isa()}" == kernel
    back = qk.unpack_bits(packed, bits, shape[-1])
    assert back.dtype == torch.int8
    assert torch.equal(back, q)


@pytest.mark.parametrize("bits", BITS)
def test_every_code(kernel: str, bits: int) -> None:
    low, high = layouts.code_range(bits)
    q = torch.cartesian_prod(*[torch.arange(low, high + 1, dtype=torch.int8)] * 2).flatten()
    assert torch.equal(qk.unpack_bits(qk.pack_bits(q, bits), bits, q.numel()), q)


def test_strided(kernel: str) -> None:
    q = codes(4, 40, 18)
    for view in (q.t(), q[::2, 1::3], q[:1].expand(5, 18), q.flatten()[3:].view(-1, 3)):
        assert torch.equal(qk.pack_int4(view), qk.pack_int4(view.contiguous()))
        packed = qk.pack_int4(view)
        wide = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.uint8)
        wide[:, ::2] = packed
        assert torch.equal(qk.unpack_int4(wide[:, ::2], view.shape[1]), view)


def test_int4_is_low_nibble_first() -> None:
    assert qk.pack_int4(torch.tensor([1, -1, -8, 7, 3], dtype=torch.int8)).tolist() == [0xF1, 0x78, 0x03]
    assert qk.unpack_int4(torch.tensor([0xF1, 0x78], dtype=torch.uint8)).tolist() == [1, -1, -8, 7]


@pytest.mark.parametrize("bits", BITS)
def test_codes_out_of_range(kernel: str, bits: int) -> None:
    low, high = layouts.code_range(bits)
    for bad in (low - 1, high + 1, -128, 127):
        for at in (0, 30, 36):
            q = codes(bits, 4, 37)
            q[2, at] = bad
            with pytest.raises(
                RuntimeError, match=f"q: got {bad}; accepted: the codes of {bits} bits, {low} to {high}"
            ):
                qk.pack_bits(q, bits)


def test_bad_arguments(kernel: str) -> None:
    q = codes(4, 3, 8)
    with pytest.raises(RuntimeError, match="bits: got 5; accepted: 2, 3, 4"):
        qk.pack_bits(q, 5)
    with pytest.raises(RuntimeError, match=r"q: got torch.int32; accepted: torch.int8"):
        qk.pack_int4(q.int())
    with pytest.raises(RuntimeError, match="q: got 0 dims"):
        qk.pack_int4(torch.tensor(1, dtype=torch.int8))
    packed = qk.pack_int4(q)
    with pytest.raises(RuntimeError, match=r"packed: got shape \[3, 4\]; accepted: \[..., 5\], what K = 9"):
        qk.unpack_int4(packed, 9)
    with pytest.raises(RuntimeError, match=r"packed: got torch.int8; accepted: torch.uint8"):
        qk.unpack_int4(packed.view(torch.int8))
    with pytest.raises(RuntimeError, match="packed: got shape"):
        qk.unpack_int4(packed, -1)


@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits: int) -> None:
    q = codes(bits, 3, 21)
    torch.library.opcheck(torch.ops.qkernels.pack_bits, (q, bits))
    torch.library.opcheck(torch.ops.qkernels.unpack_bits, (qk.pack_bits(q, bits), bits, 21))
