"""follow_range: every kernel bit for bit as the reference, its rules by hand, and what the quantizers make of it."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS
from conftest import kernels_of
from torch import Tensor, nn

import qkernels as qk
from qkernels.nn import FakeQuantize
from qkernels.ops import follow_range as ops
from qkernels.ops.follow_range import follow_range
from qkernels.reference import follow_range as reference

pytestmark = pytest.mark.sanitized

KERNELS = kernels_of("follow_range")
COMPILED = [name for name in KERNELS if name.startswith("cpu_")]
DEVICE = [name for name in KERNELS if name not in COMPILED and name != "reference"]
SMALL = [(name, shape) for name, shape in GRANULARITIES if INPUTS[name][0](torch.float32).numel() < 10_000]
# zero point, symmetric, up, down
RULES = [
    (None, True, 1.0, 1.0),
    (torch.int32, False, 1.0, 1.0),
    (torch.float32, False, 0.1, 0.0),
    (torch.bfloat16, True, 0.3, 0.7),
    (torch.float64, False, 0.0, 0.5),
]


def check_kernel(kernel: str, x: Tensor, shape: tuple[int, ...], rule: tuple[object, ...]) -> None:
    dtype, symmetric, up, down = rule
    scale = torch.rand(shape) * 0.05
    zero_point = None if dtype is None else torch.randint(-9, 9, shape).to(dtype)
    expected, got = [(scale.clone(), None if zero_point is None else zero_point.clone()) for _ in range(2)]
    reference.follow_range(x, *expected, -128, 127, symmetric, up, down)
    with qk.use_kernel(kernel):
        ops._follow_range(x, *got, -128, 127, symmetric, up, down)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
def test_compiled_kernels_equal_the_reference(kernel: str, name: str, shape: tuple[int, ...]) -> None:
    for dtype in FLOATS:
        for rule in RULES:
            x = INPUTS[name][0](dtype)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                check_kernel(kernel, x, shape, rule)
            if x.numel():
                assert qk.library.host.last_isa() == kernel.removeprefix("cpu_")


@pytest.mark.parametrize("kernel", DEVICE)
@pytest.mark.parametrize(("name", "shape"), SMALL)
def test_device_kernels_equal_the_reference(kernel: str, name: str, shape: tuple[int, ...]) -> None:
    """Dtypes and rules in turn."""
    at = GRANULARITIES.index((name, shape))
    check_kernel(kernel, INPUTS[name][0](FLOATS[at % 4]), shape, RULES[at % 5])


@pytest.mark.parametrize("kernel", [*COMPILED, *DEVICE, "reference"])
def test_the_rules_by_hand(kernel: str) -> None:
    x = torch.tensor([[1.0, -3.0], [0.5, 0.25], [0.0, -0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    scale = torch.ones(5, 1)
    with qk.use_kernel(kernel):
        follow_range(x, scale, quant_min=-2, quant_max=2)
        assert scale.flatten().tolist() == [1.5, 0.25, 1, 1, 1]  # zeros, NaN and infinity change nothing
        follow_range(4 * x, scale, quant_min=-2, quant_max=2, up=0.5, down=0.0)
        assert scale.flatten().tolist() == [1.5 + 0.5 * 4.5, 0.25 + 0.5 * 0.75, 1, 1, 1]
        follow_range(x / 8, scale, quant_min=-2, quant_max=2, up=0.5, down=0.0)
        assert scale.flatten().tolist() == [3.75, 0.625, 1, 1, 1]  # does not shrink
        scale, zero_point = torch.ones(1), torch.tensor([5.0])
        follow_range(torch.tensor([0.0, 30.0]), scale, zero_point, quant_min=-8, quant_max=7, symmetric=False, up=0.5)
        assert (scale.item(), zero_point.item()) == (1.5, -1.5)
        largest = torch.finfo(torch.float32).max
        follow_range(torch.tensor([-largest, largest]), scale, zero_point, quant_min=-8, quant_max=7, symmetric=False)
        assert scale.isfinite().all()
        assert scale > largest / 8


@pytest.mark.parametrize("kernel", [*COMPILED, *DEVICE, "reference"])
def test_refusals(kernel: str) -> None:
    x, scale, int_point = torch.randn(4, 6), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32)
    rule = {"quant_min": -8, "quant_max": 7}
    with qk.use_kernel(kernel):
        for argument, args, rest in [
            ("x", (x.long(), scale), {}),
            ("scale", (x, scale.double()), {}),
            ("scale", (x, torch.ones(3, 1)), {}),
            ("scale", (x, torch.ones(8, 1)[::2]), {}),
            ("zero_point", (x, scale, int_point), {"up": 0.5}),
            ("zero_point", (x, scale, int_point.long()), {}),
            ("zero_point", (x, scale, torch.zeros(1)), {}),
            ("up", (x, scale), {"up": 1.5}),
            ("down", (x, scale), {"down": float("nan")}),
            ("quant_min", (x, scale), {"quant_min": 9}),
        ]:
            before = scale.clone()
            with pytest.raises(RuntimeError, match=argument):
                follow_range(*args, **{**rule, **rest})
            assert torch.equal(scale, before)


def test_opcheck() -> None:
    for dtype, symmetric, up, down in RULES:
        zero_point = None if dtype is None else torch.zeros(1, 5, dtype=dtype)
        args = (torch.randn(3, 5), torch.ones(1, 5), zero_point, -8, 7, symmetric, up, down)
        torch.library.opcheck(torch.ops.qkernels.follow_range.default, args)


# What the quantizers make of it.


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
def test_a_weight_changed_in_place_is_quantized_by_its_own_range(quantizer: str) -> None:
    """In eval mode too, and when it is converted: no scale is older than the weight."""
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    prepared = qk.prepare(nn.Linear(32, 8), qk.QConfig(weight=qk.QSpec(quantizer=quantizer)))
    qk.calibrate(prepared, [x])
    prepared.eval()
    with torch.no_grad():
        prepared.weight.mul_(5)
    before = copy.deepcopy(prepared.state_dict())
    y = prepared(x)
    weight = prepared.weight
    exact = nn.functional.linear(x, weight, prepared.bias)
    assert (y - exact).norm() / exact.norm() < 0.02
    for key, value in prepared.state_dict().items():  # an evaluation changes nothing
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(qk.convert(prepared)(x), y, rtol=1e-5, atol=1e-5)


def test_a_float_state_beside_stale_scales_is_not_clipped() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(32, 8), torch.randn(16, 32)
    prepared = qk.prepare(copy.deepcopy(model))
    qk.calibrate(prepared, [x])
    state = prepared.state_dict()
    larger = {key: 7 * value for key, value in model.state_dict().items()}
    state.update(larger)
    prepared.load_state_dict(state)
    exact = nn.functional.linear(x, larger["weight"], larger["bias"])
    assert (prepared.eval()(x) - exact).norm() / exact.norm() < 0.02


def test_frozen_ranges_stay() -> None:
    x = torch.randn(4, 8)
    quantizer = FakeQuantize(quantizer="minmax", shape=(4, 8))
    quantizer(x)
    scale = quantizer.scale.clone()
    quantizer.disable_observer()
    for mode in (True, False):
        quantizer.train(mode)
        quantizer(3 * x)
        assert torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
def test_two_calls_in_one_step(quantizer: str) -> None:
    """A shared weight's second call must not spoil what the first has saved for the backward pass."""
    weight = nn.Parameter(torch.randn(4, 8))
    fake = FakeQuantize(quantizer=quantizer, shape=weight.shape)
    (fake(weight) * 2 + fake(weight)).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 3))


@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e30])
@pytest.mark.parametrize("bits", [8, 5])
def test_weights_of_any_size_train(scale: float, bits: int) -> None:
    weight = nn.Parameter(torch.randn(4, 64) * scale)
    fake = FakeQuantize(bits=bits, shape=weight.shape)
    y = fake(weight)
    y.sum().backward()
    assert float((y - weight).detach().abs().max() / weight.detach().abs().max()) < 0.6 / fake.quant_max
    assert weight.grad.isfinite().all()
    assert fake.log_scale.grad.isfinite().all()
