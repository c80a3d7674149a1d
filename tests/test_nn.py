"""FakeQuantize against fp64 autograd and hand computation; int8 layers against integer arithmetic in fp64."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

from qkernels.nn import FakeQuantize, Int8Conv2d, Int8Linear, PerChannel, PerGroup, PerTensor, PerToken, QATLinear
from qkernels.nn.ranges import block_statistics

KINDS = ("lsq", "minmax", "ema", "dynamic")


def calibrated(x: torch.Tensor, **options) -> FakeQuantize:
    quantizer = FakeQuantize(**options)
    if quantizer.quantizer != "dynamic":
        quantizer.set_range(*block_statistics(x, quantizer.scale.shape))
    return quantizer


def expand(param: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    for dim, (blocks, size) in enumerate(zip(param.shape, x.shape, strict=False)):
        if 1 < blocks < size:
            param = param.repeat_interleave(size // blocks, dim)
    return param


def oracle(x, scale, zero_point, quant_min, quant_max, straight_through="clip"):
    """Fake quantization in plain fp64 autograd with straight-through rounding."""

    def straight(value, target):
        return value + (target - value).detach()

    s, z = expand(scale, x), expand(zero_point, x)
    z = straight(z, z.round().clamp(quant_min, quant_max))
    t = x / s
    q = straight(t, t.round()) + z
    if straight_through == "lsq":
        inside = (t + z > quant_min) & (t + z < quant_max)
    else:
        inside = (q >= quant_min) & (q <= quant_max)
    return (torch.where(inside, q, q.detach().clamp(quant_min, quant_max)) - z) * s


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerTensor(), None),
        (PerTensor(), (6, 24)),
        (PerChannel(0), (6, 24)),
        (PerChannel(1), (6, 24)),
        (PerGroup(8), (6, 24)),
    ],
)
@pytest.mark.parametrize("straight_through", ["lsq", "clip"])
def test_lsq_gradients(bits, symmetric, granularity, shape, straight_through):
    torch.manual_seed(bits)
    x = torch.randn(6, 24)
    quantizer = calibrated(
        x, bits=bits, symmetric=symmetric, granularity=granularity, shape=shape, straight_through=straight_through
    )
    start = quantizer.scale * torch.empty_like(quantizer.scale).uniform_(0.5, 0.8)  # some elements clip on either side
    quantizer.scale = start
    with torch.no_grad():
        quantizer.log_scale.uniform_(0.05, 0.2)  # a weight of 8 bits covers at least its range
        if not symmetric:
            quantizer.zero_point.add_(0.3)
    x.requires_grad_()
    dy = torch.randn(6, 24)
    y = quantizer(x)
    y.backward(dy)

    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    scale = (start.double() * (quantizer.log_scale.detach().double() / math.sqrt(steps)).exp()).requires_grad_()
    torch.testing.assert_close(quantizer.scale.double(), scale.detach(), rtol=1e-6, atol=0)
    scale = quantizer.scale.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    zero_point = torch.zeros_like(scale) if symmetric else quantizer.zero_point.detach().double()
    zero_point.requires_grad_()
    expected = oracle(x64, scale, zero_point, quantizer.quant_min, quantizer.quant_max, straight_through)
    expected.backward(dy.double())
    numel = 24 if shape is None else x.numel() // scale.numel()
    factor = 1 / math.sqrt(numel * steps)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x.grad.double(), x64.grad)
    assert 0 < (x.grad == 0).float().mean() < 0.9
    dlog = scale.grad * factor * 2 / (start.double() * math.sqrt(steps))
    torch.testing.assert_close(quantizer.log_scale.grad.double(), dlog, rtol=1e-4, atol=1e-5 / float(start.min()))
    if not symmetric:
        torch.testing.assert_close(quantizer.zero_point.grad.double(), zero_point.grad * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("feature_dims", "shape"), [(1, (8, 5, 12)), (3, (8, 3, 4, 4))])
def test_lsq_scale_gradient_does_not_depend_on_batch_size(feature_dims, shape):
    torch.manual_seed(0)
    x, dy = torch.randn(shape), torch.randn(shape)
    grads = []
    for repeats in (1, 3):
        quantizer = calibrated(x, bits=3, symmetric=False, feature_dims=feature_dims)
        many = torch.cat([x] * repeats)
        quantizer(many).backward(torch.cat([dy] * repeats) / repeats)  # as a loss that averages over the batch
        grads.append(quantizer.log_scale.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_set_range_by_hand():
    low, high, mean = torch.tensor([-1.0]), torch.tensor([3.0]), torch.tensor([0.5])
    quantizer = FakeQuantize(bits=8, quantizer="minmax", symmetric=False)
    quantizer.set_range(low, high, mean)
    assert quantizer.scale.item() == pytest.approx(4 / 255)
    assert quantizer.zero_point.item() == -128 + 64  # round(1 / (4/255)) = round(63.75)
    quantizer = FakeQuantize(bits=8, quantizer="minmax")
    quantizer.set_range(low, high, mean)
    assert quantizer.scale.item() == pytest.approx(3 / 127)
    assert quantizer.zero_point is None
    quantizer = FakeQuantize(bits=8)  # min-max is the finer scale at 8 bits
    quantizer.set_range(low, high, mean)
    assert quantizer.scale.item() == pytest.approx(3 / 127)
    quantizer = FakeQuantize(bits=2)
    quantizer.set_range(low, high)
    assert quantizer.scale.item() == pytest.approx(3.0)
    quantizer.set_range(low, high, mean)  # ternary: LSQ's 2·mean/sqrt(1)
    assert quantizer.scale.item() == pytest.approx(1.0)
    assert (quantizer.quant_min, quantizer.quant_max) == (-1, 1)


def test_dead_channel_gives_zeros():
    w = torch.randn(3, 8)
    w[1] = 0
    for kind in KINDS:
        y = calibrated(w, granularity=PerChannel(), shape=w.shape, quantizer=kind)(w)
        assert torch.equal(y[1], torch.zeros(8)), kind
        assert torch.isfinite(y).all(), kind


@pytest.mark.parametrize("symmetric", [True, False])
def test_ema_by_hand(symmetric):
    torch.manual_seed(0)
    quantizer = FakeQuantize(bits=4, quantizer="ema", symmetric=symmetric)
    assert not quantizer.is_calibrated
    assert quantizer(torch.randn(3)).isfinite().all()  # training mode: the first batch starts the statistics
    quantizer = FakeQuantize(bits=4, quantizer="ema", symmetric=symmetric)
    assert quantizer.eval()(torch.randn(3)).isnan().all()
    quantizer.train()
    low = high = None
    for _ in range(5):
        x = torch.randn(40) + 0.5
        y = quantizer(x)
        batch_low, batch_high = x.min().double(), x.max().double()
        low = batch_low if low is None else low + 0.01 * (batch_low - low)
        high = batch_high if high is None else high + 0.01 * (batch_high - high)
    assert quantizer.is_calibrated
    torch.testing.assert_close(quantizer.running_min.double(), low.reshape(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer.running_max.double(), high.reshape(1), rtol=1e-6, atol=0)
    if symmetric:
        scale, zero_point = max(-low, high) / 7, torch.tensor(0.0)
    else:
        scale = (high - low) / 15
        zero_point = -8 - (low / scale).round()
    expected = oracle(x.double(), scale.reshape(1), zero_point.double().reshape(1), quantizer.quant_min, 7)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    state = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(100 * x)
    assert all(torch.equal(state[key], value) for key, value in quantizer.state_dict().items())
    quantizer.train()
    quantizer.observer_on.zero_()
    quantizer(100 * x)
    assert torch.equal(quantizer.running_max, state["running_max"])
    quantizer.fake_quant_on.zero_()
    assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_state_dict_round_trip(kind, symmetric):
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    options = {"bits": 5, "quantizer": kind, "symmetric": symmetric, "granularity": PerChannel(), "shape": x.shape}
    quantizer = calibrated(x, **options).eval()
    fresh = FakeQuantize(**options).eval()
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(x), quantizer(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
    if kind in ("lsq", "minmax"):
        options |= {"granularity": PerTensor(), "shape": None}
        fresh = calibrated(x, **options).eval()
        fresh.load_state_dict(FakeQuantize(**options).state_dict())
        with pytest.raises(RuntimeError, match=r"qk\.calibrate"):
            fresh(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()])
def test_codes_are_those_behind_forward(kind, granularity):
    w = torch.randn(6, 3, 3, 3)
    for symmetric in (True, False):
        quantizer = calibrated(
            w, bits=3, quantizer=kind, granularity=granularity, shape=w.shape, symmetric=symmetric
        ).eval()
        codes, scale, zero_point = quantizer.quantize(w)
        zero_point = 0 if zero_point is None else zero_point
        assert codes.dtype == torch.int8
        assert codes.min() >= quantizer.quant_min
        assert codes.max() <= quantizer.quant_max
        assert torch.equal((codes.float() - zero_point) * scale, quantizer(w))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_fullgraph_without_recompiles(kind, training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x = torch.randn(8, 32)
    linear = nn.Linear(32, 5)
    eager = QATLinear.from_float(
        linear,
        weight=calibrated(linear.weight, granularity=PerChannel(), shape=(5, 32), quantizer=kind),
        input=calibrated(x, symmetric=False, quantizer=kind),
    ).train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch in (8, 3, 11):
        x = torch.randn(batch, 32)
        ys, grads = [], []
        for module, source in ((eager, eager), (compiled, other)):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.square().sum().backward()
            ys.append(y)
            grads.append([leaf.grad, *(p.grad for p in source.parameters())])
            source.zero_grad()
        torch.testing.assert_close(ys[0], ys[1])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    for a, b in zip(eager.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind):
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    first, second = nn.Linear(16, 16), nn.Linear(16, 4)
    # Calibrated on this very batch: its second visit, when it is recomputed, moves no statistics of "ema".
    quantizer = calibrated(first(x).tanh(), symmetric=False, quantizer=kind)
    model = nn.Sequential(first, nn.Tanh(), quantizer, second)
    results = []
    for recompute in (False, True):
        copied = copy.deepcopy(model)
        y = checkpoint(copied, x, use_reentrant=False) if recompute else copied(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in copied.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_one_quantizer_called_twice_in_a_step():
    x = torch.randn(4, 8)
    quantizer = calibrated(x, symmetric=False)
    (quantizer(x) + quantizer(2 * x)).sum().backward()
    assert quantizer.log_scale.grad.isfinite().all()
    assert quantizer.log_scale.grad.any()


def test_learned_scale_recovers_from_an_optimizer_that_ran_away():
    x = torch.randn(4, 8)
    for training in (True, False):
        quantizer = calibrated(x, symmetric=False).train(training)
        start = quantizer.scale.clone()
        with torch.no_grad():
            quantizer.log_scale.fill_(-1e6)
            quantizer.zero_point.fill_(1000)
        torch.testing.assert_close(quantizer.scale, start / 1024)
        y = quantizer(x)
        assert y.isfinite().all()
        y.sum().backward()
        assert quantizer.zero_point.item() == 127
        assert quantizer.log_scale.grad.item() != 0


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_model_keeps_the_quantizers_in_fp32(kind):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    linear = nn.Linear(32, 8)
    layer = QATLinear.from_float(
        linear,
        weight=calibrated(linear.weight, granularity=PerChannel(), shape=(8, 32), quantizer=kind),
        input=calibrated(x, symmetric=False, quantizer=kind),
    )
    expected = copy.deepcopy(layer)(x)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    before, after = layer.state_dict(), half.state_dict()
    for key in before:
        if "fake_quant" in key:
            assert torch.equal(before[key], after[key]), key
            assert before[key].dtype == after[key].dtype, key
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.double()(x.double()).dtype == torch.float64


def test_float_state_dict_loads_and_prepared_one_adds_only_quantizers():
    linear = nn.Linear(8, 4)
    layer = QATLinear.from_float(linear, input=FakeQuantize(quantizer="minmax"))
    assert layer.weight is linear.weight
    assert type(linear) is nn.Linear
    assert set(layer.state_dict()) - set(linear.state_dict()) == {
        f"input_fake_quant.{key}" for key in ("scale", "bits", "calibrated", "observer_on", "fake_quant_on", "frozen")
    }
    assert layer.load_state_dict(linear.state_dict(), strict=False).unexpected_keys == []
    with pytest.raises(TypeError, match="accepted: Linear"):
        QATLinear.from_float(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits: got 9"),
        ({"quantizer": "pack"}, "quantizer: got 'pack'"),
        ({"granularity": PerChannel()}, "shape: got None"),
        ({"granularity": PerChannel(2), "shape": (3, 4)}, "an axis of the tensor"),
        ({"granularity": PerGroup(5), "shape": (3, 4)}, "divides the last dim, 4"),
        ({"granularity": PerToken()}, 'quantizer="dynamic"'),
        ({"granularity": PerChannel(2), "quantizer": "dynamic", "shape": (3, 4)}, "an axis of the tensor"),
        ({"granularity": PerGroup(3), "quantizer": "dynamic", "shape": (3, 4)}, "divides the last dim, 4"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FakeQuantize(**options)


def test_int8_linear_from_float_by_hand():
    torch.manual_seed(0)
    linear = nn.Linear(40, 7)
    x = torch.randn(2, 3, 40)
    layer = Int8Linear.from_float(linear)
    weight_scale = linear.weight.abs().amax(1) / 127
    codes = (linear.weight / weight_scale[:, None]).round()
    assert torch.equal(layer.codes, codes.to(torch.int8))
    input_scale = x.abs().amax(-1, keepdim=True) / 127
    acc = (x / input_scale).round().double() @ codes.double().t()
    expected = acc * weight_scale * input_scale + linear.bias
    torch.testing.assert_close(layer(x).double(), expected.double(), rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        assert layer(x.to(dtype)).dtype == dtype
    with torch.no_grad():
        linear.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="weight: got NaN"):
        Int8Linear.from_float(linear)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": "same", "kernel_size": 4},
        {"padding": 2, "dilation": 2, "groups": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": (2, 1), "padding_mode": "reflect", "kernel_size": (5, 3)},
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_conv2d_by_hand(geometry, symmetric):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **{"kernel_size": 3, **geometry})
    x = torch.randn(3, 4, 9, 8) + 0.5
    layer = Int8Conv2d.like(conv, input=FakeQuantize(quantizer="dynamic", symmetric=symmetric))
    quantized = Int8Conv2d.from_float(conv)
    layer.set_weight(quantized.codes, quantized.scale, conv.bias)
    simulated = copy.deepcopy(conv).double()
    weight_scale = (conv.weight.abs().amax((1, 2, 3)) / 127).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        simulated.weight.copy_((conv.weight / weight_scale).round() * weight_scale)
    if symmetric:
        scale, zero_point = x.abs().max() / 127, 0
    else:
        scale = (x.max() - x.min()) / 255
        zero_point = -128 - (x.min() / scale).round()
    expected = simulated((((x / scale).round() + zero_point).clamp(-128, 127) - zero_point).double() * scale)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert layer(x).stride() == conv(x).stride()
    last = x.to(memory_format=torch.channels_last)
    assert layer(last).stride() == conv(last).stride()
    assert torch.equal(layer(last), layer(x))
    if not isinstance(geometry.get("padding"), str):
        torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


@pytest.mark.parametrize(
    "layer", [Int8Linear(6, 5), Int8Conv2d(4, 6, 3, groups=2, input=FakeQuantize(symmetric=False))]
)
def test_int8_state_dict_is_logical(layer):
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, layer.weight_shape, dtype=torch.int8)
    n = codes.shape[0]
    layer.set_weight(codes, torch.rand(n), torch.randn(n))
    state = layer.state_dict()
    static = {"input_scale", "input_zero_point"} if isinstance(layer, Int8Conv2d) else set()
    assert set(state) == {"codes", "codes_form", "scale", "bias"} | static
    assert torch.equal(state["codes"], codes)
    fresh = copy.deepcopy(layer)
    fresh.set_weight(torch.zeros_like(codes), torch.ones(n), torch.zeros(n))
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(2, 6) if isinstance(layer, Int8Linear) else torch.randn(2, 4, 5, 5)
    assert torch.equal(fresh(x), layer(x))
    assert not any(t.is_floating_point() and t.numel() >= codes.numel() for t in layer.buffers())
    for key in ("codes", "scale"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            fresh.load_state_dict({name: value for name, value in state.items() if name != key})
    with pytest.raises(RuntimeError, match=r"codes: got torch\.float32"):
        fresh.load_state_dict({**state, "codes": codes.float()})
    with pytest.raises(RuntimeError, match=r"codes: got .* accepted: torch\.int8 of shape"):
        fresh.load_state_dict({**state, "codes": codes[1:]})
    with pytest.raises(RuntimeError, match=r"scale: got .* accepted: torch\.float32 of shape"):
        fresh.load_state_dict({**state, "scale": torch.rand(n + 1)})
    half = copy.deepcopy(layer).bfloat16()
    assert half.scale.dtype == torch.float32
    with torch.no_grad():
        layer.bias.copy_(half.bias)
    assert torch.equal(half(x), layer(x))


def test_int8_layers_compile_fullgraph():
    torch._dynamo.reset()
    x = torch.randn(2, 4, 6, 6)
    model = nn.Sequential(
        Int8Conv2d.from_float(nn.Conv2d(4, 8, 3, padding=1)), nn.Flatten(), Int8Linear.from_float(nn.Linear(288, 3))
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_empty_batch():
    layer = QATLinear.from_float(nn.Linear(4, 2), input=calibrated(torch.randn(8), symmetric=False))
    layer(torch.empty(0, 4)).sum().backward()
    assert torch.equal(layer.input_fake_quant.log_scale.grad, torch.zeros(1))
    assert Int8Linear.from_float(nn.Linear(4, 2))(torch.empty(0, 4)).shape == (0, 2)
