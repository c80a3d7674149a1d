"""override_torch: what torch computes is computed, by torch where our kernels refuse it; and torch's errors stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOATS
from compare import same
from overriding import ERRORS, A, both, both_routes, python_routes
from torch import Tensor, nn

import qkernels as qk

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(qk.library.host is None, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("override_ends"),
]


def fused(x: Tensor, *quant_range: int, stats: Any = None, flags: Any = (1, 1), **options: Any) -> list[Tensor]:
    """The fused op's output and statistics."""
    if stats is None:
        stats = torch.tensor([math.inf]), torch.tensor([-math.inf]), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    stats = [stat.clone() for stat in stats]
    on = [torch.tensor([flag]) for flag in flags]
    rest = options.get("axis", 0), options.get("per_row", False), options.get("symmetric", False)
    return [torch.fused_moving_avg_obs_fake_quant(x, *on, *stats, 0.01, *quant_range, *rest), *stats]


def statistics(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (1,), zero_point: Any = torch.int32) -> Any:
    low, high, scale = torch.full(shape, -1.0), torch.full(shape, 2.0), torch.full(shape, 0.5)
    return low.to(dtype), high.to(dtype), scale, torch.full(shape, 3, dtype=zero_point)


WHAT_TORCH_COMPUTES: dict[str, Callable[[Tensor], Any]] = {
    "31 bits": lambda x: fused(x, 0, 2**31 - 1, symmetric=True),
    "31 bits, affine": lambda x: fused(x, 0, 2**31 - 1),
    "32 bits": lambda x: fused(x, -(2**31), 2**31 - 1),
    "one more than fp32 holds": lambda x: fused(x, 0, 2**24 + 1),
    "31 bits per row": lambda x: fused(
        x, 0, 2**31 - 1, per_row=True, stats=[torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0).int()]
    ),
    "31 bits, observer off": lambda x: fused(x, 0, 2**31 - 1, flags=(0, 1), stats=statistics()),
    "31 bits, off": lambda x: fused(x, 0, 2**31 - 1, flags=(0, 0)),
    "bf16 statistics": lambda x: fused(x, -128, 127, stats=statistics(torch.bfloat16), flags=(0, 1)),
    "fp16 statistics": lambda x: fused(x, -128, 127, stats=statistics(torch.float16), flags=(0, 1)),
    "fp64 statistics": lambda x: fused(x, -128, 127, stats=statistics(torch.float64), flags=(0, 0)),
    "zero point in int16": lambda x: fused(x, -8, 7, stats=statistics(zero_point=torch.int16), flags=(0, 1)),
    "zero point in fp32": lambda x: fused(x, -8, 7, stats=statistics(zero_point=torch.float32), flags=(0, 0)),
    "more statistics than rows": lambda x: fused(x, -128, 127, stats=statistics(shape=(3,)), flags=(1, 0)),
    "integers, off": lambda x: fused(x.long(), -128, 127, flags=(0, 0)),
    "a range upside down, off": lambda x: fused(x, 5, 3, flags=(0, 0)),
    "learned, many scales": lambda x: torch._fake_quantize_learnable_per_tensor_affine(
        x, torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0]), -8, 7
    ),
    "learned, many zero points": lambda x: torch._fake_quantize_learnable_per_tensor_affine(
        x, torch.tensor([0.1]), torch.tensor([1.0, 2.0]), -8, 7
    ),
    "zero point beyond fp32": lambda x: A.fake_quantize_per_tensor_affine_cachemask(x, 1e-7, 2**30 + 1, 0, 2**31 - 1),
    "zero points beyond fp32": lambda x: A.fake_quantize_per_channel_affine_cachemask(
        x, torch.full((4,), 1e-7), torch.tensor([2**30 + 1, 2**24 + 1, 5, 2**24], dtype=torch.int32), 0, 0, 2**31 - 1
    ),
    "zero point beyond fp32, learned": lambda x: torch._fake_quantize_learnable_per_tensor_affine(
        x, torch.tensor([1e-7]), torch.tensor([2.0**30]), 0, 2**31 - 1
    ),
    "learned backward, another dtype": lambda x: A._fake_quantize_learnable_per_tensor_affine_backward(
        torch.ones_like(x).half(), x.bfloat16(), torch.tensor([0.1]), torch.ones(1), -8, 7, 0.5
    ),
    "gradient of integers": lambda x: A.fake_quantize_per_tensor_affine_cachemask_backward(x.long(), x > 0),
    "expanded mask": lambda x: A.fake_quantize_per_tensor_affine_cachemask_backward(x.abs(), (x[:1] > 0).expand(4, 10)),
    "complex gradient": lambda x: A.fake_quantize_per_channel_affine_cachemask_backward(x.to(torch.complex64), x > 0),
}


@pytest.mark.parametrize("route", ["kernels", "python"])
@pytest.mark.parametrize("case", WHAT_TORCH_COMPUTES)
def test_what_torch_computes_is_torchs(case: str, route: str) -> None:
    """Calls that ours would refuse: torch's results, statistics among them, to the last bit."""
    x = torch.randn(4, 10)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            want = WHAT_TORCH_COMPUTES[case](x)
            with qk.override_torch() if route == "kernels" else python_routes():
                same(WHAT_TORCH_COMPUTES[case](x), want)


def test_gradients_of_what_is_torchs() -> None:
    x = torch.randn(4, 10, requires_grad=True)
    for case in ("31 bits", "31 bits per row", "31 bits, observer off"):

        def call(case: str = case) -> list[Tensor]:
            y = WHAT_TORCH_COMPUTES[case](x)[0]
            return [y.detach(), *torch.autograd.grad(y.square().sum(), x)]

        same(*both(call))
        same(*both_routes(call))


def test_first_derivative_of_the_learnable_ops_with_a_graph() -> None:
    """As in torch, only the second one is refused."""
    leaves = [torch.randn(4, 10), torch.tensor([0.1]), torch.tensor([1.0])]
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> list[Tensor]:
        y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, -8, 7)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grads[0].sum(), leaves[0])
        return [g.detach() for g in grads]

    torch.testing.assert_close(*both(call))
    torch.testing.assert_close(*both_routes(call))


def test_statistics_beyond_their_end_are_refused() -> None:
    """torch writes there."""
    for stats, options in ((statistics(shape=(0,)), {}), (statistics(shape=(2,)), {"per_row": True})):
        with qk.override_torch(), pytest.raises(RuntimeError, match="running_min: got shape"):
            fused(torch.randn(4, 10), -128, 127, stats=stats, **options)


GRID: dict[str, Callable[..., Any]] = {
    "numbers": lambda x, s, z, low, high: A.fake_quantize_per_tensor_affine_cachemask(x, 0.1, 1, low, high),
    "tensors": lambda x, s, z, low, high: torch.fake_quantize_per_tensor_affine(x, s[:1], z[:1], low, high),
    "tensors, mask": lambda x, s, z, low, high: A._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
        x, s[:1], z[0], torch.ones(1), low, high
    ),
    "channels": lambda x, s, z, low, high: torch.fake_quantize_per_channel_affine(x, s, z, 0, low, high),
    "learned": lambda x, s, z, low, high: torch._fake_quantize_learnable_per_tensor_affine(
        x, s[:1], z[:1], low, high, 0.5
    ),
    "learned channels": lambda x, s, z, low, high: torch._fake_quantize_learnable_per_channel_affine(
        x, s, z, 0, low, high, 0.5
    ),
    "learned, backward": lambda x, s, z, low, high: A._fake_quantize_learnable_per_tensor_affine_backward(
        torch.ones_like(x), x, s[:1], z[:1], low, high, 0.5
    ),
    "learned channels, backward": lambda x, s, z, low, high: A._fake_quantize_learnable_per_channel_affine_backward(
        torch.ones_like(x), x, s, z, 0, low, high, 0.5
    ),
    "fused": lambda x, s, z, low, high: fused(x, low, high, stats=(s[:1] - 1, s[:1] + 1, s[:1], z[:1])),
    "fused rows": lambda x, s, z, low, high: fused(x, low, high, stats=(s - 1, s + 1, s, z), per_row=True),
    "fused, off": lambda x, s, z, low, high: fused(x, low, high, stats=(s[:1], s[:1], s[:1], z[:1]), flags=(0, 1)),
}
TENSORS: dict[str, Callable[[], Tensor]] = {
    **{
        str(dtype): lambda dtype=dtype: torch.linspace(-3, 3, 40).view(4, 10).to(dtype)
        for dtype in (*FLOATS, torch.int64, torch.complex64)
    },
    "empty": lambda: torch.ones(4, 0),
    "0-dim": lambda: torch.tensor(0.7),
    "strided": lambda: torch.randn(4, 20)[:, ::2],
    "transposed": lambda: torch.randn(10, 4).t(),
    "negative view": lambda: torch._neg_view(torch.randn(4, 10)),
    "parameter": lambda: nn.Parameter(torch.randn(4, 10)),
}


@pytest.mark.parametrize("route", ["kernels", "python"])
@pytest.mark.parametrize("op", GRID)
def test_nothing_that_torch_computes_raises(op: str, route: str) -> None:
    """Every op with dtypes, ranges and layouts that fit and that do not."""
    integers = (torch.int32, torch.int64, torch.int8)
    calls = []
    for name, make in TENSORS.items():
        for scale_dtype in FLOATS:
            for zero_dtype in (*integers, torch.float32, torch.float16):
                for wants in (False, True):
                    for quant_range in ((-8, 7), (0, 255), (0, 2**31 - 1), (1, 1), (7, -8)):
                        scale = torch.full((4,), 0.25).to(scale_dtype).requires_grad_(wants)
                        args = make(), scale, torch.ones(4).to(zero_dtype), *quant_range
                        calls.append((f"{name} {scale_dtype} {zero_dtype} {quant_range}", args))

    def attempt(args: tuple) -> bool:
        try:
            GRID[op](*args)
        except (RuntimeError, IndexError, NotImplementedError):
            return False
        return True

    computes = [attempt(args) for _, args in calls]
    assert any(computes)
    with qk.override_torch() if route == "kernels" else python_routes():
        refused = [name for (name, args), ok in zip(calls, computes, strict=True) if ok and not attempt(args)]
    assert not refused


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises((RuntimeError, IndexError)):
        call()
    with qk.override_torch(), pytest.raises(RuntimeError, match=message):
        call()
