"""int8 matmuls and the int8 linear layer against the libraries that users have."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch

import qkernels as qk

LINEAR = [(m, n, 4096) for n in (4096, 11008) for m in (1, 4, 16, 64, 256)]
LINEAR += [(128, 1536, 384), (1024, 1024, 1024)]


@pytest.mark.parametrize(("m", "n", "k"), LINEAR)
def test_linear(compare: Callable[..., None], threads: int, m: int, n: int, k: int) -> None:
    """fp32 in and out, activations quantized per token on the way (the libraries: per tensor)."""
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    packed = qk.PackedInt8.from_float(w)
    with torch.no_grad():
        compare(
            lambda: qk.int8_linear(x, packed),
            peers.int8_linear(x, w, threads),
            x @ w.t(),
            tolerance=0.02,  # what 8 bits of weight and activation cost; FBGEMM's 7-bit activations: 0.03
        )


@pytest.mark.parametrize("b_is", ["transposed", "row-major"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (128, 1536, 384), (256, 4096, 4096), (1024, 1024, 1024)])
def test_mm(compare: Callable[..., None], m: int, n: int, k: int, b_is: str) -> None:
    """Exact int32 products; transposed: b is the .t() of a contiguous [N, K], as a linear layer keeps its weight."""
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (n, k)))
    b = b.t() if b_is == "transposed" else b.t().contiguous()
    exact = a.double() @ b.double()
    torch_mm = peers.find("torch._int_mm", lambda: lambda: torch._int_mm(a, b))
    compare(lambda: qk.int8_mm(a, b), {"torch._int_mm": torch_mm}, exact, tolerance=0.0)
