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


def test_thawing_gives_back_whether_a_quantizer_observed() -> None:
    """In the model, in one that resumes from its state, and where the freeze came before the first scale."""
    torch.manual_seed(0)
    model, x = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config(8, "lsq")), torch.randn(32, 8)
    qk.calibrate(model, [x], method="mse")  # which leaves no range to training
    observed = {name: q.observes for name, q in quantizers(model).items()}
    assert not all(observed.values())
    qk.freeze_scales(model)
    loaded = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config(8, "lsq"))
    loaded.load_state_dict(model.state_dict())
    first = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config(8, "lsq"))
    qk.freeze_observers(first)
    qk.calibrate(first, [x], method="mse")
    for each in (model, loaded, first):
        qk.freeze_scales(each, False)
        for name, q in quantizers(each).items():  # weights have scales from the start, which the freeze has kept
            assert q.observes == observed[name] or (each is first and name.endswith("weight_fake_quant")), name
    alone = qk.nn.FakeQuantize(bits=8, shape=(8, 8), granularity=qk.PerChannel(0))
    alone.freeze()
    alone(torch.randn(8, 8))
    assert alone.frozen
    alone.freeze(False)
    assert alone.observes


def test_a_state_without_the_key_leaves_frozen_inputs() -> None:
    float_model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model, x = qk.prepare(float_model, config(8)), torch.randn(32, 8)
    qk.calibrate(model, [x])
    qk.freeze_scales(model)
    scale = model[0].input_fake_quant.scale.clone()
    model.load_state_dict(float_model.state_dict(), strict=False)
    assert model[0].input_fake_quant.frozen
    qk.calibrate(model, [7 * x])
    assert torch.equal(model[0].input_fake_quant.scale, scale)


def test_widths_on_the_meta_device() -> None:
    model = qk.prepare(nn.Linear(8, 4), config(8))
    qk.calibrate(model, [torch.randn(32, 8)])
    model.to("meta")
    qk.set_bits(model, 4)
    assert model.weight_fake_quant.bits == 4
