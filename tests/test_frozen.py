"""Gradients through layers on integer weights: those of the float layer on the dequantized weight, and nothing kept."""

import copy

import pytest
import torch
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.ops import frozen

STATIC = {"input_scale": torch.tensor(0.02), "input_zero_point": torch.tensor(3)}
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def close(a, b, rounding=2e-5):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    largest = float(b.float().abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a.float(), b.float(), rtol=rounding, atol=rounding * max(largest, 1))


def codes(n, k, bits):
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k), dtype=torch.int8)


def packed8(n, k):
    packed = qk.PackedInt8.from_quantized(codes(n, k, 8), torch.rand(n) * 0.01)
    q, scale = packed.unpack()
    return packed, q.float() * scale[:, None]


def packed4(n, k, kind, group_size=32, scale_dtype=torch.float32):
    groups = k // group_size
    scale = ((torch.rand(n, groups) - 0.3) * 0.1).to(scale_dtype)  # GGUF has negative ones
    extra = {
        "zero_point": {"zero_point": codes(n, groups, 4)},
        "minimum": {"minimum": (torch.randn(n, groups) * 0.1).to(scale_dtype)},
    }.get(kind, {})
    packed = qk.PackedInt4.from_quantized(codes(n, k, 4), scale, **extra)
    return packed, packed.dequantize()


LINEARS = {
    "int8 dynamic": (lambda n, k: packed8(n, k), qk.int8_linear, {}),
    "int8 static": (lambda n, k: packed8(n, k), qk.int8_linear, STATIC),
    "int8 static 4 bits": (lambda n, k: packed8(n, k), qk.int8_linear, {**STATIC, "quant_min": -8, "quant_max": 7}),
    "int4 symmetric": (lambda n, k: packed4(n, k, None), qk.int4_linear, {}),
    "int4 zero points": (lambda n, k: packed4(n, k, "zero_point"), qk.int4_linear, {"act_bits": 16}),
    "int4 minima": (lambda n, k: packed4(n, k, "minimum", scale_dtype=torch.float16), qk.int4_linear, {"act_bits": 16}),
    "int4 rows, static": (lambda n, k: packed4(n, k, "zero_point", k), qk.int4_linear, STATIC),
}


def model_of(x, w, bias, options, activation=None):
    """The float layer behind the fake quantization of its input, in fp32."""
    if "input_scale" in options:
        x = qk.fake_quantize(
            x, options["input_scale"], options["input_zero_point"], quant_min=options.get("quant_min", -128),
            quant_max=options.get("quant_max", 127),
        )  # fmt: skip
    return ACTIVATIONS[activation](F.linear(x.float(), w, bias.float()))


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("n", [1, 33, 70])
@pytest.mark.parametrize("kind", LINEARS)
def test_linear(kind, n, blocks, monkeypatch):
    torch.manual_seed(0)
    if blocks == "many":
        monkeypatch.setattr(frozen, "BLOCK", 1)
    make, function, options = LINEARS[kind]
    packed, w = make(n, 64)
    x = torch.randn(2, 3, 64) * 3
    x, bias = x.requires_grad_(), torch.randn(n, requires_grad=True)
    grad = torch.randn(2, 3, n)
    y = function(x, packed, bias, **options)
    with torch.no_grad():
        assert torch.equal(y, function(x, packed, bias, **options))
    got = torch.autograd.grad(y, (x, bias), grad)
    want = torch.autograd.grad(model_of(x, w, bias, options), (x, bias), grad)
    if kind == "int8 static":
        assert 0 < (want[0] == 0).float().mean() < 0.9  # the fixed scale clips some
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_activation(activation, options):
    torch.manual_seed(0)
    packed, w = packed8(33, 64)
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(33, requires_grad=True)
    y = qk.int8_linear(x, packed, bias, activation=activation, out_dtype=torch.bfloat16, **options)
    with torch.no_grad():
        again = qk.int8_linear(x, packed, bias, activation=activation, out_dtype=torch.bfloat16, **options)
        assert torch.equal(y, again)
    y = qk.int8_linear(x, packed, bias, activation=activation, **options)
    grad = torch.randn(5, 33)
    dynamic = x if options else qk.fake_quantize_dynamic(x)
    z = model_of(dynamic, w, bias, options, activation)
    for a, b in zip(torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(z, (x, bias), grad), strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8 dynamic", "int4 symmetric", "int4 zero points"])
def test_low_precision(kind, dtype, monkeypatch):
    make, function, options = LINEARS[kind]
    packed, w = make(70, 64)
    monkeypatch.setattr(frozen, "BLOCK", 2048)
    x, bias = torch.randn(5, 64, dtype=dtype, requires_grad=True), torch.randn(70, requires_grad=True)
    for out_dtype in (dtype, torch.float32):
        grad = torch.randn(5, 70, dtype=out_dtype)
        y = function(x, packed, bias, out_dtype=out_dtype, **options)
        dx, dbias = torch.autograd.grad(y, (x, bias), grad)
        assert (y.dtype, dx.dtype, dbias.dtype) == (out_dtype, dtype, torch.float32)
        close(dx.float(), grad.float() @ w, 2e-2)
        close(dbias, grad.float().sum(0), 1e-2)


def test_layouts_of_x_and_grad():
    packed, w = packed8(8, 32)
    for x in (torch.randn(32, 4).t(), torch.randn(0, 32), torch.randn(32), torch.randn(2, 6, 32)[:, ::2]):
        x = x.requires_grad_()
        y = qk.int8_linear(x, packed)
        y.sum().backward()  # an expanded gradient
        close(x.grad, torch.ones_like(y) @ w)
        assert x.grad.shape == x.shape


def test_static_scale_is_learned():
    torch.manual_seed(0)
    for make, function, options in LINEARS.values():
        if options.get("input_scale") is None:
            continue
        packed, w = make(8, 64)
        x, scale = torch.randn(5, 64, requires_grad=True), torch.tensor(0.02, requires_grad=True)
        options = {**options, "input_scale": scale}
        got = torch.autograd.grad(function(x, packed, **options).square().sum(), (x, scale))
        want = torch.autograd.grad(model_of(x, w, torch.zeros(8), options).square().sum(), (x, scale))
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-4)


def test_codes_carry_no_gradient_and_their_scales_do():
    torch.manual_seed(0)
    for (packed, w), function in ((packed8(8, 64), qk.int8_linear), (packed4(8, 64, None), qk.int4_linear)):
        x, scale = codes(6, 64, 8).view(2, 3, 64), torch.rand(2, 3, 1, requires_grad=True)
        bias = torch.randn(8, requires_grad=True)
        zero_point = torch.randint(-9, 9, (2, 3, 1))
        y = function(x, packed, bias, input_scale=scale, input_zero_point=zero_point, out_dtype=torch.float32)
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, (scale, bias), grad)
        want = torch.autograd.grad(F.linear((x.float() - zero_point) * scale, w, bias), (scale, bias), grad)
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-4)


def test_no_integer_claims_a_gradient():
    x = torch.randn(4, 32, requires_grad=True)
    scale, bias = torch.tensor(0.1, requires_grad=True), torch.randn(8, requires_grad=True)
    packed, _ = packed8(8, 32)
    results = [
        qk.quantize(x, scale), qk.quantize_dynamic(x), qk.quantize_stochastic(x, scale, seed=1),
        qk.quantize_dynamic_transposed(x), qk.rms_norm_quantize_dynamic(x, torch.ones(32, requires_grad=True)),
        qk.silu_mul_quantize_dynamic(x, x), qk.quantize_codebook(x, scale, torch.tensor([-1.0, 1], requires_grad=True)),
        qk.int8_linear(x, packed, bias, out_scale=scale), qk.histogram(x, -scale, scale, bins=3),
        qk.int8_scaled_mm(codes(4, 32, 8), codes(32, 8, 8), scale, scale, bias=bias, out_scale=scale),
        qk.quantization_errors(x, scale.expand(3, 1, 1), quant_min=-8, quant_max=7),
        qk.PackedInt4.from_float(x).dequantize(), qk.PackedInt8.from_float(x).unpack(),
    ]  # fmt: skip
    for result in results:
        for t in result if isinstance(result, tuple) else (result,):
            assert not t.requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scaled_mm(activation):
    torch.manual_seed(0)
    a, b, zero_point = codes(5, 64, 8), codes(64, 8, 8), torch.randint(-9, 9, (5, 1))
    leaves = [(torch.rand(s) * 0.02).requires_grad_() for s in ((5, 1), (8,), (8,))]
    for dtype in (torch.float32, torch.bfloat16):
        options = {"zero_point_a": zero_point, "activation": activation, "out_dtype": dtype}
        y = qk.int8_scaled_mm(a, b, *leaves[:2], bias=leaves[2], **options)
        with torch.no_grad():
            assert torch.equal(y, qk.int8_scaled_mm(a, b, *leaves[:2], bias=leaves[2], **options))
    y = qk.int8_scaled_mm(a, b, *leaves[:2], bias=leaves[2], **{**options, "out_dtype": torch.float32})
    z = ACTIVATIONS[activation](((a.float() - zero_point) @ b.float()) * leaves[1] * leaves[0] + leaves[2])
    grad = torch.randn(5, 8)
    for got, want in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(z, leaves, grad), strict=True):
        close(got, want, 1e-4)


def convolution(groups=1, dtype=torch.float32):
    torch.manual_seed(0)
    packed = qk.PackedInt8Conv2d.from_quantized(codes(36, 4 * 9 // groups, 8).view(36, 4 // groups, 3, 3),
                                                torch.rand(36) * 0.01, groups)  # fmt: skip
    q, scale = packed.unpack()
    return packed, q.float() * scale.view(-1, 1, 1, 1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}])
def test_conv2d(geometry, groups):
    packed, w = convolution(groups)
    x, bias = (torch.randn(2, 4, 9, 8) * 3).requires_grad_(), torch.randn(36, requires_grad=True)
    scale = torch.tensor(0.02, requires_grad=True)
    y = qk.int8_conv2d(x, packed, bias, **{**STATIC, "input_scale": scale}, **geometry)
    with torch.no_grad():
        assert torch.equal(y, qk.int8_conv2d(x, packed, bias, **STATIC, **geometry))
    values = qk.fake_quantize(x, scale, STATIC["input_zero_point"], quant_min=-128, quant_max=127)
    z = F.conv2d(values, w, bias, **geometry, groups=groups)
    grad = torch.randn_like(z)
    got, want = (torch.autograd.grad(t, (x, bias, scale), grad) for t in (y, z))
    assert 0 < (want[0] == 0).float().mean() < 0.9
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-4)


def layers():
    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(64, 8), torch.nn.Conv2d(4, 8, 3, padding=1)
    return {
        "Int8Linear": (qk.nn.Int8Linear.from_float(linear), torch.randn(5, 64)),
        "Int4Linear": (qk.nn.Int4Linear.from_float(linear), torch.randn(2, 5, 64)),
        "Int4Linear, weight-only": (qk.nn.Int4Linear.from_float(linear, act_bits=16), torch.randn(5, 64)),
        "Int8Conv2d": (qk.nn.Int8Conv2d.from_float(conv), torch.randn(2, 4, 6, 6)),
    }


def dense(layer, x):
    w = layer.dequantize()
    return F.linear(x, w) if w.dim() == 2 else F.conv2d(x, w, padding=1)


@pytest.mark.parametrize("name", layers())
def test_modules(name):
    layer, x = layers()[name]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(a)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense(layer, b).backward(grad)
    close(a.grad, b.grad)


@pytest.mark.parametrize("name", layers())
def test_checkpointing_compiling_and_exporting(name):
    layer, x = layers()[name]
    layer, grad = copy.deepcopy(layer), None

    def run(call):
        nonlocal grad
        a = x.clone().requires_grad_()
        y = call(a)
        grad = torch.randn_like(y) if grad is None else grad
        y.backward(grad)
        return a.grad

    want = run(layer)
    assert torch.equal(run(lambda a: checkpoint(layer, a, use_reentrant=False)), want)
    close(run(torch.compile(layer, fullgraph=True, backend="aot_eager")), want)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_autocast():
    layer, x = layers()["Int4Linear"]
    a = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(a)
    y.float().sum().backward()
    assert a.grad.dtype == torch.float32
    close(a.grad, torch.ones(2, 5, 8) @ layer.dequantize(), 2e-2)


def test_second_derivatives(monkeypatch):
    """y = xW is linear: what is left of a second derivative comes through dy."""
    packed, w = packed8(8, 32)
    for block in (1, 1 << 22):
        monkeypatch.setattr(frozen, "BLOCK", block)
        x = torch.randn(3, 32, requires_grad=True)
        y = qk.int8_linear(x, packed)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.sum(), x)
        close(ddx, 2 * (torch.ones(3, 32) @ w.t()) @ w, 1e-3)


def test_nothing_but_codes_is_kept():
    packed, _ = packed4(256, 256, "zero_point", scale_dtype=torch.float16)
    x, kept = torch.randn(4, 256, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        qk.int4_linear(x, packed, act_bits=16)
    own = {t.data_ptr() for t in (packed.data, packed.scale, packed.zero_point)}
    assert {t.data_ptr() for t in kept} == own


def test_errors_keep_their_names():
    packed, _ = packed8(8, 32)
    x = torch.randn(3, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"input_scale: got shape \[3\]"):
        qk.int8_linear(x, packed, input_scale=torch.ones(3))
    with pytest.raises(RuntimeError, match="activation: got 'tanh'"):
        qk.int8_linear(x, packed, activation="tanh")
    with pytest.raises(RuntimeError, match="bias: got shape"):
        qk.int8_linear(x, packed, torch.ones(3))


@pytest.mark.parametrize("kind", LINEARS)
def test_transforms(kind):
    torch.manual_seed(0)
    make, function, options = LINEARS[kind]
    packed, _ = make(8, 64)
    x, bias = torch.randn(3, 2, 64), torch.randn(3, 8)

    def call(x, bias):
        return function(x, packed, bias, **options)

    one = (x[0].clone().requires_grad_(), bias[0].clone().requires_grad_())
    y = call(*one)
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, one, grad)
    value, pull = vjp(call, x[0], bias[0])
    close(value, y.detach())
    for a, b in zip(pull(grad), want, strict=True):
        close(a, b)
    _, tangent = jvp(call, (x[0], bias[0]), (x[1], bias[1]))
    close((tangent * grad).sum(), (want[0] * x[1]).sum() + (want[1] * bias[1]).sum(), 1e-4)
    close(vmap(call)(x, bias), torch.stack([call(*sample) for sample in zip(x, bias, strict=True)]))
    per_sample = vmap(jacrev(lambda x, bias: call(x, bias).sum(), (0, 1)))(x, bias)
    for i in range(3):
        sample = x[i].clone().requires_grad_(), bias[i].clone().requires_grad_()
        for a, b in zip(per_sample, torch.autograd.grad(call(*sample).sum(), sample), strict=True):
            close(a[i], b)


def test_transforms_of_the_others():
    torch.manual_seed(0)
    packed, _ = convolution()
    x = torch.randn(2, 1, 4, 5, 5)
    got = vmap(jacrev(lambda x: qk.int8_conv2d(x, packed, **STATIC).square().sum()))(x)
    for i in range(2):
        sample = x[i].clone().requires_grad_()
        close(got[i], torch.autograd.grad(qk.int8_conv2d(sample, packed, **STATIC).square().sum(), sample)[0], 1e-4)
    a, b, scale = codes(5, 64, 8), codes(64, 8, 8), torch.rand(3, 5)
    for activation in ACTIVATIONS:

        def call(scale, activation=activation):
            return qk.int8_scaled_mm(a, b, scale, scale[:1] * 1e-3, activation=activation, out_dtype=torch.float32)

        got = vmap(jacrev(lambda s, call=call: call(s).square().sum()))(scale)
        for i in range(3):
            sample = scale[i].clone().requires_grad_()
            close(got[i], torch.autograd.grad(call(sample).square().sum(), sample)[0], 1e-4)
        _, tangent = jvp(call, (scale[0],), (scale[1],))
        close(tangent, jacrev(call)(scale[0]) @ scale[1], 1e-4)
