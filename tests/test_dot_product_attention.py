"""dot_product_attention: every kernel against torch's function and the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import paths_of
from torch import Tensor
from torch.nn import functional as F

import qkernels.ops  # noqa: F401  defines the ops
from qkernels import library
from qkernels.nn.attend import MOST_KEYS, attend
from qkernels.reference import dot_product_attention as reference

pytestmark = pytest.mark.sanitized
op = torch.ops.qkernels.dot_product_attention


@pytest.fixture(params=paths_of("dot_product_attention"))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


# batch, heads, heads of keys, rows, keys, size, size of values
SHAPES = [
    (2, 3, 3, 17, 17, 8, 8),
    (1, 4, 2, 50, 33, 20, 37),
    (1, 6, 1, 6, 49, 64, 64),
    (3, 1, 1, 1, 1, 1, 1),
    (1, 2, 2, 33, 50, 3, 70),
    (1, 2, 2, 100, 130, 16, 130),
    (1, 1, 1, 7, 3000, 4, 5),
    (0, 2, 2, 3, 3, 4, 4),
    (2, 2, 2, 0, 3, 4, 4),
    (2, 2, 2, 3, 3, 4, 0),
    (2, 2, 2, 3, 3, 0, 4),
]


def operands(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, groups, rows, keys, size, width = shape
    q, k = torch.randn(batch, heads, rows, size), torch.randn(batch, groups, keys, size)
    return q, k, torch.randn(batch, groups, keys, width)


def expected(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """In fp64 by the formula."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.mT * scale
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1) & causal
    return scores.masked_fill(hidden, -torch.inf).softmax(3) @ v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.3, -1.0])
def test_values(kernel: str, shape: tuple[int, ...], causal: bool, scale: float) -> None:
    q, k, v = operands(shape)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = op(q, k, v, causal, scale)
        assert y.transpose(1, 2).is_contiguous()
        if y.numel():
            assert library.host is not None
            assert f"cpu_{library.host.last_isa()}" == kernel
        torch.testing.assert_close(y, expected(q, k, v, causal, scale).float(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(y, reference.dot_product_attention(q, k, v, causal, scale), rtol=1e-5, atol=2e-6)


def test_all_strides(kernel: str) -> None:
    q, k, v = torch.randn(2, 30, 3, 4, 24).permute(2, 0, 3, 1, 4).unbind(0)
    want = op(q.contiguous(), k.contiguous(), v.contiguous(), True, 0.2)
    for a, b, c in ((q, k, v), (q.mT.contiguous().mT, k, v.mT.contiguous().mT), (q, k[..., ::2].repeat(1, 1, 1, 2), v)):
        torch.testing.assert_close(op(a, b, c, True, 0.2), op(*(t.contiguous() for t in (a, b, c)), True, 0.2))
    assert torch.equal(op(q, k, v, True, 0.2), want)
    one = torch.randn(1, 1, 9, 8).expand(2, 4, 9, 8)
    torch.testing.assert_close(op(one, one, one, False, 0.2), op(*[one.contiguous()] * 3, False, 0.2))


def test_paths_and_threads_give_the_same_bits() -> None:
    results = []
    q, k, v = operands((2, 5, 5, 70, 70, 40, 40))
    for path in paths_of("dot_product_attention"):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with library.use_kernel(path):
                results.append(op(q, k, v, True, 0.2))
    assert all(torch.equal(results[0], y) for y in results)


def test_threads_do_not_decide_which_rows_an_infinity_reaches(kernel: str) -> None:
    """A value that causal rows do not see is multiplied by 0 in some of them, which is NaN."""
    q, k, v = operands((1, 1, 1, 200, 200, 16, 16))
    v[0, 0, 77, 3] = torch.inf
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(op(q, k, v, True, 0.3))
    for y in results:
        torch.testing.assert_close(y, results[0], rtol=0, atol=0, equal_nan=True)


def test_large_scores_and_what_is_not_finite(kernel: str) -> None:
    q, k, v = operands((1, 2, 2, 20, 20, 8, 8))
    q[0, 0] *= 1e3
    torch.testing.assert_close(op(q, k, v, True, 1.0), expected(q, k, v, True, 1.0).float(), rtol=1e-3, atol=1e-4)
    k[0, 0, 10, 3], v[0, 1, 15, 2] = torch.nan, torch.inf
    assert torch.equal(op(q, k, v, False, 1.0).isfinite(), expected(q, k, v, False, 1.0).isfinite())


def test_attend_is_torchs_function() -> None:
    q, k, v = operands((2, 4, 4, 9, 9, 8, 8))
    wide = operands((1, 1, 1, 2, MOST_KEYS + 1, 4, 4))
    mask = torch.randn(9, 9)
    for args, kwargs in (
        ((q, k, v), {}),
        ((q, k, v), {"is_causal": True, "scale": 0.7}),
        ((q, k, v, mask), {}),
        ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
        ((q[0], k[0], v[0]), {}),
        ((q, k[:1], v[:1]), {}),
        ((q.double(), k.double(), v.double()), {}),
        ((q[:, :, :0], k, v), {}),
        (wide, {}),
    ):
        torch.testing.assert_close(attend(*args, **kwargs), F.scaled_dot_product_attention(*args, **kwargs))
    with pytest.raises(RuntimeError):
        attend(q, k[:, :2], v[:, :2])
