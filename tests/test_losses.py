"""Losses of what quantization costs: values and gradients by their formulas, and that nothing moves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from loop_models import MODELS, assert_same, batches_of, prepared, state_of
from named_quantizers import WEIGHTS, width
from qat_models import config, quantizers
from torch import nn
from torch.nn.utils import parametrizations

import qkernels as qk

ON_WEIGHTS = [qk.losses.weight_error, qk.losses.dampening, qk.losses.bin_regularization, qk.losses.kurtosis]
PULLS = [qk.losses.dampening, qk.losses.bin_regularization, qk.losses.kurtosis]
GRANULARITIES = {"tensor": qk.PerTensor(), "channel": qk.PerChannel(), "group": qk.PerGroup(4)}


def one_layer(quantizer: str, granularity: str = "channel", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer some of whose weights are clipped, if its quantizer clips at all, and lie at no edge."""
    torch.manual_seed(0)
    spec = qk.QSpec(width(quantizer, 3), GRANULARITIES[granularity], quantizer=quantizer)
    model = qk.prepare(nn.Linear(8, 6, bias=False), qk.QConfig(spec, None)).to(dtype)
    if quantizer != "dynamic":
        qk.freeze_observers(model)
    if quantizer in ("lsq", "minmax"):
        model.weight_fake_quant.scale = model.weight_fake_quant.scale * 0.7
    return model


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("quantizer", ["lsq", "lsq+", "minmax", "ternary", "kmeans", "midrise", "apot"])
def test_weight_error_is_that_of_autograd_through_the_quantizer(quantizer: str, granularity: str) -> None:
    model, other = one_layer(quantizer, granularity), one_layer(quantizer, granularity)
    loss = qk.losses.weight_error(model)
    expected = (other.weight_fake_quant(other.weight) - other.weight).square().sum(0).sum() / 8
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_weight_error_leads_a_learned_scale_to_the_smallest_error() -> None:
    model = one_layer("lsq", "tensor")
    quantizer = model.weight_fake_quant
    optimizer = torch.optim.Adam([quantizer.log_scale], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = qk.losses.weight_error(model)
        loss.backward()
        optimizer.step()
    scales = quantizer.scale.double() * torch.linspace(0.3, 3, 500)
    errors = qk.quantization_errors(
        model.weight, scales.view(-1, 1), quant_min=quantizer.quant_min, quant_max=quantizer.quant_max
    )
    assert float(loss.detach()) * 8 < 1.1 * float(errors.min())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("quantizer", [name for name in WEIGHTS if name != "dorefa"])
def test_dampening_pulls_to_the_code_and_leaves_what_is_clipped(quantizer: str, granularity: str) -> None:
    model = one_layer(quantizer, granularity)
    w, quantize = model.weight.detach(), copy.deepcopy(model).eval().weight_fake_quant
    q = quantize(w).detach()
    inside = torch.ones_like(w, dtype=torch.bool)
    if quantizer != "dynamic":
        inside = (w >= quantize(torch.full_like(w, -1e6))) & (w <= quantize(torch.full_like(w, 1e6)))
    assert quantizer not in ("lsq", "minmax", "midrise", "ternary") or not inside.all()
    loss = qk.losses.dampening(model)
    loss.backward()
    torch.testing.assert_close(loss, ((w - q).square() * inside).sum() / 8)
    torch.testing.assert_close(model.weight.grad, 2 * (w - q) * inside / 8)
    assert all(p.grad is None for name, p in model.named_parameters() if name != "weight")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("quantizer", [name for name in WEIGHTS if name != "dorefa"])
def test_bin_regularization_is_the_mean_and_variance_of_each_bin(quantizer: str, granularity: str) -> None:
    model = one_layer(quantizer, granularity)
    w, quantize = model.weight.detach(), copy.deepcopy(model).eval().weight_fake_quant
    q = quantize(w).detach()
    if granularity == "tensor":
        bins = q
    elif quantize.integer_codes:
        bins = quantize.quantize(w)[0]
    else:
        bins = qk.quantize_codebook(w, quantize.qparams(w)[0], quantize.levels.detach())
    loss = qk.losses.bin_regularization(model)
    loss.backward()
    expected, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(w)
    for code in bins.unique():
        distance = (w - q)[bins == code]
        expected += distance.mean() ** 2 + distance.var(unbiased=False)
        gradient[bins == code] = 2 * distance / distance.numel()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.weight.grad, gradient)


@pytest.mark.parametrize("loss", PULLS)
@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "midrise"])
def test_gradients_are_the_derivatives(loss, quantizer: str) -> None:
    kept = one_layer(quantizer)
    weight = kept.weight.detach().clone().requires_grad_()

    def at(weight: torch.Tensor) -> torch.Tensor:
        twin = copy.deepcopy(kept)
        del twin._parameters["weight"]
        twin.__dict__["weight"] = weight
        return loss(twin)

    assert torch.autograd.gradcheck(at, weight, eps=1e-7, atol=1e-5)


def test_kurtosis_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    model = qk.prepare(nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100)), config(4))
    values = []
    for at, layer in enumerate(model):
        nn.init.uniform_(layer.weight) if at else nn.init.normal_(layer.weight, 3, 2)
        w = layer.weight.detach().double()
        values.append(((w - w.mean()) / w.std(unbiased=False)).pow(4).mean())
    assert values[0] == pytest.approx(3, abs=0.1)
    assert values[1] == pytest.approx(1.8, abs=0.1)
    for target in (1.8, 3.0):
        expected = sum((value - target) ** 2 for value in values) / 2
        assert qk.losses.kurtosis(model, target=target).item() == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_have_no_kurtosis(dtype: torch.dtype, value: float) -> None:
    """A layer that starts from zeros takes no part, and does not make the others' gradients NaN."""
    torch.manual_seed(0)
    model = qk.prepare(nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 5)), config(4)).to(dtype)
    nn.init.constant_(model[0].weight, value)
    loss = qk.losses.kurtosis(model)
    loss.backward()
    w = model[1].weight.detach()
    expected = (((w - w.mean()) / w.std(unbiased=False)).pow(4).mean() - 1.8).square() / 2
    torch.testing.assert_close(loss.detach(), expected)
    assert not model[0].weight.grad.any()
    assert model[1].weight.grad.abs().max() > 0


def test_activation_range_and_its_gradient() -> None:
    model = prepared("transformer", bits=4)
    inputs = [q for q in quantizers(model).values() if q.learns and not q.is_weight]
    with torch.no_grad():
        for quantizer in inputs:
            quantizer.log_scale.fill_(0.1)
    loss = qk.losses.activation_range(model)
    loss.backward()
    ranges = [(q.scale * q.steps).detach().double() for q in inputs]
    assert loss.item() == pytest.approx(float(sum(r.square().mean() for r in ranges)), rel=1e-5)
    for quantizer, r in zip(inputs, ranges, strict=True):
        expected = (2 * r.square() / math.sqrt(quantizer.steps)).float()
        torch.testing.assert_close(quantizer.log_scale.grad, expected)
    assert all(p.grad is None for name, p in model.named_parameters() if "input_fake_quant" not in name)


def test_divergence_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5, 7).double()
    for dim, rows in ((-1, 30), (1, 70)):
        p, q = (target / 2).softmax(dim), (output / 2).softmax(dim)
        expected = (p * (p / q).log()).sum() * 4 / rows
        torch.testing.assert_close(qk.losses.divergence(output, target, temperature=2.0, dim=dim), expected)
    torch.testing.assert_close(qk.losses.divergence(output, target, measure="mse"), (output - target).square().mean())
    assert torch.autograd.gradcheck(lambda y: qk.losses.divergence(y, target, temperature=3), output)
    assert qk.losses.divergence(output, output).item() == 0
    low = qk.losses.divergence(output.bfloat16(), target.bfloat16())
    assert low.dtype == torch.float32


def test_consistency_compares_with_the_same_weights_without_quantization() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(11, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5))
    model, x = qk.prepare(network, config(3)), torch.randn(12, 11)
    qk.calibrate(model, [x])
    y = model(x)
    before = state_of(model)
    torch.manual_seed(3)
    loss = qk.losses.consistency(model, x, y, temperature=2.0)
    assert torch.equal(torch.rand(1), torch.manual_seed(3) and torch.rand(1))  # no random number was drawn
    assert_same(state_of(model), before)
    assert all(module.training for module in model.modules())
    network[3].p = 0.0
    with torch.no_grad():
        target = network(x)  # in training mode: the batch's statistics
    torch.testing.assert_close(loss, qk.losses.divergence(y, target, temperature=2.0))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    qk.enable_fake_quant(model, False)
    model[3].p = 0.0
    assert qk.losses.consistency(model, (x, None), model(x), measure="mse").item() < 1e-12


def test_distillation_leaves_the_teacher_as_it_is() -> None:
    torch.manual_seed(0)
    model, (x,) = prepared("mlp"), batches_of("mlp", 1)
    teacher = nn.Sequential(nn.Linear(11, 5), nn.BatchNorm1d(5), nn.Dropout(0.9)).train()
    before = state_of(teacher)
    y = model(x)
    loss = qk.losses.distillation(x, {"loss": None, "logits": y}, teacher=teacher, temperature=4)
    assert_same(state_of(teacher), before)
    assert all(module.training for module in teacher.modules())
    torch.testing.assert_close(loss, qk.losses.divergence(y, teacher.eval()(x), temperature=4))
    by_function = qk.losses.distillation(x, y, teacher=lambda x: (teacher(x),), temperature=4)
    assert torch.equal(by_function, loss)
    with pytest.raises(ValueError, match=r"^teacher: got one whose output has shape \[12, 6\]; accepted: \[12, 5\]"):
        qk.losses.distillation(x, y, teacher=nn.Linear(11, 6))


def test_layer_outputs_compare_with_the_float_model() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(11, 16), nn.ReLU(inplace=True), nn.Linear(16, 5))
    model, x = qk.prepare(network, config(3)), torch.randn(12, 11)
    qk.calibrate(model, [x])
    before = state_of(model)
    loss = qk.losses.layer_outputs(model, x)
    assert_same(state_of(model), before)
    assert not any(module._forward_hooks for module in list(model.modules())[1:])
    with torch.no_grad():
        model.eval()
        f1 = network[0](x).relu()
        y1, f2 = model[0](x).relu(), network[2](f1)
        pairs = (y1, f1), (model[2](y1), f2)
    errors = [(y - f).square().sum() / f.square().sum() for y, f in pairs]
    torch.testing.assert_close(loss, sum(errors) / 2)
    torch.testing.assert_close(qk.losses.layer_outputs(model, [x], where="2"), errors[1])
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "2.bias")
    with pytest.raises(ValueError, match=r"^where: got 'blocks\.\*'; accepted: .*the names of modules: '', '0'"):
        qk.losses.layer_outputs(model, x, where="blocks.*")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["lsq", "ema", "stochastic"])
def test_no_loss_moves_anything(name: str, way: str) -> None:
    model, (x,) = prepared(name, way, 4), batches_of(name, 1)
    if name == "mlp":
        parametrizations.spectral_norm(model[2], n_power_iterations=3)
        parametrizations.weight_norm(model[0])
    y = model(x)
    before, random = state_of(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    losses = [loss(model) for loss in ON_WEIGHTS]
    losses += [qk.losses.consistency(model, x, y), qk.losses.layer_outputs(model, x)]
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses)
    sum(losses).backward()
    model.zero_grad()
    assert_same(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("loss", ON_WEIGHTS)
def test_a_shared_weight_counts_once_and_a_computed_one_reaches_its_parameters(loss) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    alone = loss(qk.prepare(network[:1], config(3)))
    network[1].weight = network[0].weight
    tied = qk.prepare(network, config(3))
    torch.testing.assert_close(loss(tied), alone)
    with_norm = qk.prepare(parametrizations.weight_norm(nn.Linear(8, 8)), config(3))
    loss(with_norm).backward()
    parts = with_norm.parametrizations.weight
    assert parts.original1.grad.isfinite().all()
    assert loss is qk.losses.weight_error or parts.original1.grad.any()


def test_models_of_low_precision_and_frozen_weights() -> None:
    model = prepared("mlp", bits=4).bfloat16()
    for loss in ON_WEIGHTS:
        model.zero_grad()
        loss(model).backward()
        assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in model.parameters())
    model.requires_grad_(False)
    assert not any(loss(model).requires_grad for loss in ON_WEIGHTS)
    with torch.no_grad():
        assert not qk.losses.dampening(prepared("mlp", bits=4)).requires_grad


@pytest.mark.parametrize("loss", ON_WEIGHTS)
def test_a_gradient_step_lowers_the_loss(loss) -> None:
    model = prepared("cnn", bits=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 if loss is qk.losses.weight_error else 1e-3)
    first = loss(model)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model) < first


def test_what_a_loss_is_not_for_is_refused_by_name() -> None:
    float_model = nn.Linear(4, 4)
    for loss in ON_WEIGHTS:
        with pytest.raises(ValueError, match=r"^model: got one without quantizers"):
            loss(float_model)
    squashed = qk.prepare(nn.Sequential(nn.Linear(4, 4)), qk.QConfig(qk.QSpec(4, quantizer="dorefa"), None))
    for loss in ON_WEIGHTS[:3]:
        with pytest.raises(ValueError, match=rf"^{loss.__name__}: got '0.weight' with quantizer=\"dorefa\""):
            loss(squashed)
    assert qk.losses.kurtosis(squashed) > 0
    with pytest.raises(ValueError, match=r"^activation_range: got a model whose inputs have no learned range"):
        qk.losses.activation_range(squashed)
    inputs_only = qk.prepare(nn.Linear(4, 4), qk.QConfig(None, qk.QSpec(8)))
    with pytest.raises(ValueError, match=r"^dampening: got a model without quantized weights"):
        qk.losses.dampening(inputs_only)
    with pytest.raises(ValueError, match=r"^model: the shape of '0' is not known yet"):
        qk.losses.dampening(qk.prepare(nn.Sequential(nn.LazyLinear(4))))
    y = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"^measure: got 'l1'; accepted: 'kl', 'mse'"):
        qk.losses.divergence(y, y, measure="l1")
    with pytest.raises(ValueError, match=r"^temperature: got 0; accepted: a positive number"):
        qk.losses.divergence(y, y, temperature=0)
    with pytest.raises(ValueError, match=r"^target: got shape \[4\]; accepted: \[3, 4\]"):
        qk.losses.divergence(y, y[0])
