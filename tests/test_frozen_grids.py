"""What freeze_observers and freeze_scales hold, calibrate leaves; what measures or moves factors does not mind it."""

from __future__ import annotations

import pytest
import torch
from qat_models import config, quantizers
from torch import nn

import qkernels as qk


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
@pytest.mark.parametrize("freeze", [qk.freeze_observers, qk.freeze_scales])
def test_a_frozen_grid_stays(quantizer, freeze) -> None:
    torch.manual_seed(0)
    model = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config(8, quantizer))
    x = torch.randn(32, 8)
    qk.calibrate(model, [x], method="percentile")  # which leaves no learned range to training
    names = freeze(model, where="0.*")
    assert names == ["0.weight_fake_quant", "0.input_fake_quant"]
    loaded = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config(8, quantizer))
    loaded.load_state_dict(model.state_dict())
    for each in (model, loaded):
        with torch.no_grad():
            each[0].weight.mul_(3)
        before = {name: q.scale.clone() for name, q in quantizers(each).items()}
        qk.calibrate(each, [5 * x])
        for name, q in quantizers(each).items():
            assert torch.equal(q.scale, before[name]) == (name in names or name == "1.weight_fake_quant"), name
        freeze(each)
        with pytest.raises(ValueError, match=r"^model: got one whose quantizers are all frozen \(0.weight_fake_quant"):
            qk.calibrate(each, [x])
        freeze(each, False)
        qk.calibrate(each, [x])
        assert not torch.equal(each[0].weight_fake_quant.scale, before["0.weight_fake_quant"])


def test_what_is_frozen_before_it_has_a_scale_gets_one_and_is_frozen_then() -> None:
    torch.manual_seed(0)
    model, x = qk.prepare(nn.Linear(8, 4), config(8, "minmax")), torch.randn(32, 8)
    qk.freeze_observers(model)
    qk.calibrate(model, [x])
    scale = model.input_fake_quant.scale.clone()
    assert float(scale) == pytest.approx(float(x.max() - x.min()) / 255)
    with pytest.raises(ValueError, match="are all frozen"):
        qk.calibrate(model, [3 * x])
    model(3 * x)
    assert torch.equal(model.input_fake_quant.scale, scale)
    found = qk.sensitivity(model, [3 * x], bits=(8, 2))  # measures with ranges of its own
    expected = qk.prepare(nn.Linear(8, 4), config(8, "minmax"))
    expected.load_state_dict(model.state_dict())
    qk.freeze_observers(expected, False)
    assert found.to_json() == qk.sensitivity(expected, [3 * x], bits=(8, 2)).to_json()
    assert model.input_fake_quant.frozen


def test_factors_of_channels_do_not_move_into_a_frozen_grid() -> None:
    model = qk.prepare(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), config(8))
    qk.calibrate(model, [torch.randn(32, 8)])
    qk.freeze_scales(model, where="*input_fake_quant")
    with pytest.raises(ValueError, match=r"^model: got one whose quantizers 1.input_fake_quant are frozen"):
        qk.smoothquant(model, [torch.randn(32, 8)])
    qk.freeze_scales(model, False)
    qk.smoothquant(model, [torch.randn(32, 8)])
