"""observe_fake_quantize: statistics, scales and values after every batch, against the reference and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FLOATS, channels_last
from compare import same
from conftest import kernels_of
from torch import Tensor

import qkernels as qk
from qkernels.ops import observe_fake_quantize as observe_ops

pytestmark = pytest.mark.sanitized


@pytest.mark.parametrize("kernel", kernels_of("observe_fake_quantize"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 5, 1, 1)])
@pytest.mark.parametrize("steps", [0.0, 127.0, 127.5])
def test_kernels_equal_the_reference_at_every_batch(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...], steps: float
) -> None:
    batches = [torch.randn(3, 5, 8, 7), channels_last(torch.randn(2, 5, 8, 7)), torch.randn(2, 5, 8, 7) + 9]
    batches += [batches[0] * math.nan, torch.empty(0, 5, 8, 7), torch.full((2, 5, 1, 1), math.inf)]
    flags = [(1, 1), (1, 1), (0, 1), (1, 1), (1, 1), (1, 0)]

    def run() -> list[list[Tensor]]:
        stats = [torch.full(shape, math.inf), torch.full(shape, -math.inf), torch.ones(shape)]
        stats.append(torch.zeros(shape, dtype=torch.int64))
        results = []
        for batch, (observe, fake) in zip(batches, flags, strict=True):
            out = observe_ops._observe(
                batch.to(dtype), torch.tensor([observe]), torch.tensor([fake], dtype=torch.uint8), *stats, 0.1, -128,
                127, steps, 1,
            )  # fmt: skip
            results.append([*out, *(s.clone() for s in stats)])
        return results

    with qk.use_kernel("reference"):
        expected = run()
    with qk.use_kernel(kernel):
        got = run()
    for step_got, step_expected in zip(got, expected, strict=True):
        for a, b in zip(step_got, step_expected, strict=True):
            same(a, b)
    # By hand: the statistics after two batches, kept through the batches that must not count.
    over = (0, 2, 3) if len(shape) > 1 else (0, 1, 2, 3)
    low = [batch.to(dtype).float().amin(over) for batch in batches[:2]]
    torch.testing.assert_close(got[0][2].flatten(), low[0].flatten(), rtol=0, atol=0)
    average = low[0] + torch.tensor(0.1) * (low[1] - low[0])
    torch.testing.assert_close(got[-1][2].flatten(), average.flatten(), rtol=1e-6, atol=0)


def test_choosing_a_range_covers_its_ends() -> None:
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([2.0, 4.0, -1.0, 0.0])
    for quant_min, quant_max in ((-128, 127), (0, 255), (-8, 7), (-127, 127)):
        for symmetric in (True, False):
            scale, zero_point = qk.choose_qparams(
                low, high, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric
            )
            for value in (low, high, torch.zeros(4)):
                q = (value / scale).round() + zero_point
                assert (q >= quant_min - 1).all()
                assert (q <= quant_max + 1).all()
                if symmetric:
                    assert (q >= quant_min).all()
                    assert (q <= quant_max).all()
