"""override_torch: torch's fake-quantize ops on our kernels, bit for bit, in every way that they are reached."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from cases import FLOATS, INPUTS, channels_last
from compare import same
from conftest import kernels_of, run_python
from torch import Tensor, nn

import qkernels as qk
from qkernels import checks
from qkernels.integrations import aten
from qkernels.reference import aten_fake_quantize as reference

pytestmark = pytest.mark.skipif(qk.library.host is None, reason="needs the compiled kernels")
A = torch.ops.aten
NAN = torch.tensor([math.nan])


def rerouted() -> bool:
    """Whether torch's op runs on our kernel: NaN stays NaN there."""
    return bool(torch.fake_quantize_per_tensor_affine(NAN, 0.1, 0, -8, 7).isnan())


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    assert not rerouted()
    yield
    assert not rerouted()


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What the call gives inside an override, and what torch gives."""
    want = call()
    with qk.override_torch():
        got = call()
    return got, want


# The ops, forward.

NUMBERS = [(0.07, 3, -8, 7), (0.5, 1, -128, 127), (1.0, 0, 0, 255), (-0.1, 0, -8, 7), (0.003, -5, -(2**31), 2**31 - 1)]
KERNELS = [name for name in kernels_of("fake_quantize_forward") if name.startswith("cpu_")]
OLD_HALVES = torch.__version__ < (2, 12)  # of 108,000 bf16 elements with fp16 zero points 2 are a step away


def inputs(dtype: torch.dtype) -> Iterator[Tensor]:
    for name, (make, _) in INPUTS.items():
        if name not in ("special values", "many channels last", "long rows"):
            yield make(dtype)
    yield (torch.arange(-60, 61) / 2).to(dtype).repeat(3, 1)  # ties
    special = torch.tensor([math.inf, -math.inf, 1e-40, -1e-40, -0.0, 0.0, 3e38, -3e38], dtype=torch.float64)
    yield special.to(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_per_tensor(kernel: str, dtype: torch.dtype) -> None:
    for x in inputs(dtype):
        for scale, zero_point, low, high in NUMBERS:

            def call(x: Tensor = x, s: float = scale, z: int = zero_point, low: int = low, high: int = high) -> Any:
                out = [*A.fake_quantize_per_tensor_affine_cachemask(x, s, z, low, high)]
                for dtypes in ((torch.float32, torch.int32), (torch.float64, torch.int64), (torch.half, torch.float32)):
                    params = torch.tensor([s], dtype=dtypes[0]), torch.tensor(z, dtype=dtypes[1])
                    for on in (1, 0):
                        flag = torch.tensor([on])
                        op = A._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
                        out += op(x, *params, flag, low, high)
                return out

            want = call()
            with qk.override_torch(), qk.use_kernel(kernel):
                same(call(), want)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_per_channel(kernel: str, dtype: torch.dtype) -> None:
    """Float zero points too, which torch adds before it rounds. +inf is not among the values: see the faults."""
    for x in inputs(dtype):
        for axis in range(x.dim()):
            channels = x.size(axis)
            if channels == 0 or bool(x.isinf().any()) or bool((x.double().abs() > 1e18).any()):
                continue
            for scale, zero_point, low, high in NUMBERS:
                scales = torch.arange(channels) % 50 * 0.013 + abs(scale)
                z = (torch.arange(channels) % 7 + (zero_point - 3 if low < 0 else 0)).int().clamp(low, high)
                for zp in (z, z.float(), torch.zeros(channels), z + 0.3, z.half()):

                    def call(args: tuple = (x, scales, zp, axis, low, high)) -> Any:
                        return A.fake_quantize_per_channel_affine_cachemask(*args)

                    want = call()
                    with qk.override_torch(), qk.use_kernel(kernel):
                        got = call()
                    if OLD_HALVES and (x.dtype, zp.dtype) == (torch.bfloat16, torch.float16):
                        elsewhere = got[0] != want[0]
                        step = scales.view(-1, *[1] * (x.dim() - 1 - axis)).expand_as(x)[elsewhere]
                        assert len(step) <= 2
                        assert ((got[0] - want[0])[elsewhere].abs() <= 1.01 * step).all()
                        got[0][elsewhere], got[1][elsewhere] = want[0][elsewhere], want[1][elsewhere]
                    same(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("zero_point", [0.0, 2.5, -1.4, 99.0])
def test_learnable_forward(dtype: torch.dtype, zero_point: float) -> None:
    for x in inputs(dtype):
        one = torch.tensor([0.07]), torch.tensor([zero_point])
        same(*both(lambda x=x, one=one: A._fake_quantize_learnable_per_tensor_affine(x, *one, -8, 7, 0.5)))
        for axis in range(x.dim()):
            n = x.size(axis)
            if n and not bool(x.isinf().any()) and not bool((x.double().abs() > 1e18).any()):
                params = torch.arange(n) * 0.01 + 0.05, torch.arange(n) * 0.7 - zero_point
                op = A._fake_quantize_learnable_per_channel_affine
                same(*both(lambda x=x, p=params, axis=axis, op=op: op(x, *p, axis, -8, 7, 0.5)))


# Gradients.


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


@pytest.mark.parametrize("case", AFFINE)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient(case: str, dtype: torch.dtype) -> None:
    for make in (
        lambda: torch.randn(6, 37),
        lambda: torch.randn(0, 4),
        lambda: torch.randn(40, 6).t(),
        lambda: torch.randn(6, 70)[:, ::2],
        lambda: channels_last(torch.randn(2, 5, 8, 7)),
    ):
        x = make().to(dtype).requires_grad_()
        got, want = both(lambda x=x: gradients(AFFINE[case], [x]))
        same(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)  # a clipped element gives 0, torch's −0 among them
        assert not got[1][got[1] == 0].signbit().any()
        got, want = both(lambda x=x: torch.autograd.grad(AFFINE[case](x).sum(), x)[0])  # an expanded gradient
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("case", AFFINE)
def test_second_derivative(case: str) -> None:
    x = torch.randn(6, 20, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(AFFINE[case](x).square().sum(), x, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.sum(), x)

    got, want = both(call)
    assert want[1].any()
    same(got, want)


@pytest.mark.parametrize("zero_point", [2.0, 0.0])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_learnable_gradients(axis: int | None, zero_point: float) -> None:
    """Where torch is right: zero points that are whole and not negative, no ties."""
    n = 1 if axis is None else (6, 50)[axis]
    leaves = [torch.randn(6, 50), torch.full((n,), 0.11), torch.full((n,), zero_point)]
    for leaf in leaves:
        leaf.requires_grad_()
    name, rest = ("per_tensor", ()) if axis is None else ("per_channel", (axis,))
    op = getattr(torch, f"_fake_quantize_learnable_{name}_affine")
    got, want = both(lambda: gradients(lambda x, s, z: op(x, s, z, *rest, -8, 7, 0.3), leaves))
    same(got[0], want[0])
    for g, w in zip(got[1:], want[1:], strict=True):
        assert g.shape == w.shape
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_gradient_mask_errors() -> None:
    with qk.override_torch(), torch.no_grad():
        for mask in (torch.ones(4), torch.ones(3, dtype=torch.bool)):
            with pytest.raises(RuntimeError, match=r"mask: got .*; accepted: torch.bool of grad's shape \[4\]"):
                torch.ops.qkernels.fake_quantize_backward_bytes(torch.ones(4), mask)
            with pytest.raises(RuntimeError):
                A.fake_quantize_per_tensor_affine_cachemask_backward(torch.ones(4), mask)


# The faults of torch, which are not ours.


def test_fault_nan_and_infinity() -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, -1e30, 1e19]])
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    calls = [
        lambda: A.fake_quantize_per_tensor_affine_cachemask(x, 1.0, 0, -8, 7),
        lambda: A._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(x, one, zero, one, -8, 7),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x, one, zero, 0, -8, 7),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x, one, zero + 0.0, 0, -8, 7),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x.double(), one, zero + 1.0, 0, -8, 8),
        lambda: A.fake_quantize_per_channel_affine_cachemask(x, one, zero, 0, -(2**30), 2**30),
    ]
    for call in calls:
        (y, mask), (theirs, _) = both(call)
        assert not theirs[0, 0].isnan()
        assert y[0, 0].isnan()
        high, low = y[0, 1], y[0, 2]
        assert high > 6
        assert low < -6
        assert (y[0, 3:] == torch.stack([high, low, high])).all()
        assert not mask.any()


def test_fault_dead_channel() -> None:
    x = torch.tensor([[0.0, 0.0, 1.0]])
    zero = torch.zeros(1, dtype=torch.int32)
    for scale in (0.0, 1e-44):
        with qk.override_torch():
            y, mask = A.fake_quantize_per_channel_affine_cachemask(x, torch.tensor([scale]), zero, 0, -8, 7)
        assert (y[0, :2] == 0).all()
        assert mask[0, :2].all()
        assert y[0, 2] == 7 * torch.tensor(scale)


def test_fault_infinite_gradient_of_a_clipped_element() -> None:
    x = torch.tensor([100.0, 0.0], requires_grad=True)
    grad = torch.tensor([math.inf, 1.0])
    got, want = both(lambda: torch.autograd.grad(AFFINE["numbers"](x), x, grad)[0])
    assert want[0].isnan()
    assert got.tolist() == [0, 1]


@pytest.mark.parametrize("zero_point", [-1.0, -3.0, 2.5])
def test_fault_learnable_zero_point(zero_point: float) -> None:
    x = torch.randn(1000)

    def call() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), torch.tensor([0.1]).requires_grad_(), torch.tensor([zero_point])]
        leaves[2].requires_grad_()
        return gradients(lambda *a: torch._fake_quantize_learnable_per_tensor_affine(*a, -8, 7), leaves)

    got, theirs = both(call)
    args = torch.linspace(-1, 1, 1000), x, torch.tensor([0.1]), torch.tensor([zero_point]), -8, 7, 1.0
    right = qk.reference.fake_quantize_learnable.fake_quantize_learnable_backward(*args)
    assert (got[1] == right[0]).all()
    torch.testing.assert_close(got[2:], list(right[1:]), rtol=1e-5, atol=1e-5)
    assert (theirs[2] - right[1]).abs() > 1e-2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fault_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(4, 20).to(dtype).requires_grad_()
    scale, zero_point = torch.full((4,), 0.125), torch.tensor([-3, 0, 2, 7])
    want = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, -8, 7)
    one = torch.ones(1, dtype=torch.int64)
    stats = [torch.tensor([math.inf]), torch.tensor([-math.inf]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    with qk.override_torch():
        for zp in (zero_point, zero_point.short(), zero_point.to(torch.int8)):
            for s in (scale, scale.bfloat16(), scale.half(), scale.double()):
                same(torch.fake_quantize_per_channel_affine(x, s, zp, 0, -8, 7), want)
                same(torch.fake_quantize_per_channel_affine(x, s, zp, -2, -8, 7), want)
        for name, args in (("per_tensor", ()), ("per_channel", (0,))):
            n = 1 if name == "per_tensor" else 4
            learned = [torch.full((n,), 0.125, dtype=dtype), torch.zeros(n, dtype=dtype)]
            for leaf in learned:
                leaf.requires_grad_()
            y = getattr(torch, f"_fake_quantize_learnable_{name}_affine")(x, *learned, *args, -8, 7)
            y.sum().backward()
            assert all(leaf.grad.dtype == dtype and leaf.grad.isfinite().all() for leaf in learned)
        y = torch.fused_moving_avg_obs_fake_quant(x, one, one, *stats, 0.01, -128, 127, -1)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.dtype == dx.dtype == dtype
    assert stats[0] == x.min().float()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fault_fused_observer(per_row: bool, symmetric: bool) -> None:
    """The scale and zero point in training are those of convert; resizing, flags and gradients as torch's."""
    kind = tq.MovingAveragePerChannelMinMaxObserver if per_row else tq.MovingAverageMinMaxObserver
    scheme = getattr(torch, f"per_{'channel' if per_row else 'tensor'}_{'symmetric' if symmetric else 'affine'}")
    make = tq.FusedMovingAvgObsFakeQuantize.with_args(
        observer=kind, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=scheme
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, alone = make(), make().activation_post_process
    with qk.override_torch():
        for step in range(4):
            x = (torch.randn(6, 5, 4).relu() * (1 + step)).requires_grad_()
            y = module(x)
            alone(x.detach())
            scale, zero_point = alone.calculate_qparams()
            same(module.scale.detach(), scale)
            assert torch.equal(module.zero_point.long(), zero_point.long())
            module.apply(tq.disable_observer if step == 1 else tq.enable_observer)
            if step == 1:
                alone.averaging_constant = 0.0
            else:
                alone.averaging_constant = 0.01
        args = (zero_point.int(), 0, -128, 127) if per_row else (zero_point.int(), -128, 127)
        name = f"fake_quantize_per_{'channel' if per_row else 'tensor'}_affine"
        want = getattr(torch, name)(x, scale, *args)
        same(y.detach(), want.detach())
        same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x))
        module.apply(tq.disable_fake_quant)
        same(module(x).detach(), x.detach())


def test_fused_observer_keeps_its_statistics_through_a_bad_batch() -> None:
    one = torch.ones(1, dtype=torch.int64)
    stats = [torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([7])]
    before = [s.clone() for s in stats]
    with qk.override_torch():
        torch.fused_moving_avg_obs_fake_quant(torch.tensor([1.0, math.nan]), one, one, *stats, 0.01, -128, 127, 0)
        same(stats, before)
        with pytest.raises(RuntimeError, match=r"running_min: got torch\.float64"):
            torch.fused_moving_avg_obs_fake_quant(
                torch.ones(2), one, one, stats[0].double(), *stats[1:], 0.01, -128, 127, 0
            )


# What torch.ao lets a fused module be, and what it may see.
OBSERVERS: dict[str, tuple[torch.dtype, int | None, int | None, dict[str, Any]]] = {
    "quint8": (torch.quint8, 0, 255, {}),
    "quint8, 7 bits": (torch.quint8, 0, 127, {}),
    "quint8, 4 bits": (torch.quint8, 0, 15, {}),
    "quint8, 1 bit": (torch.quint8, 0, 1, {}),
    "uint8": (torch.uint8, 0, 255, {}),
    "uint16": (torch.uint16, 0, 65535, {}),
    "qint8": (torch.qint8, -128, 127, {}),
    "qint8, own range": (torch.qint8, None, None, {}),
    "qint8, reduced": (torch.qint8, None, None, {"reduce_range": True}),
    "qint8, narrow": (torch.qint8, -127, 127, {}),
    "qint8, 4 bits": (torch.qint8, -8, 7, {}),
    "qint8, 2 bits": (torch.qint8, -2, 1, {}),
    "qint8, one-sided": (torch.qint8, -128, 0, {}),
    "qint8, lopsided": (torch.qint8, -5, 7, {}),
    "int8": (torch.int8, -128, 127, {}),
    "int16": (torch.int16, -(2**15), 2**15 - 1, {}),
    "int32, 24 bits": (torch.int32, -(2**24), 2**24, {}),
}
SEEN: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(6, 5, 4),
    "relu": lambda: torch.randn(6, 5, 4).relu(),
    "negative": lambda: -torch.rand(6, 5, 4) - 1,
    "offset": lambda: torch.randn(6, 5, 4) + 20,
    "skewed": lambda: torch.randn(6, 5, 4).exp() - 0.1,
    "zero": lambda: torch.zeros(6, 5, 4),
    "small": lambda: torch.randn(6, 5, 4) * 1e-6,
    "tiny": lambda: torch.randn(6, 5, 4) * 1e-12,
    "large": lambda: torch.randn(6, 5, 4) * 1e37,
}


def fused_module(observer: str, scheme: str, **kwargs: Any) -> tq.FusedMovingAvgObsFakeQuantize:
    dtype, low, high, rest = OBSERVERS[observer]
    kind = tq.MovingAveragePerChannelMinMaxObserver if "channel" in scheme else tq.MovingAverageMinMaxObserver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tq.FusedMovingAvgObsFakeQuantize(
            observer=kind, quant_min=low, quant_max=high, dtype=dtype, qscheme=getattr(torch, scheme), **rest, **kwargs
        )


def trained_and_converted(module: tq.FusedMovingAvgObsFakeQuantize, data: str) -> bool:
    """Whether a module's last training step used the scale and zero point that convert takes."""
    torch.manual_seed(0)
    for _ in range(3):
        module(SEEN[data]())
    scale, zero_point = module.calculate_qparams()
    return torch.equal(module.scale, scale) and torch.equal(module.zero_point.long(), zero_point.long())


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
                                    "per_channel_symmetric"])  # fmt: skip
@pytest.mark.parametrize("observer", OBSERVERS)
def test_fused_module_trains_with_what_it_converts_with(observer: str, scheme: str) -> None:
    with contextlib.suppress(RuntimeError):  # where it trains at all, torch trains with others
        assert not all(trained_and_converted(fused_module(observer, scheme), data) for data in SEEN)
    with qk.override_torch():
        assert all(trained_and_converted(fused_module(observer, scheme), data) for data in SEEN)
    with python_routes():
        assert all(trained_and_converted(fused_module(observer, scheme), data) for data in SEEN)


def test_fused_module_whose_observer_is_told_more_than_the_op() -> None:
    """The differences that the docs name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own_range = tq.FusedMovingAvgObsFakeQuantize(
            quant_min=None, quant_max=None, dtype=torch.quint8, qscheme=torch.per_tensor_symmetric
        )
    eps = fused_module("qint8", "per_tensor_symmetric", eps=2**-12)
    with qk.override_torch():
        for module in (own_range, eps):
            assert trained_and_converted(module, "small") == (module is not own_range and module is not eps)
        assert trained_and_converted(fused_module("qint8", "per_tensor_symmetric", eps=2**-12), "normal")
    assert own_range.zero_point == 127
    assert own_range.calculate_qparams()[1] == 128
    assert eps.calculate_qparams()[0] == 2**-12


# Whatever torch computes is computed.


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


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises((RuntimeError, IndexError)):
        call()
    with qk.override_torch(), pytest.raises(RuntimeError, match=message):
        call()


# Entering, leaving, nesting.


def test_plain_call_holds_until_restored() -> None:
    first = qk.override_torch()
    second = qk.override_torch()
    assert rerouted()
    first.restore()
    first.restore()
    assert rerouted()
    second.restore()
    assert not rerouted()
    with second:
        assert rerouted()


def test_a_forgotten_call_still_holds_in_a_subprocess() -> None:
    done = run_python("""
import gc, torch, qkernels as qk
qk.override_torch()
gc.collect()
print(torch.fake_quantize_per_tensor_affine(torch.tensor([float("nan")]), 0.1, 0, -8, 7).item())
""")
    assert done.stdout == "nan\n", done.stderr
    assert done.stderr == ""


def test_nested_interleaved_and_left_by_an_exception() -> None:
    def fail() -> None:
        with qk.override_torch():
            with qk.override_torch():
                assert rerouted()
            assert rerouted()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not rerouted()
    one, two = qk.override_torch(), qk.override_torch()
    with one:
        two.restore()
        assert rerouted()
    assert not rerouted()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(qk.override_torch())
        assert rerouted()


def test_torch_is_what_it_was_afterwards() -> None:
    x = torch.cat([torch.randn(1000), NAN, torch.tensor([math.inf])]).requires_grad_()
    before = [gradients(fn, [x.view(2, -1)]) for fn in AFFINE.values()]
    for _ in range(3):
        with qk.override_torch():
            assert rerouted()
        for fn, want in zip(AFFINE.values(), before, strict=True):
            same(gradients(fn, [x.view(2, -1)]), want)


def test_every_thread_is_rerouted() -> None:
    seen: list[bool] = []

    def work() -> None:
        seen.append(rerouted())
        x = torch.randn(50, requires_grad=True)
        AFFINE["numbers"](x).sum().backward()

    with qk.override_torch():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [True] * 8


def test_entered_by_many_threads_at_once() -> None:
    gate = threading.Barrier(8)
    seen: list[bool] = []

    def work() -> None:
        gate.wait()
        for _ in range(20):
            with qk.override_torch():
                pass
        handle = qk.override_torch()
        gate.wait()
        seen.append(rerouted())
        gate.wait()
        handle.restore()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8


def test_without_compiled_kernels_torch_stays_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk.library, "host", None)
    monkeypatch.setattr(qk.library, "cpu_missing", "not built here")
    with pytest.warns(UserWarning, match="leaves torch's own kernels on the CPU: not built here"), qk.override_torch():
        assert not rerouted()


# Above the kernels: tracing, compiling, transforms.


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", AFFINE)
def test_compiled(case: str, backend: str) -> None:
    """Compiled inside or outside, code is rerouted where it runs inside, and only there."""
    x = torch.cat([torch.randn(39), NAN]).view(4, 10).requires_grad_()
    want = gradients(AFFINE[case], [x])
    with qk.override_torch():
        ours = gradients(AFFINE[case], [x])
    assert ours[0].isnan().any()
    for compile_inside in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(AFFINE[case], fullgraph=True, backend=backend)
        if compile_inside:
            with qk.override_torch():
                gradients(compiled, [x])
        with torch.compiler.set_stance("default" if not compile_inside else "fail_on_recompile"):
            torch.testing.assert_close(gradients(compiled, [x]), want, rtol=0, atol=0, equal_nan=True)
        with torch.compiler.set_stance("fail_on_recompile"), qk.override_torch():
            torch.testing.assert_close(gradients(compiled, [x]), ours, rtol=0, atol=0, equal_nan=True)


def test_compiled_learnable_and_fused() -> None:
    x, scale, zero_point = torch.randn(6, 20), torch.full((6,), 0.05), torch.ones(6)
    one = torch.ones(1, dtype=torch.int64)

    def fn(x: Tensor, s: Tensor, z: Tensor, stats: list[Tensor]) -> Tensor:
        y = torch._fake_quantize_learnable_per_channel_affine(x, s, z, 0, -8, 7, 0.5)
        return torch.fused_moving_avg_obs_fake_quant(y * 3, one, one, *stats, 0.1, 0, 255, -1)

    def run(fn: Callable[..., Tensor]) -> list[Tensor]:
        stats = [torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        return [*gradients(lambda *leaves: fn(*leaves, stats), leaves), *stats]

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got, want = both(lambda: run(compiled))
    torch.testing.assert_close(want, run(fn), rtol=1e-6, atol=1e-6)
    with qk.override_torch():
        torch.testing.assert_close(got, run(fn), rtol=1e-6, atol=1e-6)


def test_graphs_hold_torchs_ops() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return AFFINE["channels"](AFFINE["tensors"](x))

    def ops(program: torch.export.ExportedProgram) -> list[str]:
        return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    x = torch.randn(3, 4)
    got, want = both(lambda: ops(torch.export.export(Model(), (x,))))
    assert got == want
    assert any("fake_quantize_per_channel_affine" in op for op in got)
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[Any] = []
    with qk.override_torch():
        backend = aot_autograd(
            fw_compiler=lambda g, _: graphs.append(g) or g, bw_compiler=lambda g, _: graphs.append(g) or g
        )
        torch._dynamo.reset()
        torch.compile(Model(), backend=backend)(x.clone().requires_grad_()).sum().backward()
    targets = {str(node.target) for g in graphs for node in g.graph.nodes if node.op == "call_function"}
    assert "aten.mul.Tensor" in targets
    assert not any("qkernels" in target for target in targets)


def test_fake_and_meta_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call() -> list[tuple]:
        with FakeTensorMode():
            x = torch.randn(3, 4, 5, requires_grad=True)
            outs = [gradients(fn, [x]) for fn in AFFINE.values()]
        return [(t.shape, t.stride(), t.dtype) for out in outs for t in out]

    got, want = both(call)
    assert got == want
    with qk.override_torch(), pytest.raises(NotImplementedError):
        AFFINE["numbers"](torch.ones(3, device="meta"))  # as in torch


def test_vmap_and_forward_mode() -> None:
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's slow path
        same(*both(lambda: torch.vmap(AFFINE["numbers"])(x)))
        same(*both(lambda: torch.func.grad(lambda t: AFFINE["numbers"](t).square().sum())(x)))
    with qk.override_torch(), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(AFFINE["numbers"], (x,), (x,))


def test_no_grad_inference_mode_autocast_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(5, 6, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            same(*both(lambda: [fn(x.detach()).clone() for fn in AFFINE.values()]))

    def call() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(lambda x: checkpoint(AFFINE["tensors"], x @ x.t(), use_reentrant=False), [x])

    torch.testing.assert_close(*both(call), rtol=0, atol=0)


# torch.ao.


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        tq.QuantStub(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4),
        tq.DeQuantStub(),
    )  # fmt: skip


def train(qconfig: tq.QConfig, steps: int, converted: bool = False) -> tuple[list[float], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tq.fuse_modules_qat(small_net().train(), ["1", "2", "3"])
        model.qconfig = qconfig
        tq.prepare_qat(model, inplace=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(steps):
            x = torch.randn(16, 3, 8, 8, generator=generator)
            loss = nn.functional.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        out = tq.convert(copy.deepcopy(model))(x) if converted else model(x)
    return losses, out.detach()


def test_torch_ao_with_separate_observers_trains_bit_for_bit() -> None:
    qconfig = tq.get_default_qat_qconfig("fbgemm", version=0)
    (got, out), (want, out_want) = both(lambda: train(qconfig, 12, converted=True))
    assert got == want
    same(out, out_want)


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_torch_ao_with_fused_observers_trains_alike(backend: str) -> None:
    """Not bit for bit: torch's fused observer trains with other scales than it converts with."""
    (got, out), (want, out_want) = both(lambda: train(tq.get_default_qat_qconfig(backend), 12, converted=True))
    assert got != want
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0.02, atol=0.02)
    torch.testing.assert_close(out, out_want, rtol=0.1, atol=0.1)


def test_torch_ao_learnable_module() -> None:
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    def call() -> list[Tensor]:
        module = _LearnableFakeQuantize(
            tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8,
            qscheme=torch.per_tensor_affine, scale=0.05, zero_point=3.0, use_grad_scaling=True,
        )  # fmt: skip
        module.enable_param_learning()
        x = torch.linspace(-1, 9, 997).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, module.scale.grad, module.zero_point.grad]

    torch.testing.assert_close(*both(call), rtol=1e-4, atol=1e-4)


# On the GPU Python chooses between our ops and torch's kernels; the choice is the same on any device.


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


@pytest.fixture
def routed() -> Iterator[None]:
    with python_routes():
        yield


STATS = (torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([7], dtype=torch.int32))
LEARNED = torch.tensor([0.1], requires_grad=True)
ROUTED: dict[str, Callable[[Tensor], Tensor]] = {
    **AFFINE,
    "learnable": lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, LEARNED, torch.zeros(1), -8, 7),
    "learnable channels": lambda x: torch._fake_quantize_learnable_per_channel_affine(
        x, torch.full((x.size(0),), 0.1), torch.zeros(x.size(0)), 0, -8, 7, 0.5
    ),
    "fused": lambda x: torch.fused_moving_avg_obs_fake_quant(
        x, torch.ones(1), torch.ones(1), *(s.clone() for s in STATS), 0.01, -128, 127, -1
    ),
}
HALVES = (torch.float32, torch.bfloat16, torch.float16)  # fp64 is torch's


def test_python_routes_take_calls(routed: None) -> None:
    assert len(aten.DROP_INS) == len(ROUTED)
    x = torch.cat([torch.randn(39), NAN]).view(4, 10).requires_grad_()
    for name, fn in ROUTED.items():
        if name != "fused":
            assert fn(x.detach()).isnan().any(), name
        nodes = fn(x).grad_fn
        assert "Function" in str(nodes.__class__) or "Backward" in str(nodes)
        assert "qkernels" in type(nodes).__module__ or not type(nodes).__name__.startswith("Fake"), name
        (dx,) = torch.autograd.grad(fn(x).nansum(), x)
        assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_python_routes_give_torchs_bits(dtype: torch.dtype) -> None:
    """The forms with byte masks: what compiled code holds."""
    numbers = [(0.07, 3, -8, 7), (0.5, 1, -128, 127), (1.0, 0, 0, 255), (3.1, 5, 5, 5)]
    for x in inputs(dtype):
        for scale, zero_point, low, high in numbers:
            params = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)

            def call(
                x: Tensor = x, s: float = scale, z: int = zero_point, p: Any = params, r: Any = (low, high)
            ) -> Any:
                out = [*A.fake_quantize_per_tensor_affine_cachemask(x, s, z, *r)]
                out += [torch.fake_quantize_per_tensor_affine(x, *p, *r)]
                for on in (1, 0):
                    out += A._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(x, *p, torch.tensor([on]), *r)
                return out

            same(*both_routes(call))
            for axis in range(x.dim()):
                n = x.size(axis)
                if n == 0 or bool(x.isinf().any()) or bool((x.double().abs() > 1e18).any()):
                    continue
                many = torch.arange(n) % 50 * 0.013 + scale, (torch.arange(n) % 7).int().clamp(low, high)
                op = A.fake_quantize_per_channel_affine_cachemask
                same(*both_routes(lambda x=x, p=many, a=axis, r=(low, high), op=op: op(x, *p, a, *r)))


def test_python_routes_run_ours_below_autograd(routed: None) -> None:
    """Each of torch's kernels hides NaN; through the byte masks of ours it stays, outside of the range."""
    x = torch.cat([torch.randn(39), NAN]).view(4, 10)
    one, many = torch.ones(1), torch.full((4,), 0.1)
    calls = {
        "fake_quantize_per_tensor_affine_cachemask": (x, 0.1, 2, -8, 7),
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": (
            x, many[:1], torch.zeros(1).int(), one.long(), -8, 7,
        ),
        "fake_quantize_per_channel_affine_cachemask": (x, many, torch.zeros(4).int(), 0, -8, 7),
    }  # fmt: skip
    for name, args in calls.items():
        y, mask = getattr(A, name)(*args)
        assert y[3, 9].isnan(), name
        assert not mask[3, 9]
    stats = [s.clone() for s in STATS]
    y, mask = A._fused_moving_avg_obs_fq_helper(x, one, one, *stats, 0.01, -128, 127, -1)
    assert y[3, 9].isnan()
    same(stats, list(STATS))  # skipped; torch's would hold NaN
    assert {*calls, "_fused_moving_avg_obs_fq_helper"} | {n for n in aten.KERNELS if "backward" in n} == {*aten.KERNELS}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_python_routes_of_the_fused_observer(per_row: bool, symmetric: bool) -> None:
    """As the C++ kernels of the CPU: output, mask and statistics, resized where they were empty."""

    def run() -> list[Tensor]:
        start = (math.inf, -math.inf, 1, 0)
        n = 0 if per_row else 1
        stats = [torch.full((n,), s, dtype=torch.float32 if i < 3 else torch.int32) for i, s in enumerate(start)]
        torch.manual_seed(0)
        outs: list[Tensor] = []
        for observer, quantizer in ((1, 1), (0, 1), (1, 0)):
            x = torch.randn(6, 5, 4).relu()
            flags = torch.tensor([observer]), torch.tensor([quantizer])
            outs += A._fused_moving_avg_obs_fq_helper(x, *flags, *stats, 0.01, -128, 127, 0, per_row, symmetric)
            outs += [s.clone() for s in stats]
        return outs

    with python_routes():
        got = run()
    with qk.override_torch():
        want = run()
    same(got, want)


@pytest.mark.parametrize("zero_point", [2.0, 0.0, -3.0, 2.5])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_python_routes_of_the_learnable_backward(axis: int | None, zero_point: float) -> None:
    n = 1 if axis is None else (6, 50)[axis]
    name, rest = ("per_tensor", ()) if axis is None else ("per_channel", (axis,))
    op = getattr(A, f"_fake_quantize_learnable_{name}_affine_backward")
    forward = getattr(A, f"_fake_quantize_learnable_{name}_affine")
    x, dy = torch.randn(6, 50), torch.randn(6, 50)
    for dtype in (torch.float32, torch.int32):
        params = torch.full((n,), 0.11), torch.full((n,), zero_point).to(dtype)
        with python_routes(), torch.no_grad():
            got, y = op(dy, x, *params, *rest, -8, 7, 0.3), forward(x, *params, *rest, -8, 7)
            default = op(dy, x, *params, *rest, -8, 7)
        with qk.override_torch():
            want, y_want = op(dy, x, *params, *rest, -8, 7, 0.3), forward(x, *params, *rest, -8, 7)
        same(y, y_want)
        same(got[0], want[0])
        same(default[0], want[0])
        for g, w in zip(got[1:], want[1:], strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape)
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


TORCHS: dict[str, Callable[[Tensor], Any]] = {
    "fp64": lambda x: A.fake_quantize_per_tensor_affine_cachemask(x.double(), 0.1, 0, -8, 7),
    "a range beyond fp32": lambda x: A.fake_quantize_per_tensor_affine_cachemask(x, 0.1, 0, -(2**30), 2**30),
    "a negative scale": lambda x: torch.fake_quantize_per_tensor_affine(x, -0.1, 0, -8, 7),
    "a subnormal scale": lambda x: torch.fake_quantize_per_tensor_affine(x, 1e-40, 0, -8, 7),
    "fp64 scale": lambda x: torch.fake_quantize_per_tensor_affine(
        x, torch.ones(1).double(), torch.zeros(1).int(), -8, 7
    ),
    "float zero point": lambda x: torch.fake_quantize_per_tensor_affine(x, torch.ones(1), torch.ones(1), -8, 7),
    "float zero points": lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.ones(4), torch.full((4,), 0.5), 0, -8, 7
    ),
}


@pytest.mark.parametrize("case", TORCHS)
def test_python_routes_leave_to_torch_what_ours_would_compute_otherwise(case: str) -> None:
    x = torch.cat([torch.randn(39) * 3, NAN]).view(4, 10)
    same(*both_routes(lambda: TORCHS[case](x)))


def test_python_routes_give_torchs_errors() -> None:
    for case in ("range", "zero point", "dtype"):
        call, _ = ERRORS[case]
        with pytest.raises(RuntimeError) as theirs:
            call()
        with python_routes(), pytest.raises(RuntimeError) as ours:
            call()
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_python_routes_leave_to_torch_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 10).requires_grad_()
    want = {name: gradients(fn, [x]) for name, fn in ROUTED.items()}
    monkeypatch.setattr(aten, "_takes", lambda op, *args: False)
    with python_routes():
        for name, fn in ROUTED.items():
            same(gradients(fn, [x]), want[name])
            with torch.no_grad():
                same(fn(x), want[name][0])
        assert not rerouted()


def test_python_routes_ask_every_kernel_with_the_arguments_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may look at any argument, as Triton's do at the shape of scale."""
    asked: dict[str, int] = {}

    def only(op: str) -> list[qk.registry.Kernel]:
        schema = qk.library.dispatched(op)._schema

        def unsupported(*args: Any) -> str | None:
            asked[op] = asked.get(op, 0) + 1
            assert all(declared.has_default_value() for declared in schema.arguments[len(args) :])
            for arg, declared in zip(args, schema.arguments, strict=False):
                assert isinstance(arg, Tensor) == ("Tensor" in str(declared.type)), (op, declared)
            return None

        return [qk.registry.Kernel(op, "any", lambda: None, unsupported)]

    monkeypatch.setattr(aten.registry, "kernels", only)
    x = torch.randn(4, 10, requires_grad=True)
    with python_routes():
        for fn in ROUTED.values():
            gradients(fn, [x])
            with torch.inference_mode():
                fn(x.detach().clone())
        torch.compile(lambda x: [fn(x) for fn in ROUTED.values()], backend="aot_eager")(x.detach())
    assert set(asked) == {
        "fake_quantize_forward_mask", "fake_quantize_forward_mask.scalar", "fake_quantize_learnable_backward",
        "observe_fake_quantize",
    }  # fmt: skip


@pytest.mark.parametrize("case", ROUTED)
def test_python_routes_take_compiled_code(case: str) -> None:
    """Compiled inside or outside, graphs hold torch's ops and are rerouted where they run inside."""
    x = torch.cat([torch.randn(39), NAN]).view(4, 10).requires_grad_()
    with qk.override_torch():
        want = gradients(ROUTED[case], [x])
    assert want[0].isnan().any()
    for compile_inside in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(ROUTED[case], fullgraph=True, backend="aot_eager")
        if not compile_inside:
            gradients(compiled, [x])
        with python_routes():
            got = gradients(compiled, [x])
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_python_routes_under_transforms() -> None:
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's slow path
        same(*both_routes(lambda: torch.vmap(AFFINE["numbers"])(x)))
        for case in AFFINE:
            same(*both_routes(lambda case=case: torch.func.grad(lambda t: AFFINE[case](t).square().sum())(x)))


def test_python_routes_show_tracers_torchs_ops(routed: None) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(AFFINE["numbers"], tracing_mode="fake")(torch.randn(3, 4))
    assert "aten.fake_quantize_per_tensor_affine_cachemask" in graph.code


def test_reference_cannot_take_a_call() -> None:
    for device, takes in (("cpu", True), ("meta", False)):
        one = torch.ones(1, device=device)
        assert aten._takes("fake_quantize_forward", one, one, None, -8, 7) == takes


# The ops behind it.


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_backward_bytes"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward_bytes(kernel: str, dtype: torch.dtype) -> None:
    for name in ("0-dim", "empty", "odd", "channels_last", "transposed", "sliced", "expanded", "misaligned"):
        grad = INPUTS[name][0](dtype)
        mask = torch.empty_like(grad, dtype=torch.bool).copy_(torch.rand(grad.shape) < 0.5)
        with qk.use_kernel(kernel):
            got = torch.ops.qkernels.fake_quantize_backward_bytes(grad, mask)
        assert torch.equal(got, torch.where(mask, grad, 0))
        assert got.stride() == reference.empty_gradient(grad, mask).stride()


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward.channel"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_channel_drop_in(kernel: str, dtype: torch.dtype) -> None:
    """As qk.fake_quantize with the parameters in the shape of that dim, forward and both ways back."""
    for name in ("odd", "image", "channels_last", "transposed", "sliced", "few channels last", "empty"):
        x = INPUTS[name][0](dtype)
        for axis in range(-1, x.dim()):
            n = x.size(axis)
            scale, zero_point = torch.rand(n) * 0.1 + 0.01, torch.randint(-8, 8, (n,)).to(torch.int32)
            for zp in (zero_point, zero_point.float() + 0.4):
                views = checks.channel_views(x, axis, scale, zp)
                for leaf in (x.clone().requires_grad_(), x.requires_grad_() * 1):
                    with qk.use_kernel(kernel):
                        y = qk.fake_quantize_per_channel_affine(leaf, scale, zp, axis, -8, 7)
                        (dx,) = torch.autograd.grad(y.square().sum(), leaf)
                        same(y.detach(), qk.fake_quantize_per_channel_affine(leaf.detach(), scale, zp, axis, -8, 7))
                    want = qk.fake_quantize(leaf, *views, quant_min=-8, quant_max=7)
                    torch.testing.assert_close(y, want, rtol=0, atol=0)
                    (dx_want,) = torch.autograd.grad(want.square().sum(), leaf)
                    torch.testing.assert_close(dx, dx_want, rtol=0, atol=0)
                x = x.detach()


def test_channel_drop_in_second_derivative() -> None:
    for leaf in (True, False):
        x = torch.randn(6, 20, requires_grad=True)
        y = qk.fake_quantize_per_channel_affine(x if leaf else x * 1, torch.full((6,), 0.1), torch.ones(6), 0, -8, 7)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert torch.equal(second, torch.where((first != 0) | (y == 0), 2.0, 0.0))
