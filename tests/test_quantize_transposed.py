"""quantize_dynamic_transposed: codes of the rows and of the columns of a matrix, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import FLOATS, special
from compare import same
from conftest import kernels_of
from torch import Tensor

import qkernels as qk
from qkernels.ops.quantize_transposed import quantize_transposed_op
from qkernels.reference import quantize_transposed as reference

pytestmark = pytest.mark.sanitized

MATRICES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "one element": lambda d: torch.full((1, 1), -2.7, dtype=d),
    "empty": lambda d: torch.empty(0, 4, dtype=d),
    "empty rows": lambda d: torch.empty(3, 0, dtype=d),
    "special values": lambda d: special(d).reshape(6, 17),
    "odd": lambda d: torch.randn(7, 33, dtype=d) * 2,
    "tiles": lambda d: torch.randn(130, 193, dtype=d),
    "square tiles": lambda d: torch.randn(64, 128, dtype=d),
    "tall": lambda d: torch.randn(1000, 3, dtype=d),
    "wide": lambda d: torch.randn(2, 2065, dtype=d),
    "transposed": lambda d: torch.randn(96, 65, dtype=d).t(),
    "sliced": lambda d: torch.randn(19, 70, dtype=d)[:, ::2],
    "expanded": lambda d: torch.randn(5, 1, dtype=d).expand(5, 48),
    "misaligned": lambda d: torch.randn(1 + 6 * 37, dtype=d)[1:].view(6, 37),
}


@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"))
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_equal_the_reference(kernel: str, name: str, dtype: torch.dtype) -> None:
    x = MATRICES[name](dtype)
    if kernel == "triton" and name in ("wide", "tall") and dtype != torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("interpreting takes too long")
    for args in ((127, None, 0, None), (7, None, 0, None), (127, 3, 5, None), (127, -1, 2, torch.tensor([2**33]))):
        expected = reference.quantize_dynamic_transposed(x, *args)
        for threads in (1, 2) if kernel.startswith("cpu_") else (1,):
            torch.set_num_threads(threads)
            with qk.use_kernel(kernel):
                for a, b in zip(quantize_transposed_op(x, *args), expected, strict=True):
                    same(a, b)


@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"))
def test_codes_are_those_of_the_other_quantizers(kernel: str) -> None:
    """Rows as quantize_dynamic gives them for x and for its transpose; drawn ones as quantize_stochastic's."""
    x = torch.randn(37, 50)
    with qk.use_kernel(kernel):
        q, scale, q_t, scale_t = qk.quantize_dynamic_transposed(x)
        drawn, _, drawn_t, _ = qk.quantize_dynamic_transposed(x, seed=4, offset=9)
    for matrix, codes, s, by_draw in ((x, q, scale, drawn), (x.t().contiguous(), q_t, scale_t, drawn_t)):
        want, want_scale, _ = qk.quantize_dynamic(matrix)
        assert torch.equal(codes, want)
        same(s, want_scale)
        bounds = by_draw.int() - (matrix.double() / s.double())
        assert bounds.abs().max() < 1.001
        assert (by_draw != want).any()
    assert torch.equal(drawn, qk.quantize_stochastic(x, scale, seed=4, offset=9))
    assert torch.equal(drawn_t.t(), qk.quantize_stochastic(x, scale_t.t(), seed=4, offset=9))
    assert q.stride() == (64, 1)
    assert q_t.stride() == (48, 1)


def test_opcheck() -> None:
    for args in ((torch.randn(5, 7), 127, None, 0, None), (torch.randn(3, 32).bfloat16(), 7, 3, 1, torch.tensor([2]))):
        torch.library.opcheck(torch.ops.qkernels.quantize_dynamic_transposed.default, args)


X = torch.randn(4, 6)
BAD = {
    "matrix": (lambda: qk.quantize_dynamic_transposed(X[0]), r"x: got shape \[6\]; accepted: 2 dims"),
    "matrix dtype": (lambda: qk.quantize_dynamic_transposed(X.int()), "x: got torch.int32; accepted: torch.float32"),
    "bits": (lambda: qk.quantize_dynamic_transposed(X, bits=9), "bits: got 9; accepted: 2 to 8"),
    "quant_max": (lambda: quantize_transposed_op(X, 128, None, 0, None), "quant_max: got 128; accepted: 1 to 127"),
    "offset": (
        lambda: qk.quantize_dynamic_transposed(X, seed=1, offset=torch.tensor(1.0)),
        r"offset: got torch.float32 of shape \[\]; accepted: an int, or one torch.int64 element on x's device",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"))
def test_bad_arguments_are_named(kernel: str, name: str) -> None:
    call, message = BAD[name]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()
