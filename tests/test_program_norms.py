"""LayerNorm and RMSNorm in programs: the steps on every path against the reference, and converted transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import paths_of
from program_plans import Plan
from test_int8_program import check, kept
from torch.nn import functional as F

from qkernels import library
from qkernels.reference import int8_program as reference
from qkernels.reference.activation import gelu_tanh

pytestmark = pytest.mark.sanitized


@pytest.fixture(params=paths_of("int8_program"))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


@pytest.mark.parametrize("step", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("channels", [1, 5, 16, 37, 768, 1100])
def test_norms(kernel: str, step: str, affine: bool, channels: int) -> None:
    """Bit for bit: sums have one order on every path."""
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    weights = {"weight": torch.randn(channels)} if affine else {}
    if affine and step == "layer_norm":
        weights["bias"] = torch.randn(channels)
    for y in kept(step, channels=channels, eps=1e-5, **weights)(plan, x, q):
        plan.output(y)
    for shape in ((7, channels), (40, channels), (2, channels, 3), (0, channels), (2, channels, 0)):
        check(plan, torch.randn(shape) + 0.5, kernel=kernel if 0 not in shape else None)
    check(plan, torch.randn(channels, 7).t())


@pytest.mark.parametrize("step", ["layer_norm", "rms_norm"])
def test_norms_are_torchs(step: str) -> None:
    plan = Plan()
    c, w, b = 200, torch.randn(200), torch.randn(200)
    weights = {"weight": w, "bias": b} if step == "layer_norm" else {"weight": w}
    plan.output(plan.floats(step, x=plan.input(), channels=c, eps=1e-3, **weights))
    x = torch.randn(9, c) * 3 + 20
    expected = F.layer_norm(x, (c,), w, b, 1e-3) if step == "layer_norm" else F.rms_norm(x, (c,), w, 1e-3)
    (got,) = reference.int8_program([x], plan.constants, plan.text)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("step", ["layer_norm", "rms_norm"])
def test_a_norm_that_is_nan_makes_its_image_nan(kernel: str, step: str) -> None:
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    plan.output(plan.move("dequantize", plan.codes(step, q, x=x, channels=20, eps=1e-5), "f"))
    plan.output(plan.floats("binary", kind="add", a=x, b=x))
    values = torch.randn(5, 20)
    values[0, 19], values[2, 3], values[3, 4] = torch.inf, torch.nan, -torch.inf
    values[4] = 3e38  # whose squares overflow
    check(plan, values)
    got = torch.ops.qkernels.int8_program([values], plan.constants, plan.text)
    assert [y.isnan().all(1).tolist() for y in got] == [[True, False, True, True, step == "layer_norm"]] * 2


def test_a_weight_that_is_not_finite_makes_all_nan(kernel: str) -> None:
    plan = Plan()
    weight = torch.randn(8)
    plan.output(plan.floats("layer_norm", x=plan.input(), channels=8, eps=1e-5, weight=weight))
    weight[3] = torch.inf
    check(plan, torch.randn(3, 8))
    assert torch.ops.qkernels.int8_program([torch.randn(3, 8)], plan.constants, plan.text)[0].isnan().all()


def test_refusals() -> None:
    x = torch.randn(3, 8)
    for line, message in (
        ("layer_norm x=f0 channels=9 eps=1e-5 out=f1", "x: got 8 channels; accepted: 9"),
        ("layer_norm x=f0 channels=0 eps=1e-5 out=f1", "channels: got '0'; accepted: an integer from 1"),
        ("layer_norm x=f0 channels=8 eps=? out=f1", r"eps: got '\?'; accepted: a number"),
        ("rms_norm x=f0 channels=8 eps=1 bias=0 out=f1", "got the key 'bias'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qkernels.int8_program([x], [torch.randn(8)], f"input out=f0 index=0\n{line}\noutput x=f1 index=0")


def test_gelu_tanh_is_torchs() -> None:
    x = torch.cat([torch.linspace(-12, 12, 10001), torch.tensor([1e-30, -1e-30, 1e20, -1e20, torch.inf, torch.nan])])
    torch.testing.assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"), rtol=3e-6, atol=1e-6, equal_nan=True)
