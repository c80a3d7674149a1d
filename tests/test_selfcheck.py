"""The self-check itself: what it tries, and that a fault of one kernel is reported and ends nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import registry, selfcheck
from qkernels.samples import Trial, trials


def address(t: Tensor) -> int:
    return t.data_ptr() % selfcheck.ALIGNMENT


@pytest.mark.parametrize("quick", [True, False])
def test_misaligned_storage_is_tried_wherever_a_kernel_runs(quick: bool) -> None:
    """On the CPU and after the copy to a GPU: a copy that begins anew in memory would be aligned there."""
    for dtype in selfcheck.QUICK_DTYPES if quick else selfcheck.DTYPES:
        tried = [x for x in selfcheck.inputs(quick, [dtype]) if address(x) % selfcheck.ALIGNMENT]
        assert tried
        for x in tried:
            (copy,) = selfcheck.on("cpu", (x,))
            assert address(copy) == address(x)
            assert copy.data_ptr() != x.data_ptr()
            assert copy.stride() == x.stride()
            assert torch.equal(copy, x)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (), (1,)], ids=str)
def test_copies_of_small_and_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    (copy,) = selfcheck.on("cpu", (x,))
    assert copy.stride() == x.stride()
    assert torch.equal(copy, x)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op of one tensor that doubles it."""
    monkeypatch.setitem(registry._kernels, "double", [])
    monkeypatch.setitem(trials, "double", Trial(lambda x: iter([(x,)])))
    registry.register("double", "reference", lambda x: x * 2, lambda *args: None)
    return "double"


def test_what_a_kernel_raises_is_its_fault(op: str) -> None:
    def raises(x: Tensor) -> Any:
        raise AttributeError("'int' object has no attribute 'to'\nand more")

    registry.register(op, "raises", raises, lambda *args: None)
    registry.register(op, "wrong", lambda x: x, lambda *args: None)
    registry.register(op, "right", lambda x: x + x, lambda *args: None)
    outcomes = {o.kernel: o for o in selfcheck.check_op(op, registry.kernels(op), quick=True)}
    assert "raised AttributeError: 'int' object has no attribute 'to', on (torch.float32" in outcomes["raises"].fault
    assert "differs" in outcomes["wrong"].fault
    assert outcomes["right"].fault is None
    assert len({o.cases for o in outcomes.values()}) == 1
