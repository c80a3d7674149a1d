"""No kernel that can run on a GPU waits for it: no value is read by the host, nothing is copied from it.

Shown on tensors without data: reading a value of a meta tensor fails, whatever the path to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from qkernels import registry, selfcheck
from qkernels.samples import trials

COPIES_FROM_THE_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy)


class NoCopies(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COPIES_FROM_THE_HOST and "device" in kwargs:
            raise AssertionError(f"{func.__name__} copies from the host to {kwargs['device']}")
        return func(*args, **kwargs)


# Programs run on the CPU alone, and a weight is packed once.
MAY_WAIT = {"int8_program", "int8_conv_transpose_pack", "int8_conv_transpose_unpack"}


@pytest.mark.parametrize("op", sorted(set(trials) - MAY_WAIT))
def test_the_reference_does_not_wait(op: str) -> None:
    kernel = registry.kernels(op)[-1]
    calls = 0
    for x in selfcheck.inputs(quick=True):
        for args in trials[op].samples(x):
            with NoCopies():
                kernel.fn(*selfcheck.on("meta", args))
            calls += 1
    assert calls
