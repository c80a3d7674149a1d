"""How tests compare tensors bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def layout(t: Tensor) -> list[int]:
    """The strides that decide where elements are: those of dims with more than one element."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()]


def same(got: Any, want: Any, *, exact: bool = False) -> None:
    """Asserts that two tensors, or two nests of lists and tuples of them, agree bit for bit, on any devices.

    Dtypes, shapes and the strides that matter agree too. Any NaN equals any NaN. Zeros of either sign are equal, and
    strides of dims of one element are not looked at, unless ``exact`` asks for both.
    """
    if not isinstance(want, Tensor):
        assert len(got) == len(want), f"got {len(got)} results; expected: {len(want)}"
        for one, other in zip(got, want, strict=True):
            same(one, other, exact=exact)
        return
    facts = [(t.dtype, t.shape, t.stride() if exact else layout(t)) for t in (got, want)]
    assert facts[0] == facts[1], f"dtype, shape and strides: got {facts[0]}; expected: {facts[1]}"
    got, want = got.detach().cpu(), want.detach().cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if exact and want.is_floating_point():
        signs = got.signbit() != want.signbit()
        assert not signs.any(), f"{int(signs.sum())} zeros or NaNs differ in sign"
