"""Calibration statistics: histograms, the MSE search, and calibrating with torch.ao's HistogramObserver as the peer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from operands import Compare
from torch import Tensor

import qkernels as qk
from qkernels.ops import statistics as ops
from qkernels.qat.histogram import RangeHistogram

DATA = {"normal": torch.randn, "relu": lambda n: torch.randn(n).relu()}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_histogram(compare: Compare, data: str, dtype: torch.dtype) -> None:
    """2048 bins of a million values. torch.histc takes no bf16 on the CPU: it is given the fp32 values."""
    x = DATA[data](1 << 20).to(dtype)
    low, high = torch.tensor([-4.0]), torch.tensor([4.0])
    wide = x.float()
    compare(
        lambda: qk.histogram(x, low, high, bins=2048)[0],
        {"torch.histc": lambda: torch.histc(wide, 2048, -4, 4)[None]},
        qk.reference.statistics.histogram(x, low, high, 2048)[0],
    )


def eager_errors(x: Tensor, scale: Tensor) -> Tensor:
    """One candidate after the other, with torch's own fake quantization."""
    zeros = torch.zeros(x.shape[0], dtype=torch.int32)
    errors = []
    for s in scale:
        y = torch.fake_quantize_per_channel_affine(x, s.reshape(-1), zeros, 0, -7, 7)
        errors.append((y - x).square().sum(1, keepdim=True))
    return torch.stack(errors)


def test_mse_search(compare: Compare) -> None:
    """64 candidates for each of 256 channels of 1024 weights, to 4 bits."""
    x = torch.distributions.StudentT(4).sample((256, 1024))
    high = x.abs().amax(1, keepdim=True)
    scale = high / 7 * ops.fractions_of(high)
    exact = qk.reference.statistics.quantization_errors(x.double(), scale.double(), None, -7, 7)
    compare(
        lambda: qk.quantization_errors(x, scale, quant_min=-7, quant_max=7),
        {"eager loop": lambda: eager_errors(x, scale)},
        exact,
        blocks=3,
    )


def observer() -> Any:
    from torch.ao.quantization.observer import HistogramObserver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's deprecation notes
        return HistogramObserver(bins=2048, quant_min=-8, quant_max=7, dtype=torch.qint8)


def test_calibration(compare: Compare, report: Callable[..., None]) -> None:
    """10 batches of 64K heavy-tailed values, each wider than the last, then a 4-bit range of least squared error."""
    batches = [torch.distributions.StudentT(4).sample((1 << 16,)) * (1 + 0.1 * at) for at in range(10)]
    everything = torch.cat(batches)
    ends = [everything.amin().reshape(1), everything.amax().reshape(1)]
    options: dict[str, Any] = {"quant_min": -8, "quant_max": 7, "symmetric": False}

    def ours() -> tuple[Tensor, Tensor]:
        seen, low, high = RangeHistogram((1,)), torch.zeros(1), torch.zeros(1)
        for batch in batches:
            least, most = batch.aminmax()
            low, high = torch.minimum(low, least), torch.maximum(high, most)
            seen.update(batch, float(torch.maximum(-least, most)))
        return qk.choose_qparams(*seen.mse_range(low, high, -8, 7, False, 0.0), **options)

    def theirs() -> tuple[Tensor, Tensor]:
        histogram_observer = observer()
        for batch in batches:
            histogram_observer(batch)
        return histogram_observer.calculate_qparams()

    def error(scale: Tensor, zero_point: Tensor) -> float:
        y = qk.fake_quantize(everything, scale.float(), zero_point.int(), quant_min=-8, quant_max=7)
        return float((y - everything).square().mean())

    compare(
        lambda: ours()[0],
        {"HistogramObserver": peers.find("HistogramObserver", lambda: lambda: theirs()[0])},
        ours()[0],
        peer_tolerance=10,  # it chooses another scale: the errors are below
    )
    report(
        "calibration: mean squared error at 4 bits",
        minmax=error(*qk.choose_qparams(*ends, **options)),
        mse=error(*ours()),
        HistogramObserver=error(*theirs()),
    )
