"""int8_training_linear: exact values, gradients, rounding, dtypes, compilation, checkpoints."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from cases import FLOATS
from compare import same
from conftest import kernels_of
from gradients import saved_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels import gemm_checks
from qkernels.reference import quantize_transposed as reference

PRODUCTS = list(itertools.product(("int8", "float"), repeat=3))
STEPS = {torch.float32: 2.0**-22, torch.float64: 2.0**-50, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def named(products: tuple[str, str, str]) -> dict[str, Any]:
    return dict(zip(("output", "grad_input", "grad_weight"), products, strict=True))


def codes_of(x: Tensor, seed: int | None = None) -> tuple[Tensor, ...]:
    """(values of rows, values of columns): what the codes of either form stand for, in fp64."""
    q, scale, q_t, scale_t = reference.quantize_dynamic_transposed(x.detach(), 127, seed, 0, None)
    return q.double() * scale.double(), (q_t.double() * scale_t.double()).t()


def oracle(
    x: Tensor, w: Tensor, bias: Tensor | None, grad: Tensor, products: tuple[str, str, str], seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients in fp64 from the integers that each product should have seen."""
    output, grad_input, grad_weight = products
    (x_rows, x_columns), (w_rows, w_columns), (g_rows, g_columns) = codes_of(x), codes_of(w), codes_of(grad, seed)
    kept = output == "int8"  # a float product takes what the output was computed from
    y = x_rows @ w_rows.t() if kept else x.double() @ w.double().t()
    dx = g_rows @ w_columns if grad_input == "int8" else grad.double() @ (w_rows if kept else w.double())
    dw = g_columns.t() @ x_columns if grad_weight == "int8" else grad.double().t() @ (x_rows if kept else x.double())
    return y + (0 if bias is None else bias.double()), dx, dw, grad.double().sum(0)


def close(got: Tensor, want: Tensor, dtype: torch.dtype, length: int) -> None:
    """Within the rounding of the float operations: of the result, and (for float products) of ``length`` terms."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    if got.numel():
        error = (got.detach().double() - want).abs().max()
        assert error <= want.abs().max() * STEPS[dtype] * (2 + length**0.5 / 4) + 1e-12, float(error)


def results(x: Tensor, w: Tensor, bias: Tensor | None, grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, bias)]
    y = qk.int8_training_linear(*leaves, **options)
    y.backward(grad)
    return (y.detach(), *(None if t is None else t.grad for t in leaves))


@pytest.mark.parametrize("products", PRODUCTS, ids="-".join)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients(dtype: torch.dtype, products: tuple[str, str, str]) -> None:
    m, k, n = 37, 50, 21
    x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    grad = torch.randn(m, n).to(dtype)
    options = named(products)
    for seed in (None, 11):
        got = results(x, w, bias, grad, seed=seed, **options)
        for a, b in zip(got, oracle(x, w, bias, grad, products, seed), strict=True):
            close(a, b, dtype, 50)


@pytest.mark.parametrize("kernel", kernels_of("int8_scaled_mm"))
def test_every_path(kernel: str) -> None:
    x, w, bias, grad = torch.randn(70, 130), torch.randn(65, 130), torch.randn(65), torch.randn(70, 65)
    with qk.use_kernel(kernel):
        got = results(x, w, bias, grad, seed=1)
    for a, b in zip(got, oracle(x, w, bias, grad, ("int8",) * 3, 1), strict=True):
        close(a, b, torch.float32, 1)


def test_master_weights_of_another_dtype() -> None:
    """bf16 activations with fp32 weights: the weight is quantized as it is, its gradient comes in fp32."""
    x, w, bias = torch.randn(9, 32).bfloat16(), torch.randn(16, 32), torch.randn(16)
    grad = torch.randn(9, 16).bfloat16()
    for products in PRODUCTS:
        y, dx, dw, dbias = results(x, w, bias, grad, **named(products))
        assert (y.dtype, dx.dtype, dw.dtype, dbias.dtype) == (
            torch.bfloat16,
            torch.bfloat16,
            torch.float32,
            torch.float32,
        )
        close(dbias, grad.double().sum(0), torch.float32, 9)
        want = oracle(x, w, bias, grad, products)
        close(y, want[0], torch.bfloat16, 32)
        if products[2] == "int8":
            close(dw, want[2], torch.float32, 9)


def test_w8a8_is_fake_quantization() -> None:
    """Output as fake quantization and a float product to rounding; gradients straight-through, as autograd's."""
    x, w, bias = torch.randn(4, 25, 64), torch.randn(48, 64), torch.randn(48)
    grad = torch.randn(4, 25, 48)
    leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
    y = F.linear(qk.fake_quantize_dynamic(leaves[0]), qk.fake_quantize_dynamic(leaves[1]), leaves[2])
    y.backward(grad)
    got = results(x, w, bias, grad, grad_input="float", grad_weight="float")
    for a, b in zip(got, (y.detach(), *(t.grad for t in leaves)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[0], F.linear(x, w, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("products", PRODUCTS, ids="-".join)
@pytest.mark.parametrize(
    ("shape", "n"), [((0, 8), 5), ((3, 0), 5), ((3, 8), 0), ((0, 0), 0), ((8,), 5), ((2, 3, 8), 1), ((1, 1, 1, 8), 5)]
)
def test_empty_and_other_shapes(products: tuple[str, str, str], shape: tuple[int, ...], n: int) -> None:
    x, w, bias = torch.randn(shape), torch.randn(n, shape[-1]), torch.randn(n)
    grad = torch.randn(*shape[:-1], n)
    options = named(products)
    got = results(x, w, bias, grad, **options)
    rows = grad.numel() // n if n else x.numel() // shape[-1] if shape[-1] else 0
    want = oracle(x.reshape(rows, shape[-1]), w, bias, grad.reshape(rows, n), products)
    for a, b, like in zip(got, want, (grad, x, w, bias), strict=True):
        close(a.reshape(b.shape), b, torch.float32, 8)
        assert a.shape == like.shape


def test_strided_operands() -> None:
    x, w = torch.randn(40, 33).t(), torch.randn(40, 60).t()[::3]
    bias = torch.randn(40)[::2]
    for grad in (torch.randn(20, 33).t(), torch.ones(1, 1).expand(33, 20), torch.randn(33, 40)[:, ::2]):
        for seed in (None, 2):
            got = results(x, w, bias, grad, seed=seed)
            want = results(x.contiguous(), w.contiguous(), bias.contiguous(), grad.contiguous(), seed=seed)
            for a, b in zip(got[:3], want, strict=False):
                assert torch.equal(a, b)
            torch.testing.assert_close(got[3], want[3])  # torch sums another memory layout in another order


def test_sums_longer_than_int32_allows() -> None:
    """A sequence of more tokens than one exact sum can take, and codes at their extremes throughout."""
    tokens = gemm_checks.MAX_K + 20
    x, w, grad = torch.ones(tokens, 3), torch.ones(2, 3), torch.ones(tokens, 2)
    _, dx, dw, _ = results(x, w, None, grad)
    torch.testing.assert_close(dw, torch.full((2, 3), float(tokens)), rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, torch.full((tokens, 3), 2.0), rtol=1e-6, atol=0)
    x, w = torch.randn(2, tokens), torch.randn(3, tokens)  # and as K
    for dtype in (torch.float32, torch.float64):
        bias = torch.randn(3).to(dtype)
        y = qk.int8_training_linear(x.to(dtype), w.to(dtype), bias)
        close(y, codes_of(x.to(dtype))[0] @ codes_of(w.to(dtype))[0].t() + bias, dtype, 16)


def test_bias_alone_and_frozen_parts() -> None:
    """Only what requires a gradient gets one, with nothing kept for the others."""
    x, w, bias = torch.randn(64, 128), torch.randn(32, 128), torch.randn(32)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, w, bias), wanted, strict=True)]
        y = qk.int8_training_linear(*leaves)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(torch.ones_like(y))
        full = results(x, w, bias, torch.ones(64, 32))
        for leaf, want, gradient in zip(leaves, wanted, full[1:], strict=True):
            assert (leaf.grad is not None) == want
            if want:
                assert torch.equal(leaf.grad, gradient)


def test_memory_kept_for_backward() -> None:
    """One byte for each element of x, whichever product is int8; the weight's codes are one per weight."""
    x, w = torch.randn(512, 256), torch.randn(64, 256, requires_grad=True)
    for grad_weight in ("int8", "float"):
        kept = saved_bytes(partial(qk.int8_training_linear, x.bfloat16(), w, grad_weight=grad_weight))
        assert 512 * 256 <= kept <= 512 * 256 + 4 * 512 + 64
    x.requires_grad_()
    assert saved_bytes(lambda: qk.int8_training_linear(x, w)) <= 512 * 256 + 64 * 256 + 8 * 256


def test_stochastic_rounding() -> None:
    x, w, grad = torch.randn(64, 32), torch.randn(16, 32), torch.randn(64, 16)
    first = results(x, w, None, grad, seed=5, offset=7)
    for a, b in zip(first[:3], results(x, w, None, grad, seed=5, offset=torch.tensor([7]))[:3], strict=True):
        assert torch.equal(a, b)
    for other in ({"seed": 5, "offset": 8}, {"seed": 6, "offset": 7}):
        assert torch.equal(results(x, w, None, grad, **other)[0], first[0])  # the output is rounded to nearest
        assert not torch.equal(results(x, w, None, grad, **other)[2], first[2])
    # Right on average: the mean of many draws comes closer to the gradient of float operands' codes than one does.
    want = oracle(x, w, None, grad, ("int8", "int8", "int8"))
    _, w_columns = codes_of(w)
    _, x_columns = codes_of(x)
    exact = grad.double() @ w_columns, grad.double().t() @ x_columns
    draws = [results(x, w, None, grad, seed=1, offset=step)[1:3] for step in range(100)]
    for at, value in enumerate(exact):
        mean = torch.stack([draw[at].double() for draw in draws]).mean(0)
        spread = torch.stack([draw[at].double() for draw in draws]).std(0)
        assert ((mean - value).abs() <= 5 * spread / 10 + 1e-6).all()
        assert (want[at + 1] - value).abs().mean() > 2 * (mean - value).abs().mean()


def test_nan_and_infinity_reach_every_result() -> None:
    for bad in (float("nan"), float("inf")):
        x, w, grad = torch.randn(6, 8), torch.randn(5, 8), torch.randn(6, 5)
        poisoned = grad.clone()
        poisoned[2, 3] = bad
        _, dx, dw, _ = results(x, w, None, poisoned)
        assert dx[2].isnan().all()
        assert dw[3].isnan().all()
        assert dx.isnan().sum() == 8
        assert dw.isnan().sum() == 8
        x[1, 4] = bad
        y, _, dw, _ = results(x, w, None, grad)
        assert y[1].isnan().all()
        assert y.isnan().sum() == 5
        assert dw[:, 4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer = qk.nn.Int8TrainingLinear(32, 16)
    x = torch.randn(9, 32, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    want = results(x.to(dtype), layer.weight, layer.bias, (2 * y).detach())
    assert torch.equal(y, want[0])
    assert torch.equal(layer.weight.grad, want[2])
    for products in PRODUCTS:
        with torch.autocast("cpu", dtype):
            y = qk.int8_training_linear(x, layer.weight, layer.bias, **named(products))
            assert y.dtype == dtype
            torch.autograd.grad(y.float().sum(), (x, layer.weight, layer.bias))
        double = torch.randn(2, 32, dtype=torch.float64)
        with torch.autocast("cpu", dtype):
            assert layer(double).dtype == torch.float64


@pytest.mark.parametrize("products", [PRODUCTS[0], PRODUCTS[3], PRODUCTS[5], PRODUCTS[7]], ids="-".join)
def test_compile_fullgraph_without_recompiles(products: tuple[str, str, str]) -> None:
    """Token counts in multiples of 16, whose codes need no padding, are a graph of their own; all others share one."""
    layer = qk.nn.Int8TrainingLinear(24, 16, **named(products))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, batch in enumerate((8, 5, 13)):
        x = torch.randn(batch, 3, 24, requires_grad=True)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            y = compiled(x)
            got = torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))
        want = layer(x)
        same(y.detach(), want.detach())
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), (x, layer.weight, layer.bias)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compiled_by_inductor() -> None:
    layer = qk.nn.Int8TrainingLinear(24, 16, stochastic_rounding=True)
    torch._dynamo.reset()

    def loss(x: Tensor) -> Tensor:
        return layer(F.silu(x)).square().sum()

    x = torch.randn(8, 24, requires_grad=True)
    torch.compile(loss, fullgraph=True)(x).backward()
    want = oracle(F.silu(x.detach()), layer.weight, layer.bias, torch.zeros(8, 16), PRODUCTS[0])[0]
    grad = (2 * want).float()
    dw = oracle(F.silu(x.detach()), layer.weight, None, grad, PRODUCTS[0])[2]
    assert (layer.weight.grad - dw).norm() < 0.03 * dw.norm()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_activation_checkpointing(reentrant: bool, stochastic: bool) -> None:
    """The recomputed pass draws the same numbers; the weight's codes serve both passes."""
    layer = nn.Sequential(qk.nn.Int8TrainingLinear(32, 48, stochastic_rounding=stochastic), nn.GELU(), nn.Linear(48, 4))
    x = torch.randn(20, 32, requires_grad=True)
    torch.manual_seed(3)
    plainly = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    torch.manual_seed(3)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip((x.grad, *(p.grad for p in layer.parameters())), plainly, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = qk.int8_training_linear(x, torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="int8_training_linear: got create_graph=True; accepted: first derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


X, W = torch.randn(4, 6), torch.randn(3, 6)
BAD = {
    "x dtype": (lambda: qk.int8_training_linear(X.long(), W), "x: got torch.int64; accepted: torch.float32"),
    "x dims": (lambda: qk.int8_training_linear(X[0, 0], W), r"x: got shape \[\]; accepted: \[..., 6\], w's K"),
    "K": (lambda: qk.int8_training_linear(X[:, :5], W), r"x: got shape \[4, 5\]; accepted: \[..., 6\]"),
    "w dtype": (lambda: qk.int8_training_linear(X, W.to(torch.int8)), "w: got torch.int8"),
    "w dims": (lambda: qk.int8_training_linear(X, W[0]), r"w: got shape \[6\]; accepted: \[N, K\]"),
    "bias shape": (lambda: qk.int8_training_linear(X, W, X[0]), r"bias: got shape \[6\]; accepted: \[3\]"),
    "bias dtype": (lambda: qk.int8_training_linear(X, W, torch.ones(3).int()), "bias: got torch.int32"),
    "device": (lambda: qk.int8_training_linear(X, W.to("meta")), "w: got a tensor on meta; accepted: x's device, cpu"),
    "output": (lambda: qk.int8_training_linear(X, W, output="fp8"), "output: got 'fp8'; accepted: int8, float"),
    "grad_weight": (lambda: qk.int8_training_linear(X, W, grad_weight=True), "grad_weight: got True"),
    "codes": (
        lambda: qk.int8_training_linear(X, W, codes=qk.quantize_dynamic_transposed(W.t())),
        r"codes: got shapes \[\[6, 3\].*accepted: quantize_dynamic_transposed\(w\)'s, \[\[3, 6\]",
    ),
    "codes missing": (lambda: qk.int8_training_linear(X, W, codes=(None,) * 4), r"codes: got shapes \[None"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"))
def test_bad_arguments_are_named(kernel: str, name: str) -> None:
    call, message = BAD[name]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()
