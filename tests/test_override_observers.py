"""override_torch: the fused observer, and models of torch.ao in training."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from compare import same
from overriding import both, python_routes
from torch import Tensor, nn

import qkernels as qk

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(qk.library.host is None, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("override_ends"),
]


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
