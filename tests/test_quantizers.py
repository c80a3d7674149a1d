"""Every quantizer by name: values and gradients by the papers' formulas in plain torch."""

import math

import pytest
import torch
from named_quantizers import INPUTS, WEIGHTS, made
from torch import nn

import qkernels as qk
from qkernels.nn import PerChannel, PerGroup, PerTensor

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def blocks(x, granularity):
    """x as (one block that shares a scale, its elements), and the way back."""
    if granularity == PerTensor():
        return x.reshape(1, -1), lambda y: y.reshape(x.shape)
    if isinstance(granularity, PerGroup):
        return x.reshape(-1, granularity.size), lambda y: y.reshape(x.shape)
    if granularity.axis == 1:
        return x.t(), lambda y: y.t()
    return x, lambda y: y


def nearest(v, levels):
    return levels[(v.unsqueeze(-1) - levels).abs().argmin(-1)]


def formula(name, w, bits, levels=None):
    """y for rows w that have a scale each, in fp64, and the factor of the gradient of each element."""
    w, n = w.double(), 2 ** (bits - 1)
    a = w.abs().amax(1, keepdim=True)
    ones = torch.ones_like(w)
    if name == "dorefa":
        t, m, n = w.tanh(), a.tanh(), 2**bits - 1
        return (2 * torch.round((t / (2 * m) + 0.5) * n) / n - 1) * m, 1 - t.square()
    if name == "ternary":
        scale = w.abs().mean(1, keepdim=True)
        return torch.round(w / scale).clamp(-1, 1) * scale, ones
    if name == "midrise":
        step = a / n
        return (torch.round(w / step - 0.5).clamp(-n, n - 1) + 0.5) * step, ones
    if name in ("minmax", "ema", "stochastic"):
        step = a / (n - 1)
        return torch.round(w / step) * step, ones
    return nearest(w / a, levels.double()) * a, ones


def in_the_middle(name, w, bits):
    """Where two levels are as near: in bf16 it happens, and the rounding of 1/scale decides."""
    if name != "midrise":
        return torch.zeros_like(w, dtype=torch.bool)
    steps = w.double() * 2 ** (bits - 1) / w.double().abs().amax(1, keepdim=True)
    return ((steps - steps.round()).abs() < 1e-6) & (steps.round().abs() < 2 ** (bits - 1))


def levels_of(name, bits):
    """From the papers, independently of qkernels.codebooks."""
    if name == "po2":
        powers = [2.0**-i for i in range(2 ** (bits - 1) - 1)]
    elif name == "apot":  # of 3 magnitude bits one term has two and one has one: {0, 1, 1/2, 1/8 } + {0, 1/4}
        assert bits == 4
        powers = [a + b for a in (0, 1 / 2, 1 / 4, 1 / 16) for b in (0, 1 / 8)]
        powers = [p / max(powers) for p in powers if p]
    else:
        return qk.codebooks.nf4()
    return torch.tensor(sorted([0.0, *powers, *(-p for p in powers)]))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dorefa", "ternary", "midrise", "nf4", "apot", "po2"])
def test_weights_by_formula(name, dtype, granularity):
    torch.manual_seed(0)
    w = torch.randn(6, 12, dtype=dtype).requires_grad_()
    dy = torch.randn(6, 12, dtype=dtype)
    quantizer = made(name, w.shape, granularity=granularity)
    rows, back = blocks(w.detach(), granularity)
    levels = levels_of(name, quantizer.bits) if name in ("nf4", "apot", "po2") else None
    y, factor = map(back, formula(name, rows, quantizer.bits, levels))
    tie = back(in_the_middle(name, rows, quantizer.bits))
    assert tie.sum() <= 3
    for mode in (True, False):
        w.grad = None
        quantizer.train(mode)
        out = quantizer(w)
        out.backward(dy)
        assert out.dtype == dtype
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-6}[dtype]
        error = (out.detach().double() - y).abs() > tolerance * (y.abs() + 0.1)
        assert not (error & ~tie).any()
        torch.testing.assert_close(w.grad.double(), factor * dy.double(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", ["dorefa", "midrise"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_by_formula_at_other_widths(name, bits):
    torch.manual_seed(0)
    w = torch.randn(4, 9)
    y, _ = formula(name, w, bits)
    out = made(name, w.shape, bits, granularity=PerChannel())(w)
    torch.testing.assert_close(out.double(), y, rtol=1e-6, atol=1e-7)
    assert len({round(v, 5) for v in (out[0] / out[0].abs().max()).tolist()}) <= 2**bits
    assert (out != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "apot", "po2", "midrise"])
def test_inputs_by_formula(name, dtype):
    torch.manual_seed(0)
    first, x = torch.randn(5, 7, dtype=dtype), 2 * torch.randn(3, 7, dtype=dtype)
    x.requires_grad_()
    quantizer = made(name)
    quantizer(first)
    a = first.abs().max().double()
    v = x.detach().double() / a
    if name == "midrise":
        y = (torch.round(v * 8 - 0.5).clamp(-8, 7) + 0.5) / 8 * a
    else:
        y = nearest(v, levels_of(name, quantizer.bits).double()) * a
    dy = torch.randn(3, 7, dtype=dtype)
    out = quantizer(x)
    out.backward(dy)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(out.detach().double(), y, rtol=tolerance, atol=tolerance / 10)
    assert (v.abs() > 1).any()
    assert torch.equal(x.grad, torch.where(v.abs() <= 1, dy, 0))
    assert torch.equal(quantizer.scale, a.float().reshape(1))  # an input's scale stays


@pytest.mark.parametrize("axis", [0, 1, (0, 1), (2, 0), (0, 1, 2)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_weights_of_any_channels(axis, symmetric):
    torch.manual_seed(0)
    w = torch.randn(3, 4, 6, requires_grad=True)
    options = {"granularity": PerChannel(axis), "symmetric": symmetric, "shape": w.shape, "bits": 5}
    dynamic = made("dynamic", **options)
    followed = made("minmax", **options)
    assert torch.equal(dynamic(w), followed(w))  # a weight's present range is the tensor's own
    for one, other in zip(dynamic.quantize(w), followed.quantize(w), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_midrise_passes_the_largest_value_itself():
    x = torch.tensor([-1.0, -0.2, 0.3, 1.0, 1.5, float("inf"), float("nan")]).requires_grad_()
    quantizer = made("midrise", bits=2)
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([1.0]))
    y = quantizer(x)
    y.sum().backward()
    assert y[:6].tolist() == [-0.75, -0.25, 0.25, 0.75, 0.75, 0.75]
    assert y[6].isnan()
    assert x.grad.tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_pact_by_formula():
    torch.manual_seed(0)
    first, x, dy = torch.randn(64, 5), 1.5 * torch.randn(9, 5), torch.randn(9, 5)
    x.requires_grad_()
    quantizer = made("pact", bits=8)
    quantizer(first)
    alpha = first.max().clone()
    assert not quantizer.symmetric
    torch.testing.assert_close(quantizer.scale * 255, alpha.reshape(1))
    for _ in range(3):  # alpha does not grow with its inputs
        x.grad = quantizer.log_scale.grad = None
        out = quantizer(x)
        out.backward(dy)
        torch.testing.assert_close(quantizer.scale * 255, alpha.reshape(1))
    v = x.detach()
    torch.testing.assert_close(out.detach(), torch.round(v.clamp(0, alpha) * 255 / alpha) * alpha / 255)
    assert (v > alpha).any()
    torch.testing.assert_close(x.grad, torch.where((v >= 0) & (v < alpha), dy, 0))
    dalpha = dy[v >= alpha].sum()  # the paper's
    # alpha = 255·scale; what FakeQuantize says of log_scale's gradient; LSQ's factor for the 5 features of a sample
    expected = dalpha * 255 * (2 / (alpha / 255 * math.sqrt(255))) / math.sqrt(5 * 255)
    torch.testing.assert_close(quantizer.log_scale.grad, expected.reshape(1))
    codes, scale, zero_point = quantizer.quantize(x.detach())
    assert torch.equal((codes.float() - zero_point) * scale, quantizer.eval()(x))
    assert zero_point.tolist() == [-128]
    assert list(dict(quantizer.named_parameters())) == ["log_scale"]


def test_pact_of_values_below_zero():
    quantizer = made("pact")
    y = quantizer(-torch.rand(4, 5))
    assert (y == 0).all()
    assert quantizer.scale.item() > 0
    assert quantizer.zero_point.tolist() == [-8]


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "entropy", "moving_average"])
def test_pact_starts_from_what_is_above_zero(method):
    torch.manual_seed(0)
    x = torch.randn(500, 4)
    x[0, 0] = -20  # decides nothing
    scales = []
    for given in (x, x.clamp(min=0)):
        quantizer = made("pact")
        quantizer(given)
        prepared = qk.prepare(nn.Linear(4, 4), qk.QConfig(None, qk.QSpec(4, quantizer="pact")))
        qk.calibrate(prepared, [given, given[:250]], method=method)
        scales.append((quantizer.scale, prepared.input_fake_quant.scale))
    assert torch.equal(scales[0][0], scales[1][0])
    tolerance = 0.3 if method in ("percentile", "entropy") else 0.02  # which count what is below zero, too
    torch.testing.assert_close(scales[0][1], scales[1][1], rtol=tolerance, atol=0)
    assert 0.5 < scales[0][1] * 15 / x.max() < 1.01


def test_lsq_plus_is_lsq_with_a_zero_point():
    torch.manual_seed(0)
    w, dy = torch.rand(4, 8) - 0.2, torch.randn(4, 8)
    results = []
    for quantizer in (
        made("lsq+", w.shape, granularity=PerChannel()),
        made("lsq", w.shape, granularity=PerChannel(), symmetric=False),
    ):
        x = w.clone().requires_grad_()
        quantizer(x).backward(dy)
        assert not quantizer.symmetric
        results.append((quantizer(x), x.grad, quantizer.log_scale.grad, quantizer.zero_point.grad))
    for ours, lsq in zip(*results, strict=True):
        assert torch.equal(ours, lsq)
    assert results[0][3].abs().max() > 0


@pytest.mark.parametrize("delta", [1e-3, 0.5])
def test_ewgs_by_formula(delta):
    torch.manual_seed(0)
    x, dy = torch.randn(6, 4), torch.randn(6, 4)
    quantizer = made("ewgs", bits=4)
    quantizer(torch.randn(50, 4))
    quantizer.disable_observer()
    assert quantizer.ewgs_delta == 1e-3
    quantizer.ewgs_delta = delta
    x.requires_grad_()
    quantizer(x).backward(dy)
    v = x.detach() / quantizer.scale
    expected = torch.where(v.abs() <= 7, dy * (1 + delta * dy.sign() * (v - v.round())), 0)
    torch.testing.assert_close(x.grad, expected)
    assert quantizer.log_scale.grad.abs() > 0


def test_ewgs_never_clips_a_followed_weight():
    torch.manual_seed(0)
    w = torch.randn(500, 3).requires_grad_()
    quantizer = made("ewgs", w.shape, 8, granularity=PerChannel())
    quantizer(w).sum().backward()
    assert (w.grad > 0.99).all()
    assert torch.equal(quantizer.quantize(w.detach())[0].abs().amax(1), torch.full((500,), 127, dtype=torch.int8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [None, (64, 48)])
def test_stochastic(shape, symmetric):
    torch.manual_seed(0)
    x = torch.randn(64, 48).requires_grad_()
    granularity = None if shape is None else PerChannel()
    quantizer = made("stochastic", shape, granularity=granularity, symmetric=symmetric)
    minmax = made("minmax", shape, granularity=granularity, symmetric=symmetric)
    nearest_codes = minmax(x).detach()
    quantizer(x)
    assert torch.equal(quantizer.scale, minmax.scale)
    step = quantizer.scale
    drawn = torch.stack([quantizer(x).detach() for _ in range(200)])
    assert ((drawn - x).abs() <= step * 1.001).all()
    assert (drawn[0] != drawn[1]).any()
    inside = (drawn.mean(0) - x).abs() / step
    assert inside.mean() < 0.04  # the mean of 200 draws is a tenth of what rounding to the nearest is off
    y = quantizer(x)
    y.backward(torch.ones_like(y))
    assert (x.grad == 1).float().mean() > 0.98
    assert torch.equal(quantizer.eval()(x), nearest_codes)
    assert torch.equal(quantizer(x), quantizer(x))
    codes, scale, zero_point = quantizer.quantize(x.detach())
    assert torch.equal(qk.dequantize(codes, scale, zero_point), nearest_codes)


def test_stochastic_draws_follow_the_seed_and_the_state():
    w = torch.randn(8, 8)

    def quantizer(seed):
        torch.manual_seed(seed)
        return made("stochastic", w.shape)

    first, again, other = quantizer(1), quantizer(1), quantizer(2)
    before = [first(w) for _ in range(3)]
    assert all(torch.equal(y, again(w)) for y in before)
    assert not torch.equal(before[0], other(w))
    other.load_state_dict(first.state_dict())
    assert all(torch.equal(first(w), other(w)) for _ in range(3))
    state = torch.random.get_rng_state()
    qk.QSpec(quantizer="stochastic")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_gradient_of_a_draw_is_its_own():
    """Two forward passes before the first backward pass: each masks what itself has clipped."""
    x = torch.full((4096,), 7.5).requires_grad_()
    quantizer = made("stochastic")
    quantizer.scale = 1.0
    first, second = quantizer(x + 0.0), quantizer(x + 0.0)
    gradients = []
    for y in (second, first):
        x.grad = None
        y.sum().backward()
        gradients.append(x.grad)
    assert (first.detach() == 7).all()
    assert all(0.4 < g.mean() < 0.6 for g in gradients)
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_kmeans_by_formula(granularity):
    torch.manual_seed(0)
    w = torch.randn(8, 12).requires_grad_()
    dy = torch.randn(8, 12)
    quantizer = made("kmeans", w.shape, 3, granularity=granularity)
    y = quantizer(w)
    y.backward(dy)
    rows, back = blocks(w.detach(), granularity)
    scale = rows.abs().amax(1, keepdim=True)
    levels = quantizer.levels.detach()
    assert isinstance(quantizer.levels, nn.Parameter)
    index = ((rows / scale).unsqueeze(-1) - levels).abs().argmin(-1)
    torch.testing.assert_close(y.detach(), back(levels[index] * scale))
    assert torch.equal(w.grad, dy)
    terms = (blocks(dy, granularity)[0] * scale).reshape(-1)
    expected = torch.zeros(8).index_add_(0, index.reshape(-1), terms)
    torch.testing.assert_close(quantizer.levels.grad, expected)
    for k in range(8):  # a minimum of Lloyd's: each level is the mean of what is rounded to it
        torch.testing.assert_close(levels[k], (rows / scale)[index == k].mean())


def test_ternary_has_integers_and_converts():
    torch.manual_seed(0)
    model, x = nn.Linear(32, 8), torch.randn(16, 32)
    spec = qk.QSpec(2, quantizer="ternary")
    prepared = qk.prepare(model, qk.QConfig(spec, qk.QSpec(8, symmetric=False)))
    qk.calibrate(prepared, [x])
    quantizer = prepared.weight_fake_quant
    torch.testing.assert_close(quantizer.scale, model.weight.detach().abs().mean(1, keepdim=True))
    prepared.eval()
    torch.testing.assert_close(qk.convert(prepared)(x), prepared(x))
    with torch.no_grad():
        prepared.weight.mul_(3)
    torch.testing.assert_close(quantizer.scale * 3, quantizer.qparams(prepared.weight)[0])
    for method in ("minmax", "moving_average", "percentile", "mse", "lsq"):
        qk.calibrate(prepared, [x], method=method)
        prepared(x)
        torch.testing.assert_close(quantizer.qparams(prepared.weight)[0], prepared.weight.abs().mean(1, keepdim=True))
    qk.freeze_observers(prepared)
    assert torch.equal(quantizer.scale, quantizer.qparams(prepared.weight)[0])


@pytest.mark.parametrize("name", WEIGHTS)
def test_zeros_and_empty_and_strided_weights(name):
    torch.manual_seed(0)
    w = torch.randn(6, 8)
    w[2] = 0
    quantizer = made(name, w.shape, granularity=PerChannel())
    y = quantizer(w)
    assert y.isfinite().all()
    if name not in ("dorefa", "midrise", "kmeans", "po2"):
        assert (y[2] == 0).all()
    quantizer.eval()
    y = quantizer(w)
    assert torch.equal(quantizer(w.t().contiguous().t()), y)
    padded = torch.zeros(6, 16)
    padded[:, ::2] = w
    if name != "dynamic":
        assert torch.equal(quantizer(padded[:, ::2]), y)


@pytest.mark.parametrize("name", [name for name in INPUTS if name != "dynamic"])
def test_empty_inputs(name):
    quantizer = made(name)
    assert quantizer(torch.empty(0, 4)).shape == (0, 4)
    assert not quantizer.is_calibrated
    x = torch.randn(3, 4)
    before = quantizer(x).detach()
    assert quantizer(torch.empty(0, 4)).shape == (0, 4)
    if name not in ("stochastic", "ema"):
        assert torch.equal(quantizer.eval()(x), before)
    assert quantizer.train()(x.reshape(-1)[:1]).numel() == 1
    fresh = made(name).eval()
    if name != "ema":
        with pytest.raises(RuntimeError, match=f'this "{name.replace("+", ".")}" quantizer has no scale yet'):
            fresh(x)
