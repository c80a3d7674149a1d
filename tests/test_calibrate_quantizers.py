"""calibrate sets each quantizer by name as the uniform one that it resembles, or as it would start by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.qat.calibrate import METHODS

OTHER_LEVELS = ("nf4", "apot", "po2", "midrise")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantizer", ["lsq+", "pact", "ewgs", "stochastic", *OTHER_LEVELS])
def test_inputs(quantizer: str, method: str) -> None:
    """The range of "lsq" (if it is learned) or "minmax"; where levels are no integers, the extremes."""
    x = torch.distributions.StudentT(4).sample((500, 6))
    learns = quantizer in ("lsq+", "pact", "ewgs")
    like = qk.QSpec(4, quantizer="lsq" if learns else "minmax", symmetric=quantizer not in ("lsq+", "pact"))
    got, expected = (
        qk.prepare(nn.Linear(6, 2), qk.QConfig(None, spec)).eval() for spec in (qk.QSpec(4, quantizer=quantizer), like)
    )
    qk.calibrate(got, x.split(200), method=method, percentile=99)
    if quantizer in OTHER_LEVELS:
        scale, largest = got.input_fake_quant.scale.item(), x.abs().max().item()
        if method in ("percentile", "moving_average"):
            assert 0 < scale <= largest
        else:
            assert scale == pytest.approx(largest)
        return
    given = x.relu() if quantizer == "pact" else x  # whose range begins at zero
    qk.calibrate(expected, given.split(200), method=method, percentile=99)
    for one, other in zip(got.input_fake_quant.qparams(), expected.input_fake_quant.qparams(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantizer", ["kmeans", "nf4", "dorefa"])
def test_weights_of_other_levels_start_anew(quantizer: str, method: str) -> None:
    """From the weight that the model was given after ``prepare``."""
    config = qk.QConfig(qk.QSpec(4 if quantizer == "nf4" else 3, quantizer=quantizer), None)
    layer, later = nn.Linear(64, 4), torch.randn(4, 64) ** 3
    prepared, expected = qk.prepare(layer, config), qk.prepare(layer, config)
    with torch.no_grad():
        prepared.weight.copy_(later)
        expected.weight.copy_(later)
    expected.weight_fake_quant.start(expected.weight)
    qk.calibrate(prepared, [torch.randn(3, 64)], method=method, percentile=100)
    x = torch.randn(5, 64)
    torch.testing.assert_close(prepared.eval()(x), expected.eval()(x))
