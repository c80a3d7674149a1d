"""int8_training_linear and its producer: exact values, gradients, kept codes, compilation, checkpoints, DDP, FSDP2."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import FLOATS, special
from conftest import kernels_of, run_python
from test_fake_quantize import same, saved_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels import gemm_checks
from qkernels.ops import int8_training as ops
from qkernels.ops.quantize_transposed import quantize_transposed_op
from qkernels.reference import quantize_transposed as reference

PRODUCTS = list(itertools.product(("int8", "float"), repeat=3))
STEPS = {torch.float32: 2.0**-22, torch.float64: 2.0**-50, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def named(products: tuple[str, str, str]) -> dict[str, Any]:
    return dict(zip(("output", "grad_input", "grad_weight"), products, strict=True))


MATRICES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "one element": lambda d: torch.full((1, 1), -2.7, dtype=d),
    "empty": lambda d: torch.empty(0, 4, dtype=d),
    "empty rows": lambda d: torch.empty(3, 0, dtype=d),
    "special values": lambda d: special(d).reshape(6, 17),
    "odd": lambda d: torch.randn(7, 33, dtype=d) * 2,
    "tiles": lambda d: torch.randn(130, 193, dtype=d),
    "square tiles": lambda d: torch.randn(64, 128, dtype=d),
    "tall": lambda d: torch.randn(1000, 3, dtype=d),
    "wide": lambda d: torch.randn(2, 2065, dtype=d),
    "transposed": lambda d: torch.randn(96, 65, dtype=d).t(),
    "sliced": lambda d: torch.randn(19, 70, dtype=d)[:, ::2],
    "expanded": lambda d: torch.randn(5, 1, dtype=d).expand(5, 48),
    "misaligned": lambda d: torch.randn(1 + 6 * 37, dtype=d)[1:].view(6, 37),
}


@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"))
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_equal_the_reference(kernel: str, name: str, dtype: torch.dtype) -> None:
    x = MATRICES[name](dtype)
    if kernel == "triton" and name in ("wide", "tall") and dtype != torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("interpreting takes too long")
    for args in ((127, None, 0, None), (7, None, 0, None), (127, 3, 5, None), (127, -1, 2, torch.tensor([2**33]))):
        expected = reference.quantize_dynamic_transposed(x, *args)
        for threads in (1, 2) if kernel.startswith("cpu_") else (1,):
            torch.set_num_threads(threads)
            with qk.use_kernel(kernel):
                for a, b in zip(quantize_transposed_op(x, *args), expected, strict=True):
                    same(a, b)


@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"))
def test_codes_are_those_of_the_other_quantizers(kernel: str) -> None:
    """Rows as quantize_dynamic gives them for x and for its transpose; drawn ones as quantize_stochastic's."""
    x = torch.randn(37, 50)
    with qk.use_kernel(kernel):
        q, scale, q_t, scale_t = qk.quantize_dynamic_transposed(x)
        drawn, _, drawn_t, _ = qk.quantize_dynamic_transposed(x, seed=4, offset=9)
    for matrix, codes, s, by_draw in ((x, q, scale, drawn), (x.t().contiguous(), q_t, scale_t, drawn_t)):
        want, want_scale, _ = qk.quantize_dynamic(matrix)
        assert torch.equal(codes, want)
        same(s, want_scale)
        bounds = by_draw.int() - (matrix.double() / s.double())
        assert bounds.abs().max() < 1.001
        assert (by_draw != want).any()
    assert torch.equal(drawn, qk.quantize_stochastic(x, scale, seed=4, offset=9))
    assert torch.equal(drawn_t.t(), qk.quantize_stochastic(x, scale_t.t(), seed=4, offset=9))
    assert q.stride() == (64, 1)
    assert q_t.stride() == (48, 1)


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


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every weight that was quantized."""
    seen: list[Tensor] = []
    original = ops.weight_codes

    def spy(w: Tensor, *rest: Any) -> ops.Codes:
        seen.append(w)
        return original(w, *rest)

    monkeypatch.setattr(ops, "weight_codes", spy)
    return seen


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "foreach": partial(torch.optim.SGD, lr=0.1, foreach=True),
    "adam fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
}


class WritesData(torch.optim.Optimizer):
    """As optimizers were written before no_grad."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), WritesData], ids=[*OPTIMIZERS, "through .data"])
def test_weights_are_quantized_once_for_each_optimizer_step(make: Callable[..., Any], quantized: list[Tensor]) -> None:
    layer = qk.nn.Int8TrainingLinear(16, 8)
    optimizer = make(layer.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for _ in range(4):
            x = torch.randn(5, 16)
            y = layer(x)
            assert torch.equal(y, qk.int8_training_linear(x, layer.weight.clone(), layer.bias))
            y.square().sum().backward()
        assert sum(w is layer.weight for w in quantized) == step + 1
        optimizer.step()


CHANGES: dict[str, Callable[[qk.nn.Int8TrainingLinear], Any]] = {
    "in place under no_grad": lambda layer: torch.no_grad()(lambda: layer.weight.mul_(2))(),
    "in place in inference mode": lambda layer: torch.inference_mode()(lambda: layer.weight.mul_(2))(),
    "through a view": lambda layer: torch.no_grad()(lambda: layer.weight[1:].zero_())(),
    "through detach": lambda layer: layer.weight.detach().mul_(2),
    "load_state_dict": lambda layer: layer.load_state_dict(nn.Linear(16, 8).state_dict()),
    "assigned": lambda layer: layer.load_state_dict(nn.Linear(16, 8).state_dict(), assign=True),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(8, 16))),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(8, 16)),
    "cast": lambda layer: layer.bfloat16().float(),
    "other products": lambda layer: setattr(layer, "grad_input", "float"),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "foreach": lambda layer: torch.no_grad()(lambda: torch._foreach_mul_([layer.weight], 2.0))(),
    "told so": lambda layer: (layer.weight.data.mul_(2), layer.forget_codes()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_codes_follow_the_weight(change: Callable[..., Any]) -> None:
    layer = qk.nn.Int8TrainingLinear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    before = layer(x)
    assert layer._kept is not None
    change(layer)
    y = layer(x)
    fresh = qk.int8_training_linear(x, layer.weight.detach().clone(), layer.bias, grad_input=layer.grad_input)
    assert torch.equal(y, fresh)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(fresh.sum(), x)[0])
    before.sum().backward()  # the graph from before the change keeps the codes that it used


def test_codes_are_not_kept_where_that_is_unsafe(quantized: list[Tensor]) -> None:
    layer, x = qk.nn.Int8TrainingLinear(16, 8), torch.randn(5, 16)
    layer.eval()
    for _ in range(2):
        layer(x)
        layer.weight.data.mul_(2)  # averages of weights are swapped in like this for evaluation
        assert torch.equal(layer(x), qk.int8_training_linear(x, layer.weight.clone(), layer.bias))
    layer.train()
    layer(x)
    other = {"weight": torch.randn(8, 16), "bias": torch.randn(8)}
    assert torch.equal(
        torch.func.functional_call(layer, other, x),
        qk.int8_training_linear(x, other["weight"], other["bias"]),
    )
    with torch._subclasses.FakeTensorMode():
        assert qk.nn.Int8TrainingLinear(16, 8)(torch.empty(5, 16)).shape == (5, 8)
    with torch.inference_mode():
        made = qk.nn.Int8TrainingLinear(16, 8)
        assert torch.equal(made(x), qk.int8_training_linear(x, made.weight, made.bias))
    twin = copy.deepcopy(layer)
    assert twin._kept is None
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert again._kept is None
    assert torch.equal(again(x), layer(x))


def test_module_is_nn_linear() -> None:
    linear = nn.Linear(16, 8).eval()
    layer = qk.nn.Int8TrainingLinear.from_float(linear, grad_weight="float", stochastic_rounding=True)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert "grad_weight=float, stochastic_rounding=True" in repr(layer)
    assert qk.nn.Int8TrainingLinear(16, 8, bias=False, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="from_float: got ReLU; accepted: Linear"):
        qk.nn.Int8TrainingLinear.from_float(nn.ReLU())
    with pytest.raises(ValueError, match="grad_input: got 'int4'; accepted: int8, float"):
        qk.nn.Int8TrainingLinear(16, 8, grad_input="int4")


def test_training_reaches_the_float_loss() -> None:
    """A regression that fp32 solves: int8 ends within 2 % of it, with either rounding."""
    inputs = torch.randn(256, 32)
    target = torch.sin(inputs @ torch.randn(32, 8)) + 0.3 * torch.randn(256, 8)

    def final(**options: Any) -> float:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
        if options:
            for at in (0, 2):
                model[at] = qk.nn.Int8TrainingLinear.from_float(model[at], **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), target)
            loss.backward()
            optimizer.step()
        return loss.item()

    base = final()
    for stochastic in (False, True):
        assert abs(final(stochastic_rounding=stochastic) / base - 1) < 0.02


def test_opcheck() -> None:
    for args in ((torch.randn(5, 7), 127, None, 0, None), (torch.randn(3, 32).bfloat16(), 7, 3, 1, torch.tensor([2]))):
        torch.library.opcheck(torch.ops.qkernels.quantize_dynamic_transposed.default, args)


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
    "matrix": (lambda: qk.quantize_dynamic_transposed(X[0]), r"x: got shape \[6\]; accepted: 2 dims"),
    "matrix dtype": (lambda: qk.quantize_dynamic_transposed(X.int()), "x: got torch.int32; accepted: torch.float32"),
    "bits": (lambda: qk.quantize_dynamic_transposed(X, bits=9), "bits: got 9; accepted: 2 to 8"),
    "quant_max": (lambda: quantize_transposed_op(X, 128, None, 0, None), "quant_max: got 128; accepted: 1 to 127"),
    "offset": (
        lambda: qk.quantize_dynamic_transposed(X, seed=1, offset=torch.tensor(1.0)),
        r"offset: got torch.float32 of shape \[\]; accepted: an int, or one torch.int64 element on x's device",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kernel", kernels_of("quantize_dynamic_transposed"))
def test_bad_arguments_are_named(kernel: str, name: str) -> None:
    call, message = BAD[name]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()


PARALLEL = """
import os, sys, copy
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
import qkernels as qk

BATCHES = torch.randn(3, 2, 2, 8, 32, generator=torch.Generator().manual_seed(5))  # step, micro-batch, rank

def model():
    torch.manual_seed(0)
    layer = qk.nn.Int8TrainingLinear
    return nn.Sequential(layer(32, 64), nn.GELU(), layer(64, 32))

def loss(m, x):
    return (m(x) - 1).square().mean()

def expected():
    m = model()
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for step in BATCHES:
        for micro in step:
            for x in micro:
                (loss(m, x) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in m.parameters()]

def work(rank, kind, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2)
    m = model()
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(m)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        for layer in (m[0], m[2]):
            fully_shard(layer, mesh=mesh, reshard_after_forward=kind != "fsdp kept")
        trained = fully_shard(m, mesh=mesh)
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for step in BATCHES:
        for at, micro in enumerate(step):
            last = at == 1
            if kind == "ddp":
                trained.require_backward_grad_sync = last
            else:
                trained.set_requires_gradient_sync(last)
                if kind == "fsdp kept":
                    trained.set_reshard_after_backward(last)
            loss(trained, micro[rank]).backward()
            if kind == "fsdp":
                assert m[0]._kept is None, "codes of the whole weight outlive it"
            elif not last:
                assert m[0]._kept is not None
        optimizer.step()
        optimizer.zero_grad()
    for p, want in zip(m.parameters(), expected(), strict=True):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(p.detach(), want, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
    print("done", flush=True)

if __name__ == "__main__":
    import __main__
    folder, kind = sys.argv[1:]
    context = mp.get_context("fork")
    processes = [context.Process(target=work, args=(rank, kind, folder)) for rank in range(2)]
    [p.start() for p in processes]
    [p.join() for p in processes]
    sys.exit(max(abs(p.exitcode) for p in processes))
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp kept"])
def test_two_processes(kind: str, tmp_path: Any) -> None:
    """DDP and FSDP2 on gloo, with gradient accumulation: the parameters of one process that saw all batches."""
    result = run_python(PARALLEL, str(tmp_path), kind)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("done") == 2
