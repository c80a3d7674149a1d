"""Ranges wider than their dtype: finite values give finite scales, however far apart they lie."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from cases import FLOATS
from compare import same
from conftest import kernels_of
from torch import Tensor

import qkernels as qk
from qkernels.ops import dynamic
from qkernels.ops import observe_fake_quantize as observe_ops
from qkernels.ops import silu_mul_quantize as silu_ops
from qkernels.reference import dynamic as dynamic_reference
from qkernels.reference import ranges
from qkernels.reference import silu_mul_quantize as silu_reference

FLOAT_MAX = torch.finfo(torch.float32).max
WIDE = (torch.float32, torch.bfloat16, torch.float64)


def wide(dtype: torch.dtype, columns: int) -> Tensor:
    """Rows whose ranges lie beyond the dtype they are computed in, and an ordinary one."""
    x = torch.rand(5, columns, dtype=torch.float64) * 2 - 1
    top = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    x[:4] *= torch.tensor([0.88, 0.6, 0.99, 0.88]).double()[:, None] * top
    x[:4, 0], x[:4, -1] = -0.88 * top, 0.88 * top
    x[3] = x[3].abs().neg()  # 0 to the bottom: no difference overflows
    return x.to(dtype)


def exact_scale(x: Tensor, steps: int) -> float:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    return float((Fraction(high) - Fraction(low)) / steps)


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"), indirect=True)
def test_known_values(kernel: str) -> None:
    x = torch.tensor([3e38, -3e38, 1, 0])
    y, scale, zero_point = qk.fake_quantize_dynamic(x, symmetric=False, return_qparams=True)
    assert scale.item() == pytest.approx(6e38 / 255, rel=1e-7)
    assert zero_point.item() == 0
    torch.testing.assert_close(y, torch.tensor([3e38, -3e38, 0, 0]), rtol=0.004, atol=0)


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"), indirect=True)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("columns", [37, 5000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic(kernel: str, dtype: torch.dtype, bits: int, columns: int, symmetric: bool) -> None:
    x = wide(dtype, columns)
    low, high = dynamic.range_of_bits(bits)
    for group in (-1, 0):
        got = dynamic._dynamic_forward(x, group, low, high, symmetric)
        for a, b in zip(
            got, dynamic_reference.fake_quantize_dynamic_forward(x, group, low, high, symmetric), strict=True
        ):
            same(a, b)
        y, scale, zero_point, _ = got
        assert scale.isfinite().all()
        if not symmetric:
            for row, s in zip(x if group == -1 else [x], scale.flatten(), strict=True):
                assert s.item() == pytest.approx(exact_scale(row, high - low), rel=2**-22)
        half = (qk.quantize(x, scale, zero_point, quant_min=low, quant_max=high) - zero_point) * (scale.double() / 2)
        fits = half.abs() < torch.finfo(dtype).max * 0.499  # the multiple of scale, which may lie beyond x itself
        assert fits.double().mean() > 0.5
        torch.testing.assert_close(y.double()[fits] / 2, half[fits], rtol=2**-8, atol=0)
        assert not y.isnan().any()
        assert ((half - x.double() / 2).abs() <= scale.double() * 0.2501 + x.double().abs() * 2**-20).all()
        q, *qparams = qk.quantize_dynamic(x, bits=bits, group_size=group or None, symmetric=symmetric)
        for a, b in zip(qparams, (scale, zero_point), strict=True):
            same(a, b)
        same(q, qk.quantize(x, scale, zero_point, quant_min=low, quant_max=high))


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_numbers(kernel: str, dtype: torch.dtype) -> None:
    """A scale that is rounded up must not make the largest number infinite; an infinity still is one."""
    top = torch.finfo(dtype).max
    rows = ([top, -top, top / 2, 0], [-top, 1, 0, -top / 2], [math.inf, 1, 0, -2])
    both, below, infinite = (torch.tensor([row] * 3, dtype=torch.float64).to(dtype) for row in rows)
    with qk.use_kernel(kernel):
        for bits in (2, 3, 6, 8):
            for x, symmetric in ((both, True), (below, True), (below, False), (infinite, True)):
                for group in (-1, 0):
                    args = (x, group, *dynamic.range_of_bits(bits), symmetric)
                    got = dynamic._dynamic_forward(*args)
                    for a, b in zip(got, dynamic_reference.fake_quantize_dynamic_forward(*args), strict=True):
                        same(a, b)
                    if x is infinite:
                        assert got[1].isinf().all()
                    else:
                        assert got[0].isfinite().all()
                        ends = x.double().abs().amax(1) / 2, got[0].double().abs().amax(1) / 2
                        torch.testing.assert_close(*ends, rtol=2**-8 if dtype == torch.bfloat16 else 2**-10, atol=0)


@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"), indirect=True)
def test_the_largest_number_transposed(kernel: str) -> None:
    x = torch.tensor([[FLOAT_MAX, 1, 0]] * 3)
    scale, _, scale_t = qk.quantize_dynamic_transposed(x)[1:]
    same(scale, dynamic_reference.dynamic_qparams(x, -1, -127, 127, True)[0])
    same(scale_t, dynamic_reference.dynamic_qparams(x.t(), -1, -127, 127, True)[0])


@pytest.mark.parametrize("steps", [1, 3, 15, 255, 65535, 2**25 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_scales_keep_their_bits(steps: int, dtype: torch.dtype) -> None:
    """Half the range over half the steps is the range over the steps."""
    magnitude = 10.0 ** torch.linspace(-30, 37, 4000)
    low, high = (-torch.rand(4000) * magnitude).to(dtype), (torch.rand(4000) * magnitude).to(dtype)
    plain = (high - low) / torch.full_like(low, steps)
    scale, zero_point = ranges.qparams_of_range(low, high, 0, min(steps, 2**24), False, 0.0)
    if steps <= 2**24:
        same(scale, plain.clamp(min=torch.finfo(torch.float32).tiny))
        same(zero_point, (-(low / scale).round()).clamp(0, steps).to(torch.int32))
    same(ranges.step_of(low, high, steps), plain)


@pytest.mark.parametrize("kernel", kernels_of("observe_fake_quantize"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 1)])
@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0])
def test_observer(kernel: str, dtype: torch.dtype, shape: tuple[int, ...], momentum: float) -> None:
    """The range, and its moving average from one end of fp32 to the other."""
    batches = [wide(dtype, 37), wide(dtype, 37).abs(), -wide(dtype, 37).abs(), torch.full((5, 37), 3e38).to(dtype)]
    batches += [-batches[-1], torch.randn(5, 37).to(dtype)]
    on = torch.ones(1, dtype=torch.int64)

    def run(name: str) -> list[Tensor]:
        stats = [torch.full(shape, math.inf), torch.full(shape, -math.inf), torch.ones(shape)]
        stats.append(torch.zeros(shape, dtype=torch.int32))
        results = []
        with qk.use_kernel(name):
            for batch in batches:
                results += observe_ops._observe(batch, on, on, *stats, momentum, -128, 127, 0.0, 0)
                results += [stat.clone() for stat in stats]
        return results

    got = run(kernel)
    for a, b in zip(got, run("reference"), strict=True):
        same(a, b)
        assert a.isfinite().all()
    low, expected = got[2].double(), [b.double().amin(1 if len(shape) > 1 else (0, 1)).view(shape) for b in batches]
    for step in range(1, len(batches)):
        low = low + torch.tensor(momentum).double() * (expected[step] - low)
        torch.testing.assert_close(got[6 * step + 2].double(), low, rtol=1e-6, atol=FLOAT_MAX * 1e-7)
        low = got[6 * step + 2].double()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choose_qparams_and_mse(symmetric: bool, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    low, high = (torch.tensor(ends, dtype=dtype) * top for ends in ((-1, -0.8, 0.0), (0.5, 0.7, 1)))
    scale, zero_point = qk.choose_qparams(low, high, quant_min=-128, quant_max=127, symmetric=symmetric)
    assert scale.isfinite().all()
    steps = 127 if symmetric else 255
    span = torch.maximum(-low, high) / steps if symmetric else high / steps - low / steps
    torch.testing.assert_close(scale, span, rtol=1e-6, atol=0)
    assert zero_point.tolist() == ([0, 0, 0] if symmetric else [42, 8, -128])
    x = wide(dtype, 300)[:3]
    ends = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    for end in qk.ops.statistics.mse_range(x, *ends, -128, 127, symmetric, 0.0):
        assert end.isfinite().all()


@pytest.mark.parametrize("kernel", kernels_of("silu_mul_quantize_dynamic"), indirect=True)
def test_fused_values(kernel: str) -> None:
    """SiLU(gate)·up beyond half of fp32 on either side."""
    gate = torch.full((3, 40), 3e30)
    up = (torch.rand(3, 40) * 2 - 1) * 1e8
    up[:, 0], up[:, 1] = -1e8, 1e8
    args = (gate, up, -1, -128, 127, False)
    for op, of in (
        (silu_ops._quantize, silu_reference.silu_mul_quantize_dynamic),
        (silu_ops._forward, silu_reference.silu_mul_fake_quantize_dynamic_forward),
    ):
        for a, b in zip(op(*args), of(*args), strict=True):
            same(a, b)
            assert a.double().isfinite().all()
