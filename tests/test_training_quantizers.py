"""Quantizers in a training loop: learned scales under every optimizer, and where their ranges start."""

import copy
import math

import pytest
import torch
from qat_models import config, quantizers, sqnr
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import FakeQuantize, PerChannel, PerGroup, PerTensor, QATConv2d

OPTIMIZERS = {
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
    "RMSprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "SGD with momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


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
    with pytest.raises(RuntimeError, match=r"^body \(QATLinear\): body\.input_fake_quant: .* has no scale yet"):
        fresh(x)
    fresh.train()
    with pytest.raises(RuntimeError, match=r"^body \(QATLinear\): body\.input_fake_quant: got a tensor that holds NaN"):
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
