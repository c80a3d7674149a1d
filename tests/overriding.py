"""How tests override torch's ops, and the calls that they override."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import INPUTS
from torch import Tensor

import qkernels as qk
from qkernels.integrations import aten

A = torch.ops.aten
NAN = torch.tensor([math.nan])


def rerouted() -> bool:
    """Whether torch's op runs on our kernel: NaN stays NaN there."""
    return bool(torch.fake_quantize_per_tensor_affine(NAN, 0.1, 0, -8, 7).isnan())


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What the call gives inside an override, and what torch gives."""
    want = call()
    with qk.override_torch():
        got = call()
    return got, want


def inputs(dtype: torch.dtype) -> Iterator[Tensor]:
    for name, (make, _) in INPUTS.items():
        if name not in ("special values", "many channels last", "long rows"):
            yield make(dtype)
    yield (torch.arange(-60, 61) / 2).to(dtype).repeat(3, 1)  # ties
    special = torch.tensor([math.inf, -math.inf, 1e-40, -1e-40, -0.0, 0.0, 3e38, -3e38], dtype=torch.float64)
    yield special.to(dtype)


def gradients(fn: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))]


AFFINE: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 2, -8, 7),
    "tensors": lambda x: torch.fake_quantize_per_tensor_affine(
        x, torch.tensor([0.1]), torch.tensor([2], dtype=torch.int32), -8, 7
    ),
    "channels": lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.full((x.size(1),), 0.1), torch.ones(x.size(1), dtype=torch.int32), 1, -8, 7
    ),
}


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "range": (lambda: torch.fake_quantize_per_tensor_affine(NAN, 0.1, 0, 8, 7), "quant_min: got 8, above quant_max 7"),
    "zero point": (lambda: torch.fake_quantize_per_tensor_affine(NAN, 0.1, 9, -8, 7), "`zero_point` must be between"),
    "dtype": (lambda: torch.fake_quantize_per_tensor_affine(torch.arange(3), 0.1, 0, -8, 7), "x: got torch.int64"),
    "channels": (
        lambda: torch.fake_quantize_per_channel_affine(torch.ones(2, 3), torch.ones(3), torch.zeros(3).int(), 0, 0, 1),
        r"scale: got shape \[3\]; accepted: one value for each of x's 2 channels \(dim 0\)",
    ),
    "zero points": (
        lambda: torch.fake_quantize_per_channel_affine(torch.ones(1, 2), torch.ones(1), torch.ones(1).int(), 0, -1, 0),
        "`zero_point` must be between",
    ),
    "axis": (
        lambda: torch.fake_quantize_per_channel_affine(torch.ones(2), torch.ones(2), torch.zeros(2).int(), 1, 0, 1),
        "axis: got 1; accepted: -1 to 0",
    ),
}


@contextlib.contextmanager
def python_routes() -> Iterator[None]:
    library = aten._reroute("CPU")
    try:
        yield
    finally:
        aten._unroute(library)


def both_routes(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What the call gives through the Python routes, and what torch gives."""
    want = call()
    with python_routes():
        got = call()
    return got, want
