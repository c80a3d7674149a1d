"""Histograms, error sums and the ranges chosen by them: counts bit for bit, values against numpy and fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of
from conftest import kernels_of
from torch import Tensor, nn

import qkernels as qk
from qkernels.nn import FakeQuantize
from qkernels.ops import statistics as ops
from qkernels.qat.histogram import BINS, RangeHistogram
from qkernels.reference import statistics as reference

pytestmark = pytest.mark.sanitized

KERNELS = kernels_of("histogram")
COMPILED = [name for name in KERNELS if name.startswith("cpu_")]
DEVICE = [name for name in KERNELS if name not in COMPILED and name != "reference"]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_histogram_kernels_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = INPUTS[name][0](dtype)
    low, high = -2 * torch.rand(shape), torch.rand(shape)
    for bins in (1, 4099):
        expected = reference.histogram(x, low, high, bins)
        assert int(sum(part.sum() for part in expected)) == x.numel()
        for kernel in COMPILED:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with qk.use_kernel(kernel):
                    got = ops._histogram(x, low, high, bins)
                for a, b in zip(got, expected, strict=True):
                    assert a.dtype == torch.int64
                    assert torch.equal(a, b)
                if x.numel():
                    assert qk.library.host.last_isa() == kernel.removeprefix("cpu_")


# The interpreter of Triton takes 4 ms for each block.
SMALL = [(name, shape) for name, shape in GRANULARITIES if INPUTS[name][0](torch.float32).numel() < 10_000]


@pytest.mark.parametrize(("name", "shape"), [*SMALL, ("short runs", (1, 40, 3)), ("long rows", (3, 1))])
@pytest.mark.parametrize("kernel", DEVICE)
def test_device_kernels_equal_the_reference(kernel: str, name: str, shape: tuple[int, ...]) -> None:
    """Dtypes in turn."""
    x = INPUTS[name][0](FLOATS[GRANULARITIES.index((name, shape)) % 4])
    low, high = -2 * torch.rand(shape), torch.rand(shape)
    for value in (x, x.relu()):
        with qk.use_kernel(kernel):
            got = ops._histogram(value, low, high, 37)
        for a, b in zip(got, reference.histogram(value, low, high, 37), strict=True):
            assert torch.equal(a, b)
    x = torch.where(x.isfinite(), x, 0).clamp(-100, 100)
    scale = torch.stack([scale_of(shape), scale_of(shape) * 4])
    for zero_point in (None, torch.randint(-8, 8, scale.shape), torch.randn(scale.shape) * 6):
        with qk.use_kernel(kernel):
            got_errors = ops._quantization_errors(x, scale, zero_point, -8, 7)
        exact = reference.quantization_errors(x.double(), scale.double(), zero_point, -8, 7)
        torch.testing.assert_close(got_errors, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_histogram_by_hand(kernel: str) -> None:
    x = torch.tensor([-1.0, -0.5, 0.0, 0.49, 0.5, 1.0, 1.01, -1.01, math.inf, -math.inf, math.nan, -0.0])
    counts, outside = qk.histogram(x, torch.tensor([-1.0]), torch.tensor([1.0]), bins=4)
    assert counts.tolist() == [[1, 1, 3, 2]]
    assert outside.tolist() == [[2, 2, 1]]
    per_row = qk.histogram(x.view(3, 4), torch.full((3, 1), -1.0), torch.full((3, 1), 1.0), bins=2)
    assert per_row[0].shape == (3, 1, 2)
    assert per_row[0].tolist() == [[[2, 2]], [[0, 2]], [[0, 1]]]
    assert per_row[1].tolist() == [[[0, 0, 0]], [[1, 1, 0]], [[1, 1, 1]]]


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_ranges_that_are_none(kernel: str) -> None:
    """An empty range counts what equals it; a reversed or NaN one holds nothing; an infinite one loses nothing."""
    x = torch.tensor([-1.0, 0.0, 0.0, 2.0])
    ends = [(0.0, 0.0), (1.0, -1.0), (math.nan, 1.0), (-1.0, math.nan), (-math.inf, math.inf), (-3e38, 3e38)]
    found = []
    for low, high in ends:
        counts, outside = qk.histogram(x, torch.tensor([low]), torch.tensor([high]), bins=2)
        found.append((counts.flatten().tolist(), outside.flatten().tolist()))
    assert found[:4] == [
        ([2, 0], [1, 1, 0]), ([0, 0], [3, 1, 0]), ([0, 0], [4, 0, 0]), ([0, 0], [0, 4, 0])
    ]  # fmt: skip
    assert all(sum(counts) == 4 and sum(outside) == 0 for counts, outside in found[4:])


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_histogram_against_torch(kernel: str) -> None:
    """torch.histc takes one division where we multiply by the reciprocal: values at edges may go to the neighbour."""
    x = torch.randn(50_000)
    counts, outside = qk.histogram(x, torch.tensor([-3.0]), torch.tensor([3.0]), bins=500)
    theirs = torch.histc(x, 500, -3, 3).long()
    assert (counts[0] - theirs).abs().max() <= 3
    assert int(outside.sum()) == int((x.abs() > 3).sum())
    grid = torch.arange(-32, 33) / 8.0  # exact either way
    ours = qk.histogram(grid, torch.tensor([-4.0]), torch.tensor([4.0]), bins=16)[0][0]
    assert torch.equal(ours, torch.histc(grid, 16, -4, 4).long())


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantization_errors(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within fp32 rounding of fp64 by brute force; the same bits on every path and thread count."""
    x = INPUTS[name][0](dtype)
    x = torch.where(x.isfinite(), x, 0).clamp(-100, 100) if "special" in name else x
    scale = torch.stack([scale_of(shape) * factor for factor in (0.5, 1, 4)])
    for zero_point in (None, torch.randint(-8, 8, scale.shape), torch.randn(scale.shape) * 6):
        exact = reference.quantization_errors(x.double(), scale.double(), zero_point, -8, 7)
        first = None
        for kernel in COMPILED:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with qk.use_kernel(kernel):
                    got = ops._quantization_errors(x, scale, zero_point, -8, 7)
                first = got if first is None else first
                assert got.dtype == torch.float64
                assert torch.equal(got, first)
        torch.testing.assert_close(first, exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            reference.quantization_errors(x, scale, zero_point, -8, 7), exact, rtol=1e-5, atol=1e-6
        )


def brute_force(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> float:
    values = x.double().numpy()
    q = np.clip(np.rint(values / scale) + zero_point, low, high)
    return float((((q - zero_point) * scale - values) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kernel", kernels_of("quantization_errors"))
def test_mse_takes_the_best_candidate(kernel: str, symmetric: bool) -> None:
    x = torch.distributions.StudentT(3).sample((3, 2000)) + 0.3
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    with qk.use_kernel(kernel):
        scale, zero_point = qk.choose_qparams(
            low, high, quant_min=-7, quant_max=7, symmetric=symmetric, method="mse", x=x
        )
    for row in range(3):
        tried = []
        for fraction in ops.fractions_of(low[row]).flatten():
            ends = low[row] * fraction, high[row] * fraction
            s, z = qk.choose_qparams(*ends, quant_min=-7, quant_max=7, symmetric=symmetric)
            tried.append(brute_force(x[row], s.item(), int(z), -7, 7))
        got = brute_force(x[row], scale[row].item(), int(zero_point[row]), -7, 7)
        assert got <= min(tried) * (1 + 1e-5)
        assert got < 0.5 * tried[0]  # heavy tails: far better than minmax


@pytest.mark.parametrize("percentile", [60, 99, 99.9, 100])
@pytest.mark.parametrize("shape", [(1,), (4, 1), (4, 5), (1, 50)])
def test_percentile_against_numpy(percentile: float, shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 50) ** 3 - 0.5
    blocks = reference.blocks_of(x, torch.Size(shape)).numpy()
    low = torch.from_numpy(blocks.min(1)).reshape(shape)
    high = torch.from_numpy(blocks.max(1)).reshape(shape)
    qmin, qmax = -8, 7
    options = {"quant_min": qmin, "quant_max": qmax, "method": "percentile", "x": x, "percentile": percentile}
    scale, _ = qk.choose_qparams(low, high, symmetric=True, **options)
    bound = np.quantile(np.abs(blocks), percentile / 100, axis=1, method="inverted_cdf").reshape(shape)
    torch.testing.assert_close(scale, torch.from_numpy(bound) / 7, rtol=1e-6, atol=0)
    scale, zero_point = qk.choose_qparams(low, high, symmetric=False, **options)
    top = torch.from_numpy(np.quantile(blocks, percentile / 100, axis=1, method="inverted_cdf")).reshape(shape)
    bottom = torch.from_numpy(-np.quantile(-blocks, percentile / 100, axis=1, method="inverted_cdf")).reshape(shape)
    expected = qk.choose_qparams(bottom, top, quant_min=qmin, quant_max=qmax, symmetric=False)
    torch.testing.assert_close((scale, zero_point), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1,), (1, 5)])
def test_growing_histogram_equals_one_of_everything(shape: tuple[int, ...]) -> None:
    """Values on a grid that fp32 holds beside the largest limit: merged counts are exactly those of the last range."""
    batches = [(torch.randn(300, 5) * spread * 64).round() / 64 for spread in (1, 0.1, 40, 3, 0)]
    grown = RangeHistogram(shape)
    for batch in batches:
        grown.update(batch, float(batch.abs().max()))
    everything = torch.cat(batches)
    once = RangeHistogram(shape)
    once.update(everything, float(everything.abs().max()))
    assert grown.exponent == once.exponent
    assert torch.equal(grown.counts, once.counts)
    assert int(grown.counts.sum()) == everything.numel()


def test_growing_histogram_keeps_every_count_at_extreme_ranges() -> None:
    grown = RangeHistogram((1,))
    for value in (0.0, 1e-42, 1.0, -1e30, 3.4e38):
        grown.update(torch.tensor([value, -value, 0.0]), abs(value))
    assert int(grown.counts.sum()) == 15
    assert int(grown.counts[0, BINS // 2 - 1 : BINS // 2 + 1].sum()) == 13  # all but ±3.4e38


@pytest.mark.parametrize("symmetric", [True, False])
def test_histogram_ranges_are_those_of_the_values(symmetric: bool) -> None:
    x = torch.distributions.StudentT(4).sample((40_000,)) + 0.5
    seen = RangeHistogram((1,))
    for part in x.split(7000):
        seen.update(part, float(part.abs().max()))
    low, high = x.amin().reshape(1), x.amax().reshape(1)
    width = 2 * float(x.abs().max()) * 2 / BINS
    for percentile in (99.0, 99.99, 100.0):
        got = seen.percentile_range(low, high, percentile, symmetric)
        for a, b in zip(got, ops.percentile_range(x, low, high, percentile, symmetric), strict=True):
            assert abs(a - b) <= width
    for bits in (2, 4, 8):
        qmin, qmax = qk.ops.dynamic.range_of_bits(bits)
        errors = []
        for ends in (
            seen.mse_range(low, high, qmin, qmax, symmetric, 0.0),
            ops.mse_range(x, low, high, qmin, qmax, symmetric, 0.0),
        ):
            s, z = qk.choose_qparams(*ends, quant_min=qmin, quant_max=qmax, symmetric=symmetric)
            errors.append(brute_force(x, s.item(), int(z), qmin, qmax))
        assert errors[0] <= 1.02 * errors[1]


class HeavyTails(nn.Module):
    """Weights and inputs of Student's t with 3 degrees of freedom."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48), nn.Linear(48, 8)
        tails = torch.distributions.StudentT(3)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.copy_(tails.sample(layer.weight.shape) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
def test_calibrating_4_bits_on_heavy_tails(quantizer: str) -> None:
    """Error of the model's output, relative to its power: "mse" halves that of "minmax", "percentile" is below it."""
    spec = qk.QSpec(4, quantizer=quantizer)
    model, x = HeavyTails(), torch.distributions.StudentT(3).sample((2000, 64))
    prepared = qk.prepare(model, qk.QConfig(spec, qk.QSpec(4, quantizer=quantizer, symmetric=False)))
    noise = {}
    for method in ("minmax", "percentile", "mse"):
        qk.calibrate(prepared, x.split(500), method=method, percentile=99.5)
        with torch.no_grad():
            y = model(x)
            noise[method] = float((prepared.eval()(x) - y).square().mean() / y.square().mean())
    if quantizer == "minmax":
        assert noise["mse"] < 0.5 * noise["minmax"], noise
        assert noise["percentile"] < 0.8 * noise["minmax"], noise
    else:  # LSQ's formula knows about tails as well
        assert noise["mse"] < noise["minmax"], noise


def test_calibrate_by_hand() -> None:
    """A weight by its own values, an input by all batches; a generator of batches is read once."""
    layer = nn.Linear(100, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 201).view(2, 100))
    spec = qk.QSpec(8, quantizer="minmax")
    prepared = qk.prepare(layer, qk.QConfig(spec, spec))
    batches = [torch.arange(1.0, 101.0).view(1, 100), torch.arange(101.0, 201.0).view(1, 100)]
    qk.calibrate(prepared, iter(batches), method="percentile", percentile=90)
    torch.testing.assert_close(prepared.weight_fake_quant.scale, torch.tensor([[90.0], [190.0]]) / 127)
    assert prepared.input_fake_quant.scale.item() * 127 == pytest.approx(180, abs=513 / BINS)
    qk.calibrate(prepared, iter(batches), method="percentile", percentile=100)
    assert prepared.input_fake_quant.scale.item() * 127 == pytest.approx(200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_calibrate_in_every_dtype_and_granularity(dtype: torch.dtype, method: str) -> None:
    for granularity in (qk.PerTensor(), qk.PerChannel(), qk.PerGroup(16)):
        config = qk.QConfig(qk.QSpec(4, granularity, False), qk.QSpec(8, symmetric=False))
        prepared = qk.prepare(nn.Linear(32, 6).to(dtype), config)
        qk.calibrate(prepared, [torch.randn(5, 32).to(dtype), torch.zeros(2, 32).to(dtype)], method=method)
        for quantizer in (prepared.weight_fake_quant, prepared.input_fake_quant):
            assert isinstance(quantizer, FakeQuantize)
            assert (quantizer.scale > 0).all()
        assert prepared(torch.randn(3, 32).to(dtype)).isfinite().all()


def test_opcheck() -> None:
    scale = torch.rand(3, 4, 1) + 0.1
    for x in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2], torch.empty(4, 0)):
        for ends in (torch.rand(1), torch.rand(4, 1)):
            torch.library.opcheck(torch.ops.qkernels.histogram.default, (x, -ends, ends, 16))
        for zero_point in (None, torch.zeros_like(scale)):
            torch.library.opcheck(torch.ops.qkernels.quantization_errors.default, (x, scale, zero_point, -8, 7))


def test_compile_fullgraph() -> None:
    def choose(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        counts, _ = qk.histogram(x, low, high, bins=8)
        return qk.choose_qparams(low, high, quant_min=-8, quant_max=7, method="mse", x=x)[0] * counts.sum(-1)

    torch._dynamo.reset()
    x = torch.randn(4, 100, requires_grad=True)
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), choose(x))


X = torch.randn(4, 6)
ONE = torch.ones(1)
BAD = {
    "x": (lambda: qk.histogram(X.int(), ONE, ONE, bins=3), "x: got torch.int32"),
    "bins": (lambda: qk.histogram(X, ONE, ONE, bins=0), "bins: got 0; accepted: 1 to 1048576"),
    "many bins": (lambda: qk.histogram(X, ONE, ONE, bins=2**20 + 1), "bins: got 1048577"),
    "low": (lambda: qk.histogram(X, torch.ones(4), torch.ones(4), bins=3), r"low: got shape \[4\]"),
    "high": (lambda: qk.histogram(X, ONE, torch.ones(4, 1), bins=3), r"high: got shape \[4, 1\]; accepted: low's"),
    "low dtype": (lambda: qk.histogram(X, ONE.int(), ONE, bins=3), "low: got torch.int32"),
    "candidates": (
        lambda: qk.quantization_errors(X, torch.tensor(1.0), quant_min=0, quant_max=1), "scale: got 0 dims"
    ),
    "granularity": (
        lambda: qk.quantization_errors(X, torch.ones(3, 4), quant_min=0, quant_max=1), r"scale\[0\]: got shape \[4\]"
    ),
    "zero_point": (
        lambda: qk.quantization_errors(X, torch.ones(3, 1), torch.ones(1), quant_min=0, quant_max=1),
        r"zero_point: got shape \[1\]; accepted: scale's shape \[3, 1\]",
    ),
    "range": (lambda: qk.quantization_errors(X, torch.ones(3, 1), quant_min=2, quant_max=1), "quant_min"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        call()


def test_bad_methods() -> None:
    ends = {"quant_min": -8, "quant_max": 7}
    with pytest.raises(ValueError, match="method: got 'entropy'; accepted: minmax, percentile, mse"):
        qk.choose_qparams(-ONE, ONE, **ends, method="entropy")
    with pytest.raises(ValueError, match='x: got None with method="mse"'):
        qk.choose_qparams(-ONE, ONE, **ends, method="mse")
    with pytest.raises(ValueError, match="percentile: got 50; accepted: above 50"):
        qk.choose_qparams(-ONE, ONE, **ends, method="percentile", x=X, percentile=50)
    with pytest.raises(ValueError, match="percentile: got 101"):
        qk.calibrate(qk.prepare(nn.Linear(6, 2)), [X], percentile=101)
