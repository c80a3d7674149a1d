"""Quantizers in a training loop: learned scales under every optimizer, starts, switches, widths, states."""

import copy
import math
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import FakeQuantize, PerChannel, PerGroup, PerTensor, QATConv2d, QATLinear

OPTIMIZERS = {
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
    "RMSprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "SGD with momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


def sqnr(x, y):
    return 10 * math.log10(float(x.double().square().sum() / (x - y).double().square().sum()))


def config(bits, quantizer="lsq"):
    return qk.QConfig(qk.QSpec(bits, quantizer=quantizer), qk.QSpec(bits, symmetric=False, quantizer=quantizer))


def quantizers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("lr", [1e-4, 1e-3, 3e-3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_moves_the_prepared_model_as_the_float_one(optimizer, lr, bits):
    torch.manual_seed(0)
    model = nn.Linear(256, 256)
    x = torch.randn(64, 256)
    target = model(x).detach() + 0.1 * torch.randn(64, 256)
    prepared = qk.prepare(model, config(bits))
    qk.calibrate(prepared, [x])
    scale = prepared.weight_fake_quant.scale.clone()
    moved = []
    for trained in (model, prepared):
        weight, before = trained.weight.detach().clone(), trained(x).detach()
        F.mse_loss(trained(x), target).backward()
        OPTIMIZERS[optimizer](trained.parameters(), lr).step()
        moved.append((trained(x) - before).detach().abs().mean())
    # A weight that crosses the middle of a step moves by all of it, which one in step/|change| does.
    crossings = math.sqrt(256 * float((trained.weight - weight).abs().mean() * scale.mean()))
    assert moved[1] < 1.3 * math.hypot(moved[0], crossings)
    if bits == 8:
        assert sqnr(prepared.weight, prepared.weight_fake_quant(prepared.weight)) > 36
    else:
        grown = prepared.weight.detach().abs().mean(1, keepdim=True) / weight.abs().mean(1, keepdim=True)
        ratio = prepared.weight_fake_quant.scale / scale / grown
        assert ratio.min() > 0.9
        assert ratio.max() < 1.1


def test_sgd_moves_a_scale_as_lsq_does_from_its_own_start_but_slower():
    torch.manual_seed(0)
    w, dy = torch.randn(1, 512), torch.randn(1, 512)
    quantizer = FakeQuantize(bits=8)
    quantizer.set_range(w.amin().reshape(1), w.amax().reshape(1))
    start = quantizer.scale.clone()
    scale = start.clone().requires_grad_()
    y = qk.fake_quantize(
        w, scale, quant_min=-127, quant_max=127, grad_factor=(512 * 127) ** -0.5, straight_through="lsq"
    )
    y.backward(dy)
    quantizer(w).backward(dy)
    torch.optim.SGD(quantizer.parameters(), lr=0.01).step()
    # LSQ's own start is sqrt(127)/2 times a min-max scale of Gaussian values; the motion is sqrt(127) times slower.
    expected = -0.01 * scale.grad / (start * 127 / 2)
    assert (quantizer.scale / start - 1).item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_minmax_is_minmax_at_every_width(bits):
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    x[:, 0] *= 60
    layer = nn.Linear(64, 8)
    for quantizer in ("lsq", "minmax"):
        prepared = qk.prepare(layer, config(bits, quantizer))
        qk.calibrate(prepared, [x[:100], x[100:]], method="minmax")
        steps = 2**bits - 1
        scale = (x.max() - x.min()) / steps
        torch.testing.assert_close(prepared.input_fake_quant.scale, scale.reshape(1))
        zero_point = -(2 ** (bits - 1)) - (x.min() / scale).round()
        assert prepared.input_fake_quant.zero_point.item() == zero_point
        expected = layer.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(prepared.weight_fake_quant.scale, expected.detach())
    if bits == 8:
        assert sqnr(x, prepared.input_fake_quant(x)) > 23


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_learned_scale_of_few_bits_starts_from_the_smallest_error(bits, symmetric):
    torch.manual_seed(0)
    w = torch.randn(16, 256)
    x = F.relu(torch.randn(512, 256)) if not symmetric else torch.randn(512, 256)
    model = nn.Linear(256, 16)
    model.weight.data.copy_(w)
    prepared = qk.prepare(model, qk.QConfig(qk.QSpec(bits), qk.QSpec(bits, symmetric=symmetric)))
    qk.calibrate(prepared, [x])
    started = {}
    for method in ("auto", "minmax", "lsq"):
        qk.calibrate(prepared, [x], method=method)
        with torch.no_grad():
            weight = sqnr(w, prepared.weight_fake_quant(w))
            started[method] = weight, sqnr(x, prepared.input_fake_quant(x))
    for other in ("minmax", "lsq"):
        assert started["auto"][0] > started[other][0] - 0.01
        assert started["auto"][1] > started[other][1] - 0.01
    mean = w.abs().mean(1, keepdim=True)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    steps = 2 ** (bits - 1) - 1
    expected = torch.minimum(2 * mean / math.sqrt(steps), torch.maximum(-low, high) / steps)
    torch.testing.assert_close(prepared.weight_fake_quant.scale, expected)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
def test_8_bit_weights_stay_8_bit_weights(quantizer):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    x = torch.randn(512, 32)
    target = (x[:, :5] + x[:, 5:10] * x[:, 10:15]).argmax(1)
    for optimizer, lr in (("SGD with momentum", 0.03), ("Adam", 3e-3), ("RMSprop", 1e-3)):
        prepared = qk.prepare(model, config(8, quantizer))
        qk.calibrate(prepared, [x])
        step = OPTIMIZERS[optimizer](prepared.parameters(), lr)
        for _ in range(150):
            step.zero_grad()
            loss = F.cross_entropy(prepared(x), target)
            loss.backward()
            step.step()
        assert loss < 0.6, (optimizer, loss)
        prepared(x)  # a "minmax" weight is measured in a forward pass
        for layer in (prepared[0], prepared[3], prepared[5]):
            assert sqnr(layer.weight, layer.weight_fake_quant(layer.weight)) > 36, optimizer


def test_weight_decay_spares_the_quantizers():
    torch.manual_seed(0)
    prepared = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), config(4))
    x = torch.randn(16, 8)
    qk.calibrate(prepared, [x])
    own, learned = qk.parameter_groups(prepared, lr=0.1, weight_decay=0.5)
    assert (own["lr"], own["weight_decay"], learned["lr"], learned["weight_decay"]) == (0.1, 0.5, 0.1, 0.0)
    assert len(own["params"]) == 4
    assert len(learned["params"]) == 6  # a scale for each weight, a scale and a zero point for each input
    scales = {name: quantizer.scale.clone() for name, quantizer in quantizers(prepared).items()}
    optimizer = torch.optim.SGD([own, learned])
    for parameter in prepared.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = prepared[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(prepared[0].weight, 0.95 * weight)
    for name, quantizer in quantizers(prepared).items():
        assert torch.equal(quantizer.scale, scales[name])
    prepared[0].weight.requires_grad_(False)
    assert len(qk.parameter_groups(prepared, lr=0.1)[0]["params"]) == 3


def conv_net(depth=6):
    layers = []
    for index in range(depth):
        layers += [nn.Conv2d(3 if index == 0 else 16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_from_scratch_nothing_is_clipped_and_everything_trains(calibrated, quantizer, seed):
    torch.manual_seed(seed)
    model = conv_net()
    state = copy.deepcopy(model.state_dict())
    x, target = torch.randn(16, 3, 12, 12), torch.arange(16) % 4
    prepared = qk.prepare(model, config(8, quantizer))
    if calibrated:
        qk.calibrate(prepared, [x])
    for name, value in prepared.state_dict().items():
        if name in state:
            assert torch.equal(value, state[name]), name  # no BatchNorm moved
    assert all(module.training for module in prepared.modules())
    assert all(module.momentum == 0.1 for module in prepared.modules() if isinstance(module, nn.BatchNorm2d))
    seen = {}
    for name, layer in prepared.named_modules():
        if isinstance(layer, QATConv2d):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    F.cross_entropy(prepared(x), target).backward()
    for name, values in seen.items():
        layer = prepared.get_submodule(name)
        scale, zero_point = layer.input_fake_quant.qparams()
        code = (values / scale).round() + (0 if zero_point is None else zero_point)
        assert (
            (code < layer.input_fake_quant.quant_min) | (code > layer.input_fake_quant.quant_max)
        ).float().mean() < 1e-3
        assert layer.weight.grad.any(), name


def test_loaded_batch_norm_statistics_count_even_where_no_batch_is_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].running_var.fill_(100.0)  # a file of another framework counts no batches
    x = torch.randn(64, 4)
    prepared = qk.prepare(model)
    qk.calibrate(prepared, [x])
    span = (model.eval()(x), model[0](x))[1]
    torch.testing.assert_close(prepared[1].input_fake_quant.scale.item(), float(span.max() - span.min()) / 255)
    frozen = qk.prepare(nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)))
    qk.calibrate(frozen, [5 * x])
    torch.testing.assert_close(
        frozen[1].input_fake_quant.scale.item(), float(5 * (x.max() - x.min())) / 255, rtol=1e-3, atol=0
    )


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        x = self.body(x)
        return self.head(x) + self.auxiliary(x) if self.training else self.head(x)


def test_layers_that_calibration_does_not_reach_start_in_training():
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    prepared = qk.prepare(Auxiliary())
    with pytest.warns(UserWarning, match=r"no batch reached auxiliary\.weight_fake_quant, auxiliary\.input_fake_quant"):
        qk.calibrate(prepared, [x])
    penalty = sum(p.square().sum() for p in prepared.parameters())
    assert penalty.isfinite()
    prepared(x).sum().backward()
    assert prepared.auxiliary.weight.grad.any()
    hidden = prepared.body(x)
    scale = (hidden.max() - hidden.min()) / 255
    torch.testing.assert_close(prepared.auxiliary.input_fake_quant.scale, scale.detach().reshape(1))
    qk.convert(prepared.eval())
    fresh = qk.prepare(Auxiliary()).eval()
    with pytest.raises(RuntimeError, match=r"^body\.input_fake_quant: .* has no scale yet"):
        fresh(x)
    fresh.train()
    with pytest.raises(RuntimeError, match=r"^body\.input_fake_quant: got a tensor that holds NaN"):
        fresh(torch.full((2, 4), torch.nan))
    assert fresh(torch.empty(0, 4)).shape == (0, 2)  # nothing to start from, nothing to quantize
    fresh(x)
    assert fresh.eval()(x).isfinite().all()


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "dynamic"])
@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor(), PerGroup(16)])
def test_a_weight_of_zeros_trains(quantizer, granularity):
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    target = x @ torch.randn(32, 8) * 0.3
    model = nn.Linear(32, 8)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    weight = qk.QSpec(8, granularity, quantizer=quantizer)
    if granularity == PerGroup(16):
        weight = qk.QSpec(4, granularity, quantizer=quantizer)
    prepared = qk.prepare(model, qk.QConfig(weight, None))
    optimizer = torch.optim.Adam(prepared.parameters(), lr=0.02)
    first = F.mse_loss(prepared(x), target)
    assert torch.equal(prepared(x), torch.zeros(256, 8))
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(prepared(x), target)
        loss.backward()
        optimizer.step()
    assert loss < first * (2e-3 if weight.bits == 8 else 0.05)


def test_moving_averages_of_a_weight_start_after_its_zeros():
    """Else the range of 300 steps later were 95 % of the weight's, and what lies outside would have no gradient."""
    weight = nn.Parameter(torch.zeros(2, 8))
    quantizer = FakeQuantize(quantizer="ema", granularity=PerChannel(), shape=(2, 8))
    assert torch.equal(quantizer(weight), torch.zeros(2, 8))
    with torch.no_grad():
        weight[0] = torch.linspace(-1, 1, 8)
    y = quantizer(weight)
    torch.testing.assert_close(y, weight, rtol=0, atol=1 / 127)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 8))


@pytest.mark.parametrize("bits", [4, 2])
def test_few_bits_keep_pace_with_a_network_trained_from_scratch(bits):
    """Without BatchNorm weights and activations grow by far more than a learned scale moves meanwhile."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    target = 30 * torch.tanh(x @ torch.randn(16, 4) / 4)

    def layers():
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    model = layers()
    prepared = qk.prepare(copy.deepcopy(model), config(bits))
    qk.calibrate(prepared, [x])
    losses = []
    for trained in (model, prepared):
        optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(trained(x), target)
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
    variance = float(target.var())
    assert losses[0] < 0.05 * variance
    assert losses[1] < (0.05 if bits == 4 else 0.25) * variance
    state = copy.deepcopy(prepared.state_dict())
    resumed = qk.prepare(layers(), config(bits))
    resumed.load_state_dict(state)
    assert torch.equal(resumed(x), prepared(x))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in prepared.state_dict().items())


def test_an_input_of_few_bits_that_was_zeros_starts_by_what_comes():
    """As behind a residual branch that starts at zero: at once, not a tenth of the way at each step."""
    torch.manual_seed(0)
    quantizer, x = FakeQuantize(bits=4), torch.randn(64, 32)
    quantizer(torch.zeros(64, 32))
    quantizer(x)
    torch.testing.assert_close(quantizer.scale, 2 * x.abs().mean().reshape(1) / math.sqrt(7))


def test_a_weight_of_few_bits_changed_in_place_keeps_its_share():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    quantizer = FakeQuantize(bits=4, granularity=PerChannel(), shape=(8, 64))
    before = quantizer(weight).detach()
    for mode in (False, True):
        quantizer.train(mode)
        torch.testing.assert_close(quantizer(100 * weight), 100 * before, rtol=1e-5, atol=0)
    quantizer(weight)
    held = quantizer.scale
    quantizer.scale = held
    torch.testing.assert_close(quantizer(100 * weight).abs().amax(1), held.flatten() * 7)
    quantizer.forget()
    quantizer(weight)
    quantizer.disable_observer()
    torch.testing.assert_close(quantizer(100 * weight).abs().amax(1), held.flatten() * 7)


def test_a_dead_channel_among_live_ones_trains():
    torch.manual_seed(0)
    model = nn.Linear(16, 4)
    with torch.no_grad():
        model.weight[2] = 0
    prepared = qk.prepare(model)
    scale = prepared.weight_fake_quant.scale
    torch.testing.assert_close(scale[2], scale[[0, 1, 3]].mean(0))
    assert torch.equal(prepared.weight_fake_quant(model.weight)[2], torch.zeros(16))
    tiny = nn.Linear(16, 4)
    with torch.no_grad():
        tiny.weight.mul_(1e-12)
    prepared = qk.prepare(tiny)
    assert sqnr(tiny.weight, prepared.weight_fake_quant(tiny.weight)) > 40


def test_a_minmax_weight_is_followed_until_told_otherwise():
    torch.manual_seed(0)
    prepared = qk.prepare(nn.Linear(16, 4), config(8, "minmax"))
    x = torch.randn(8, 16)
    qk.calibrate(prepared, [x])
    weight, scale = prepared.weight, prepared.weight_fake_quant.scale.clone()

    def double_and_run():
        with torch.no_grad():
            weight.mul_(2)
            prepared(x)
        return prepared.weight_fake_quant.scale

    torch.testing.assert_close(double_and_run(), 2 * scale)
    fixed = prepared.input_fake_quant.scale.clone()
    prepared(100 * x)
    assert torch.equal(prepared.input_fake_quant.scale, fixed)  # what calibrate saw
    qk.freeze_observers(prepared)
    torch.testing.assert_close(double_and_run(), 2 * scale)
    qk.freeze_observers(prepared, False)
    torch.testing.assert_close(double_and_run(), 8 * scale)
    qk.calibrate(prepared, [x], method="mse")
    chosen = prepared.weight_fake_quant.scale.clone()
    torch.testing.assert_close(double_and_run(), chosen)
    prepared.eval()
    torch.testing.assert_close(double_and_run(), chosen)


def test_a_float_checkpoint_after_prepare_starts_the_weight_scales_anew():
    torch.manual_seed(0)
    for quantizer in ("lsq", "minmax"):
        model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        trained = copy.deepcopy(model)
        for parameter in trained.parameters():
            parameter.data.mul_(7)
        x = torch.randn(8, 16)
        prepared = qk.prepare(model, config(8, quantizer))
        qk.calibrate(prepared, [x])
        prepared.load_state_dict(trained.state_dict(), strict=False)
        prepared.eval()
        for layer, source in ((prepared[0], trained[0]), (prepared[2], trained[2])):
            assert sqnr(source.weight, layer.weight_fake_quant(layer.weight)) > 40
        alone = qk.prepare(model[0])
        alone.load_state_dict(trained[0].state_dict(), strict=False)
        assert sqnr(trained[0].weight, alone.weight_fake_quant(alone.weight)) > 40


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
def test_switches(quantizer):
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4), torch.randn(32, 8)
    prepared = qk.prepare(model, config(4, quantizer))
    if quantizer != "dynamic":
        qk.calibrate(prepared, [x])
    assert not torch.equal(prepared(x), model(x))
    off = prepared if quantizer != "lsq" else copy.deepcopy(prepared)
    off.apply(torch.ao.quantization.disable_fake_quant)
    for mode in (True, False):
        assert torch.equal(off.train(mode)(x), model(x))
    qk.enable_fake_quant(off)
    assert not torch.equal(off(x), model(x))
    qk.enable_fake_quant(off, False)
    assert torch.equal(off(x), model(x))
    loaded = qk.prepare(model, config(4, quantizer))
    loaded.load_state_dict(off.state_dict())
    assert torch.equal(loaded(x), model(x))
    off.apply(torch.ao.quantization.enable_fake_quant)
    assert not torch.equal(off(x), model(x))
    off.train()
    off.apply(torch.ao.quantization.disable_observer)
    before = copy.deepcopy(off.state_dict())
    off(10 * x)
    after = off.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    fresh = qk.prepare(model, config(4, quantizer))
    fresh.load_state_dict(before)
    fresh.train()(10 * x)
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())
    if quantizer == "ema":
        off.apply(torch.ao.quantization.enable_observer)
        off(10 * x)
        assert not torch.equal(off.input_fake_quant.scale, before["input_fake_quant.scale"])


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
def test_set_bits_keeps_the_range(quantizer):
    torch.manual_seed(0)
    prepared = qk.prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), config(8, quantizer))
    x = torch.randn(32, 16)
    if quantizer != "dynamic":
        qk.calibrate(prepared, [x])
    if quantizer == "lsq":
        with torch.no_grad():
            for layer in quantizers(prepared).values():
                layer.log_scale.fill_(0.3)
    before = {
        name: tuple(None if t is None else t.clone() for t in q.qparams())
        for name, q in quantizers(prepared).items()
        if quantizer != "dynamic"
    }
    assert qk.set_bits(prepared, 4, "0.*") == ["0.weight_fake_quant", "0.input_fake_quant"]
    assert [q.bits for q in quantizers(prepared).values()] == [4, 4, 8, 8]
    for name, (scale, zero_point) in before.items():
        changed = quantizers(prepared)[name]
        assert (changed.quant_min, changed.quant_max) == ((-7, 7) if zero_point is None else (-8, 7)) or name[0] == "1"
        if name[0] == "0":
            steps = 127 / 7 if zero_point is None else 255 / 15
            torch.testing.assert_close(changed.qparams()[0], scale * steps)
            if zero_point is not None:
                low = (-8 - changed.qparams()[1]) * changed.scale
                torch.testing.assert_close(
                    low, (-128 - zero_point) * scale, rtol=0, atol=float(changed.scale.max()) / 2
                )
    prepared.eval()
    with torch.no_grad():
        torch.testing.assert_close(qk.convert(prepared)(x), prepared(x))
    qk.set_bits(prepared, 8)
    for name, (scale, _) in before.items():
        torch.testing.assert_close(quantizers(prepared)[name].scale, scale)
    with pytest.raises(ValueError, match="bits: got 9"):
        qk.set_bits(prepared, 9)
    with pytest.raises(ValueError, match=r"where: 'fc\.\*' matches no quantizer"):
        qk.set_bits(prepared, 4, "fc.*")
    with pytest.raises(AttributeError, match="bits"):
        prepared[0].weight_fake_quant.bits = 4


def test_a_state_of_another_width_is_refused():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4), torch.randn(32, 8)
    for quantizer in ("lsq", "minmax", "ema"):
        prepared = qk.prepare(model, config(8, quantizer))
        qk.calibrate(prepared, [x])
        other = qk.prepare(model, config(4, quantizer))
        with pytest.raises(RuntimeError, match=r"weight_fake_quant\.bits: got a state of 8 bits; accepted: 4"):
            other.load_state_dict(prepared.state_dict())
        qk.set_bits(other, 8)
        other.load_state_dict(prepared.state_dict())
        assert torch.equal(other.eval()(x), prepared.eval()(x))
        older = {
            key: value for key, value in prepared.state_dict().items() if not key.endswith(("bits", "_on", "start"))
        }
        older = {key: value for key, value in older.items() if not key.endswith("log_scale")}
        other = qk.prepare(model, config(8, quantizer)).eval()
        other.load_state_dict(older, strict=quantizer != "ema")  # a state without these keys
        assert torch.equal(other(x), prepared(x))
    with pytest.raises(RuntimeError, match=r"scale: got shape \[3, 1\]; accepted: \[4, 1\]"):
        other.load_state_dict({**prepared.state_dict(), "weight_fake_quant.scale": torch.ones(3, 1)})


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
def test_training_resumes_bit_for_bit(quantizer, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)

    def steps(prepared, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            F.mse_loss(prepared(x), x[:, :4].cos()).backward()
            optimizer.step()

    prepared = qk.prepare(model, config(4, quantizer))
    qk.calibrate(prepared, [x])
    optimizer = torch.optim.Adam(qk.parameter_groups(prepared, lr=0.01, weight_decay=0.1))
    steps(prepared, optimizer, 5)
    torch.save({"model": prepared.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(prepared, optimizer, 5)
    saved = torch.load(tmp_path / "state.pt")
    for assign in (False, True):
        resumed = qk.prepare(model, config(4, quantizer))
        resumed.load_state_dict(copy.deepcopy(saved["model"]), assign=assign)
        again = torch.optim.Adam(qk.parameter_groups(resumed, lr=0.01, weight_decay=0.1))
        again.load_state_dict(copy.deepcopy(saved["optimizer"]))
        steps(resumed, again, 5)
        for key, value in prepared.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key
    if quantizer == "lsq":
        edited = {**saved["model"], "0.weight_fake_quant.scale": torch.full((16, 1), 0.5)}
        resumed.load_state_dict(edited)
        assert torch.equal(resumed[0].weight_fake_quant.scale, torch.full((16, 1), 0.5))
        assert torch.equal(resumed[2].weight_fake_quant.scale, saved["model"]["2.weight_fake_quant.scale"])
    resumed[0].weight_fake_quant.scale = torch.full((16, 1), 0.25)
    assert torch.equal(resumed[0].weight_fake_quant.scale, torch.full((16, 1), 0.25))


def test_fully_shard_takes_a_prepared_bf16_model(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    x = torch.randn(16, 8)
    prepared = qk.prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), config(4))
    qk.calibrate(prepared, [x])
    prepared = prepared.bfloat16()
    assert all(quantizer.scale.dtype == torch.float32 for quantizer in quantizers(prepared).values())
    plain = copy.deepcopy(prepared)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    try:
        sharded = fully_shard(prepared)
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(x.bfloat16()).float().square().sum().backward()
                optimizer.step()
        for (key, value), (_, expected) in zip(sharded.state_dict().items(), plain.state_dict().items(), strict=True):
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            torch.testing.assert_close(value, expected, msg=key)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_changes_a_quantizer_reaches_a_sharded_model(symmetric, dtype, tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    x = torch.randn(16, 32, dtype=dtype)
    spec = qk.QSpec(4, PerGroup(16), symmetric=symmetric)
    prepared = qk.prepare(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), qk.QConfig(spec))
    qk.calibrate(prepared, [x])
    with torch.no_grad():
        for quantizer in quantizers(prepared).values():
            quantizer.log_scale += 0.01
    plain = copy.deepcopy(prepared)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    try:
        for layer in (prepared[0], prepared[2]):
            fully_shard(layer)
        sharded = fully_shard(prepared)

        def assert_same():
            for quantizer, expected in zip(quantizers(sharded).values(), quantizers(plain).values(), strict=True):
                for got, wanted in zip(quantizer.qparams(), expected.qparams(), strict=True):
                    assert (got is None and wanted is None) or torch.equal(got, wanted)

        for model in (plain, sharded):
            qk.set_bits(model, 3, "*weight_fake_quant")
            qk.set_bits(model, 6, "*input_fake_quant")
        assert_same()
        for model in (plain, sharded):
            state = model.state_dict()
            model.load_state_dict({key: t for key, t in state.items() if not key.endswith(("start", "log_scale"))})
        assert_same()
        for model in (plain, sharded):
            qk.calibrate(model, [3 * x])
        assert_same()
        for model in (plain, sharded):
            qk.freeze_observers(model)
        assert torch.equal(sharded.eval()(x), plain.eval()(x))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), None])
def test_a_quantizer_called_twice_keeps_what_the_first_call_used(quantizer, symmetric, shape):
    torch.manual_seed(0)
    granularity = PerTensor() if shape is None else PerChannel(0)
    fake_quant = FakeQuantize(quantizer=quantizer, symmetric=symmetric, granularity=granularity, shape=shape)
    x = torch.randn(4, 8, requires_grad=True)
    fake_quant(x)
    y = fake_quant(x)
    wanted = [x, *fake_quant.parameters()]
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    fake_quant(9 * x + 5 if shape is None else x / 100)
    for got, gradient in zip(torch.autograd.grad(y.sum(), wanted), expected, strict=True):
        assert torch.equal(got, gradient)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_prepared_models_export(quantizer, symmetric, training):
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    weight_only = qk.QConfig(qk.QSpec(8, quantizer=quantizer, symmetric=symmetric), None)
    prepared = qk.prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), weight_only)
    with torch.no_grad():
        prepared[0].weight *= 3
    prepared.train(training)
    expected = copy.deepcopy(prepared)(x)
    exported = torch.export.export(prepared, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
def test_an_average_made_before_the_first_batch_is_calibrated_with_the_model(quantizer):
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    prepared = qk.prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), config(8, quantizer))
    called, unused = (torch.optim.swa_utils.AveragedModel(prepared) for _ in range(2))
    prepared(x)
    for averaged in (called, unused):
        averaged.update_parameters(prepared)
    y = prepared.eval()(x)
    assert torch.equal(called.eval()(x), y)
    torch.testing.assert_close(qk.convert(unused.module)(x), y)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.utils.parametrizations.weight_norm])
def test_frozen_ranges_are_those_of_the_weights_as_they_are(quantizer, wrap):
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    model = nn.Sequential(wrap(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 4))
    prepared = qk.prepare(model, config(8, quantizer))
    qk.calibrate(prepared, [x])
    prepared.eval()
    for parameter in prepared.parameters():
        if parameter.dim() == 2 and parameter.shape[1] > 1:
            parameter.data.mul_(4)
    prepared[2].weight.data.div_(9)
    y = prepared(x)
    narrow = copy.deepcopy(prepared)
    qk.freeze_observers(prepared)
    assert torch.equal(prepared(x), y)
    prepared.train()(x)
    assert torch.equal(prepared.eval()(x), y)
    qk.set_bits(narrow, 5)
    for layer in (narrow[0], narrow[2]):
        assert sqnr(layer.weight, layer.weight_fake_quant(layer.weight)) > 20


def test_frozen_weights_stay_frozen_where_a_float_checkpoint_came_before():
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    prepared = qk.prepare(nn.Linear(16, 8))
    qk.calibrate(prepared, [x])
    prepared.load_state_dict(nn.Linear(16, 8).state_dict(), strict=False)
    qk.freeze_observers(prepared)
    prepared(x)
    assert not prepared.weight_fake_quant.observer_on
    scale = prepared.weight_fake_quant.scale.clone()
    with torch.no_grad():
        prepared.weight *= 2
    prepared(x)
    assert torch.equal(prepared.weight_fake_quant.scale, scale)


def test_moving_averages_of_weights_take_transforms_in_training():
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    prepared = qk.prepare(nn.Linear(16, 8), config(8, "ema"))
    qk.calibrate(prepared, [x])
    parameters = dict(prepared.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(prepared, p, (x,)).square().sum())(parameters)
    prepared(x).square().sum().backward()
    torch.testing.assert_close(gradients["weight"], prepared.weight.grad, rtol=1e-4, atol=1e-4)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, ids, mask):
        return self.fc(ids * mask)


def test_calibrate_passes_tuples_as_arguments():
    x, mask = torch.full((8, 4), 100.0), torch.full((8, 4), 0.01)
    prepared = qk.prepare(TwoInputs(), config(8, "minmax"))
    for batch in ((x, mask), [x, mask], {"ids": x, "mask": mask}):
        qk.calibrate(prepared, [batch])
        torch.testing.assert_close(prepared.fc.input_fake_quant.scale, torch.full((1,), 1 / 255))
    with pytest.raises(TypeError, match="got a tuple of 3 elements for a model that takes 2 arguments"):
        qk.calibrate(prepared, [(x, mask, x)])
    labelled = qk.prepare(nn.Linear(4, 2), config(8, "minmax"))
    qk.calibrate(labelled, [(x, torch.zeros(8))])  # a loader's pair of input and target
    torch.testing.assert_close(labelled.input_fake_quant.scale, torch.full((1,), 100 / 255))
    assert len(qk.report(prepared, (x, mask)).layers) == 1


def test_calibrate_takes_max_batches():
    taken = []

    def batches():
        for index in range(100):
            taken.append(index)
            yield torch.full((2, 4), float(index))

    prepared = qk.prepare(nn.Linear(4, 2), config(8, "minmax"))
    qk.calibrate(prepared, batches(), max_batches=3)
    assert taken == [0, 1, 2]
    torch.testing.assert_close(prepared.input_fake_quant.scale, torch.full((1,), 2 / 255))
    with pytest.raises(ValueError, match="max_batches: got 0"):
        qk.calibrate(prepared, batches(), max_batches=0)


def test_prepared_models_can_be_traced():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    for quantizer in ("lsq", "minmax", "ema", "dynamic"):
        prepared = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), config(4, quantizer))
        if quantizer != "dynamic":
            qk.calibrate(prepared, [x])
        for mode in (True, False):
            prepared.train(mode)
            expected = copy.deepcopy(prepared)(x)
            traced = torch.fx.symbolic_trace(prepared)
            assert torch.equal(traced(x), expected), (quantizer, mode)
            expected = copy.deepcopy(prepared)(x[:2])
            assert torch.equal(traced(x[:2]), expected), (quantizer, mode)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
def test_a_model_without_data_starts_when_it_gets_some(quantizer):
    with torch.device("meta"):
        prepared = qk.prepare(nn.Linear(8, 4), config(8, quantizer))
    prepared = prepared.to_empty(device="cpu")
    torch.manual_seed(0)
    source, x = nn.Linear(8, 4), torch.randn(16, 8)
    expected = qk.prepare(source, config(8, quantizer))
    for key, value in expected.state_dict().items():
        if key.startswith("input_fake_quant"):
            torch.testing.assert_close(prepared.state_dict()[key], value, equal_nan=True)
    prepared.load_state_dict(source.state_dict(), strict=False)
    if quantizer != "dynamic":
        qk.calibrate(prepared, [x])
        qk.calibrate(expected, [x])
    assert torch.equal(prepared(x), expected(x))
    assert isinstance(prepared, QATLinear)
