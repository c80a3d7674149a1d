"""torch.func's transforms and forward mode over every differentiable function: values and derivatives are eager's."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import qkernels as qk

X = torch.tensor(
    [[-9.0, -1.26, -0.9, -0.0, 0.0, 0.04, 0.6, 1.3], [2.4, -3.3, 0.05, -0.05, 7.0, 0.31, -0.62, 1.1]],
    dtype=torch.float32,
)
STEP, ROWS = torch.tensor(0.3), torch.tensor([[0.3], [0.7]])
POINT, POINTS = torch.tensor(0.6), torch.tensor([[0.6], [-1.4]])
RANGE = {"quant_min": -4, "quant_max": 3}
CHANNELS = torch.tensor([0.3, 0.7]), torch.tensor([0.6, -1.4])
SEEN = [torch.ones(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)]


def variant(name):
    def call(x, scale, zero_point):
        return qk.fake_quantize(x, scale, zero_point, **RANGE, straight_through=name, ewgs_delta=0.2, grad_factor=0.5)

    return call


def foreach(x, scale, other):
    return torch.cat([y.flatten() for y in qk.foreach_fake_quantize([x, other], [scale, STEP], **RANGE)])


CASES = {
    "scale": (functools.partial(qk.fake_quantize, zero_point=1, **RANGE), X, STEP),
    "number": (lambda x: qk.fake_quantize(x, 0.3, 1, **RANGE), X),
    "rows": (variant("clip"), X, ROWS, POINTS),
    "shared zero point": (variant("clip"), X, ROWS, POINT),
    "pass": (variant("pass"), X, ROWS, POINTS),
    "pact": (variant("pact"), X, ROWS, POINTS),
    "bf16": (variant("clip"), X.bfloat16(), ROWS, POINTS),
    "fp64": (variant("clip"), X.double(), ROWS.double(), POINTS.double()),
    "dynamic": (qk.fake_quantize_dynamic, X),
    "dynamic groups": (functools.partial(qk.fake_quantize_dynamic, bits=3, group_size=4, symmetric=False), X),
    "dynamic tensor": (functools.partial(qk.fake_quantize_dynamic, bits=3, group_size=None), X),
    "dynamic scales": (lambda x: qk.fake_quantize_dynamic(x, bits=4, return_qparams=True)[0], X),
    "codebook": (functools.partial(qk.fake_quantize_codebook, grad_factor=0.5), X, ROWS, torch.tensor([1.0, -1, 0, 4])),
    "stochastic": (
        lambda x, s, z: qk.fake_quantize_stochastic(x, s, z, **RANGE, seed=3, grad_factor=0.5), X, ROWS, POINTS
    ),
    "foreach": (foreach, X, ROWS, X + 1),
    "relu": (lambda x, s, z: qk.relu_fake_quantize(x, s, z, **RANGE, grad_factor=0.5), X, ROWS, POINTS),
    "relu number": (lambda x: qk.relu_fake_quantize(x, 0.3, **RANGE), X),
    "rms_norm": (qk.rms_norm_fake_quantize_dynamic, X, torch.linspace(0.5, 2, 8)),
    "rms_norm alone": (functools.partial(qk.rms_norm_fake_quantize_dynamic, bits=4, symmetric=False), X),
    "silu_mul": (functools.partial(qk.silu_mul_fake_quantize_dynamic, bits=4, symmetric=False), X, X.flip(0)),
    "per tensor": (lambda x: qk.fake_quantize_per_tensor_affine(x, 0.3, 1, -4, 3), X),
    "per tensor, tensors": (
        lambda x: qk.fake_quantize_per_tensor_affine(x, STEP, torch.tensor(1), -4, 3), X
    ),
    "per channel": (lambda x: qk.fake_quantize_per_channel_affine(x, *CHANNELS, 0, -4, 3), X),
    "learnable per tensor": (
        lambda x, s, z: qk.fake_quantize_learnable_per_tensor_affine(x, s, z, -4, 3, 0.5), X, STEP[None], POINT[None]
    ),
    "learnable per channel": (
        lambda x, s, z: qk.fake_quantize_learnable_per_channel_affine(x, s, z, 0, -4, 3, 0.5), X, *CHANNELS
    ),
    "dequantize": (
        lambda s, z: qk.dequantize(torch.arange(16, dtype=torch.int8).view(2, 8), s, z), ROWS, POINTS
    ),
    "dequantize_codebook": (
        lambda s, c: qk.dequantize_codebook(torch.arange(16, dtype=torch.uint8).view(2, 8) % 4, s, c),
        ROWS, torch.tensor([1.0, -1, 0, 4]),
    ),
}  # fmt: skip
EWGS = {"ewgs": (variant("ewgs"), X, ROWS, POINTS)}
parametrize = functools.partial(pytest.mark.parametrize, argnames="name")


def eager(function, *primals, cotangent):
    leaves = [t.clone().requires_grad_() for t in primals]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)


def close(a, b, tolerance=1e-5):
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=tolerance if a.dtype != torch.bfloat16 else 1e-2, atol=tolerance)


def cotangents(y):
    return torch.linspace(-1, 1.5, y.numel(), dtype=torch.float32).view(y.shape).to(y.dtype)


@parametrize(argvalues=[*CASES, *EWGS])
def test_reverse_mode_is_eagers(name):
    function, *primals = {**CASES, **EWGS}[name]
    u = cotangents(function(*primals))
    y, expected = eager(function, *primals, cotangent=u)
    value, pull = vjp(function, *primals)
    assert value.dtype == y.dtype
    if "rms" in name:  # the sum of squares may be added in another order
        close(value, y)
    else:
        assert torch.equal(value, y)
        assert torch.equal(value.signbit(), y.signbit())
    for got, want in zip(pull(u), expected, strict=True):
        close(got, want)


@parametrize(argvalues=CASES)
def test_forward_mode_is_the_transpose_of_reverse_mode(name):
    function, *primals = CASES[name]
    tangents = [torch.linspace(1, 2, t.numel()).view(t.shape).to(t.dtype) for t in primals]
    y, tangent = jvp(function, tuple(primals), tuple(tangents))
    u = cotangents(y)
    value, expected = eager(function, *primals, cotangent=u)
    total = sum((d.double() * t.double()).sum() for d, t in zip(expected, tangents, strict=True))
    assert total != 0
    close((tangent.double() * u.double()).sum(), total, 2e-2 if y.dtype == torch.bfloat16 else 1e-4)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        dual = forward_ad.unpack_dual(function(*duals))
    close(dual.primal, value)
    close(dual.tangent, tangent)


@parametrize(argvalues=[*CASES, *EWGS])
def test_vmap_is_a_loop(name):
    function, *primals = {**CASES, **EWGS}[name]
    many = [torch.stack([t, t * 1.25, t * 0.5]) for t in primals]
    expected = torch.stack([function(*sample) for sample in zip(*many, strict=True)])
    close(vmap(function)(*many), expected)
    u = cotangents(expected)

    def gradients(u, *sample):
        return vjp(function, *sample)[1](u)

    got = vmap(gradients)(u, *many)
    for i in range(3):
        _, want = eager(function, *(t[i] for t in many), cotangent=u[i])
        for a, b in zip(got, want, strict=True):
            close(a[i], b)


@parametrize(argvalues=["rows", "pass", "codebook", "stochastic", "dynamic groups", "rms_norm", "silu_mul", "foreach"])
def test_jacobians(name):
    function, *primals = CASES[name]
    every = tuple(range(len(primals)))
    for forward, backward in zip(
        jacfwd(function, every)(*primals), jacrev(function, every)(*primals), strict=True
    ):  # fmt: skip
        close(forward, backward)


def test_hessian():
    """Zero in x, as eager's; scale and zero point meet where values are clipped, to (bound − zero point)·scale."""

    def total(x, scale, zero_point):
        return qk.fake_quantize(x, scale, zero_point, **RANGE).sum()

    blocks = hessian(total, (0, 1, 2))(X[0], STEP, POINT)
    clipped = ((X[0] / STEP).round() + 1 > 3).sum() + ((X[0] / STEP).round() + 1 < -4).sum()
    assert clipped > 0
    expected = [[0, 0, 0], [0, 0, -clipped], [0, -clipped, 0]]
    for row, values in zip(blocks, expected, strict=True):
        for block, value in zip(row, values, strict=True):
            assert torch.equal(block, torch.full_like(block, value))
    smooth = hessian(lambda x: qk.fake_quantize(x, STEP, **RANGE).square().sum())(X[0])
    steps = (X[0] / STEP).round()
    assert torch.equal(smooth, torch.diag(2.0 * ((steps >= -4) & (steps <= 3))))


def test_ewgs_has_no_forward_mode():
    function, *primals = EWGS["ewgs"]
    with pytest.raises(RuntimeError, match='straight_through: got "ewgs" in forward mode; accepted: reverse mode'):
        jvp(function, tuple(primals), tuple(primals))


def test_special_values_keep_their_bits():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, -0.1, 3e38])
    for name in ("clip", "pass", "pact", "ewgs"):
        f = functools.partial(qk.fake_quantize, scale=STEP, **RANGE, straight_through=name)
        got = vmap(f)(x[None])[0]
        assert got.view(torch.int32).equal(f(x).view(torch.int32))
        if name != "pass":
            _, (want,) = eager(f, x, cotangent=torch.ones_like(x))
            assert torch.equal(grad(lambda x, f=f: f(x).sum())(x), want)


def statistics():
    return [torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32)]


def test_observer():
    def call(x, stats):
        return qk.observe_fake_quantize(
            x, *SEEN, *stats, averaging_const=0.5, quant_min=-4, quant_max=3, symmetric=False
        )

    expected, got, again = statistics(), statistics(), statistics()
    y, (want,) = eager(lambda x: call(x, expected), X, cotangent=torch.ones_like(X))
    value, pull = vjp(lambda x: call(x, got), X)
    assert torch.equal(value, y)
    assert torch.equal(pull(torch.ones_like(X))[0], want)
    assert torch.equal(jvp(lambda x: call(x, again), (X,), (torch.ones_like(X),))[1], want)
    for a, b, c in zip(got, expected, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="x: got a batch of vmap where moving averages are updated in place"):
        vmap(lambda x: call(x, got))(X[None])


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    )  # fmt: skip


CONFIGS = {
    "default": qk.QConfig(),
    "lsq, 4 bits, zero points": qk.QConfig(
        weight=qk.QSpec(4, granularity=qk.PerChannel()), input=qk.QSpec(4, symmetric=False)
    ),
    "minmax": qk.QConfig(weight=qk.QSpec(4, quantizer="minmax"), input=qk.QSpec(4, quantizer="minmax")),
    "dynamic": qk.QConfig(weight=qk.QSpec(4, quantizer="dynamic"), input=qk.QSpec(4, quantizer="dynamic")),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_per_sample(config, training):
    torch.manual_seed(1)
    x, target = torch.randn(5, 2, 4, 4), torch.tensor([0, 1, 2, 1, 0])
    prepared = qk.prepare(model(), CONFIGS[config])
    qk.calibrate(prepared, [x])
    prepared.train(training)
    if config == "lsq, 4 bits, zero points":
        qk.freeze_observers(prepared)  # inputs grow with one sample's magnitude, but not under torch.func
    params = dict(prepared.named_parameters())

    def loss(params, x, target):
        return torch.nn.functional.cross_entropy(functional_call(prepared, params, (x[None],)), target[None])

    got = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, target)
    for i in range(5):
        want = torch.autograd.grad(loss(params, x[i], target[i]), list(params.values()))
        for name, expected in zip(params, want, strict=True):
            close(got[name][i], expected, 1e-4)
    tangents = {name: torch.randn_like(t) for name, t in params.items()}
    direction = jvp(lambda params: loss(params, x[0], target[0]), (params,), (tangents,))[1]
    close(direction, sum((got[name][0] * tangents[name]).sum() for name in params), 1e-4)


def test_moving_averages_of_a_model():
    x = torch.randn(5, 2, 4, 4)
    spec = qk.QSpec(4, quantizer="ema")
    prepared = qk.prepare(model(), qk.QConfig(weight=spec, input=spec)).train()
    params, before = dict(prepared.named_parameters()), {k: t.clone() for k, t in prepared.named_buffers()}

    def loss(params, x):
        return functional_call(prepared, params, (x,)).square().sum()

    got = grad(loss)(params, x)
    after = {name: t.clone() for name, t in prepared.named_buffers()}
    prepared.load_state_dict(before, strict=False)
    want = torch.autograd.grad(loss(params, x), list(params.values()))
    for name, expected in zip(params, want, strict=True):
        close(got[name], expected, 1e-4)
    for name, buffer in prepared.named_buffers():
        assert torch.equal(buffer, after[name])
    with pytest.raises(RuntimeError, match="x: got a batch of vmap where moving averages"):
        vmap(grad(loss), in_dims=(None, 0))(params, x[:, None])


MODES = [("int8", "int8", "int8"), ("int8", "float", "float"), ("float", "int8", "int8"), ("float", "float", "int8")]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("modes", MODES)
def test_int8_training_linear(modes, seed):
    torch.manual_seed(0)
    x, w, bias = torch.randn(3, 2, 4, 32), torch.randn(8, 32), torch.randn(8)
    names = dict(zip(("output", "grad_input", "grad_weight"), modes, strict=True))

    def loss(w, bias, x):
        return qk.int8_training_linear(x, w, bias, **names, seed=seed, offset=2).square().sum()

    every = (0, 1, 2)
    got = vmap(grad(loss, every), (None, None, 0))(w, bias, x)
    for i in range(3):
        leaves = [t.clone().requires_grad_() for t in (w, bias, x[i])]
        for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            close(a[i], b)
    with pytest.raises(RuntimeError, match="got forward mode; accepted: reverse mode"):
        jvp(lambda x: loss(w, bias, x), (x[0],), (x[0],))
    for second in (jacrev(grad(loss)), jacfwd(grad(loss)), jacrev(grad(loss, 2))):
        with pytest.raises(RuntimeError, match=r"accepted: (first derivatives|reverse mode)"):
            second(w, bias, x[0])


def test_int8_training_module():
    torch.manual_seed(0)
    layer = qk.nn.Int8TrainingLinear.from_float(torch.nn.Linear(32, 8)).train()
    params, x = dict(layer.named_parameters()), torch.randn(3, 32)
    got = vmap(grad(lambda p, x: functional_call(layer, p, (x,)).square().sum()), (None, 0))(params, x)
    for i in range(3):
        want = torch.autograd.grad(layer(x[i]).square().sum(), list(params.values()))
        for a, b in zip(got.values(), want, strict=True):
            close(a[i], b)
