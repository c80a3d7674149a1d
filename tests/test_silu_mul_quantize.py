"""SwiGLU's product fused with dynamic quantization: the same bits in every kernel, gradients against autograd."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import FLOATS
from compare import same
from conftest import kernels_of, paths_of, results_on
from gradients import saved_bytes
from torch import Tensor
from torch.nn.functional import silu

import qkernels as qk
from qkernels.ops import silu_mul_quantize as ops
from qkernels.reference import dynamic as dynamic_reference
from qkernels.reference import fake_quantize as plain
from qkernels.reference import silu_mul_quantize as reference

pytestmark = pytest.mark.sanitized

FORWARD, QUANTIZE, BACKWARD = (
    "silu_mul_fake_quantize_dynamic_forward",
    "silu_mul_quantize_dynamic",
    "silu_mul_fake_quantize_dynamic_backward",
)


def compiled(op: str) -> list[str]:
    """The kernels that take every input here; Triton has tests of its own below."""
    return [name for name in kernels_of(op) if name != "triton"]


def inputs(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    base = (torch.randn(6, 64) * 3).to(dtype)
    bad = base.clone()
    bad[1, 3], bad[2, 1], bad[2, 2], bad[3], bad[4] = math.nan, math.inf, -math.inf, 0, 1e-30
    far = torch.linspace(-800 if dtype == torch.float64 else -100, 100, 6 * 64).reshape(6, 64).to(dtype)
    xs = [
        base,
        bad,
        far,
        base.t(),
        base[:, ::2],
        base[0],
        base[:1, :1].expand(3, 48),
        torch.randn(2, 3, 37).to(dtype),
        torch.randn(2, 20000).to(dtype),
        torch.empty(0, 8, dtype=dtype),
        torch.empty(3, 0, dtype=dtype),
    ]
    return [(x, torch.randn(x.shape).to(dtype)) for x in xs] + [(torch.randn(8, 6).to(dtype).t(), base[:, :8])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_product(dtype: torch.dtype) -> None:
    gate = torch.linspace(-80, 80, 10_001, dtype=dtype)
    got = reference.product(gate, torch.ones_like(gate))
    torch.testing.assert_close(
        got.double(), silu(gate.double()), rtol=2**-21 if dtype == torch.float32 else 2**-49, atol=0
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_kernels_equal_the_reference(dtype: torch.dtype, symmetric: bool) -> None:
    for gate, up in inputs(dtype):
        for group, bits in ((-1, 8), (16, 4), (37, 2), (10000, 8), (1, 8), (0, 8)):
            if group > 0 and gate.shape[-1] % group:
                continue
            args = (gate, up, group, *qk.ops.dynamic.range_of_bits(bits), symmetric)
            y = reference.silu_mul_fake_quantize_dynamic_forward(*args)
            codes = reference.silu_mul_quantize_dynamic(*args)
            clipped = (None, None) if symmetric else y[1:]
            back = (torch.randn(gate.shape).to(dtype), gate, up, *clipped, *args[3:5])
            grads = reference.silu_mul_fake_quantize_dynamic_backward(*back)
            for kernel in compiled(FORWARD):
                with qk.use_kernel(kernel):
                    got = (*ops._forward(*args), *ops._quantize(*args), *ops._backward(*back))
                for a, b in zip(got, (*y, *codes, *grads), strict=True):
                    same(a, b)


def test_no_dims() -> None:
    """One range for the tensor is all there can be."""
    gate, up = torch.tensor(1.5), torch.tensor(-2.0)
    for kernel in compiled(FORWARD):
        with qk.use_kernel(kernel):
            got = ops._forward(gate, up, 0, -8, 7, True)
        for a, b in zip(got, reference.silu_mul_fake_quantize_dynamic_forward(gate, up, 0, -8, 7, True), strict=True):
            same(a, b)


@pytest.mark.parametrize("kernel", compiled(BACKWARD))
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (1, 3, 1), (1, 1, 30), (1, 3, 5), (4, 3, 30)])
def test_backward_takes_any_granularity(kernel: str, shape: tuple[int, ...]) -> None:
    grad, gate, up = torch.randn(3, 4, 3, 30) * 2
    args = (grad, gate, up, torch.rand(shape) * 0.1, torch.randint(-8, 8, shape, dtype=torch.int32), -8, 7)
    with qk.use_kernel(kernel):
        got = ops._backward(*args)
    for a, b in zip(got, reference.silu_mul_fake_quantize_dynamic_backward(*args), strict=True):
        same(a, b)


@pytest.mark.parametrize("kernel", paths_of(FORWARD))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", [-1, 40, 0])
def test_paths_and_threads_give_identical_bits(kernel: str, dtype: torch.dtype, group_size: int) -> None:
    gate, up, grad = torch.randn(3, 70, 1000).to(dtype)
    args = (gate, up, group_size, -8, 7, False)
    scale, zero_point = reference.silu_mul_fake_quantize_dynamic_forward(*args)[1:]
    calls = (
        lambda: ops._forward(*args),
        lambda: ops._quantize(*args),
        lambda: ops._backward(grad, gate, up, scale, zero_point, -8, 7),
        lambda: ops._backward(grad, gate, up, None, None, -8, 7),
    )
    want = results_on("cpu_scalar", 1, calls)
    for threads in (1, 2):
        for a, b in zip(results_on(kernel, threads, calls), want, strict=True):
            same(a, b)


@pytest.mark.parametrize("kernel", compiled(FORWARD), indirect=True)
@pytest.mark.parametrize("group_size", [-1, 32])
def test_near_the_unfused_sequence(kernel: str, group_size: int) -> None:
    """At most one step from fake_quantize_dynamic of torch's product, and rarely that."""
    gate, up = torch.randn(50, 256), torch.randn(50, 256)
    y = qk.silu_mul_fake_quantize_dynamic(gate, up, group_size=group_size)
    with qk.use_kernel("reference"):
        want, scale, _ = qk.fake_quantize_dynamic(silu(gate) * up, group_size=group_size, return_qparams=True)
    steps = ((y - want) / plain.expand(scale, y)).abs()
    assert steps.max() < 1.001
    assert (steps > 0.5).float().mean() < 1e-3


@pytest.mark.parametrize("kernel", compiled(QUANTIZE))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, None])
def test_codes_are_the_fake_quantized_values(
    kernel: str, dtype: torch.dtype, symmetric: bool, group_size: int | None
) -> None:
    """A converted model computes what the trained one did."""
    gate, up = torch.randn(9, 96).to(dtype).requires_grad_(), torch.randn(9, 96).to(dtype)
    options = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
    with qk.use_kernel(kernel):
        q, scale, zero_point = qk.silu_mul_quantize_dynamic(gate, up, **options)
        y = qk.silu_mul_fake_quantize_dynamic(gate, up, **options)
    assert q.dtype == torch.int8
    assert not scale.requires_grad
    same(qk.dequantize(q, scale, zero_point, dtype=dtype), y.detach())


def straight_through(gate: Tensor, up: Tensor, group_size: int | None, bits: int, symmetric: bool) -> Tensor:
    """The same in autograd alone: a quantizer that passes the gradient where it does not clip."""
    v = silu(gate) * up
    low, high = qk.ops.dynamic.range_of_bits(bits)
    scale, zero_point = dynamic_reference.dynamic_qparams(v, group_size or 0, low, high, symmetric)
    y = plain.fake_quantize_forward(v, scale, zero_point, low, high)
    inside = plain.inside_range(v, scale, zero_point, low, high)
    return torch.where(inside, v, 0) + (y - torch.where(inside, v, 0)).detach()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8, None])
def test_gradients(symmetric: bool, group_size: int | None) -> None:
    """First and second ones in fp64; fp32's and bf16's near them."""
    gate, up = (torch.randn(7, 40, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fused = partial(qk.silu_mul_fake_quantize_dynamic, bits=2, group_size=group_size, symmetric=symmetric)
    results = []
    for fn in (fused, lambda g, u: straight_through(g, u, group_size, 2, symmetric)):
        plainly = torch.autograd.grad(fn(gate, up).square().sum(), (gate, up))
        first = torch.autograd.grad(fn(gate, up).square().sum(), (gate, up), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (gate, up))
        results.append([*plainly, *(g.detach() for g in first), *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (gate, up)]
        grad = torch.randn(7, 40).to(dtype)
        got = torch.autograd.grad(fused(*leaves), leaves, grad)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        # symmetric ranges clip nothing; others may clip another element in another dtype
        if symmetric:
            want = torch.autograd.grad(silu(exact[0]) * exact[1], exact, grad.double())
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif("triton" not in kernels_of(FORWARD), reason="no Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("long", [False, True])
def test_triton(dtype: torch.dtype, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups in one tile and, by tiles made small, groups too long for one; the same bits forward and backward."""
    from qkernels.triton.common import configs

    if long:
        for name, size in (("ONE_PASS", 8), ("LONG_TILE", 16), ("TILE_SIZE", 8)):
            monkeypatch.setattr(configs, name, size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bad = torch.randn(4, 48)
    bad[0, 3], bad[1, 1], bad[1, 2], bad[2], bad[3] = math.nan, math.inf, -math.inf, 0, torch.linspace(-100, 100, 48)
    cases = [
        (bad, (-1, 16)),
        (torch.randn(2, 3, 37), (-1, 1)),
        (torch.randn(64, 3).t(), (8,)),
        (torch.randn(33), (11,)),
    ]
    for gate, groups in cases:
        gate = gate.to(dtype).to(device)
        for group in groups:
            for symmetric in (True, False):
                args = (gate, torch.randn_like(gate), group, -8, 7, symmetric)
                want = reference.silu_mul_fake_quantize_dynamic_forward(*args)
                back = (torch.randn_like(gate), *args[:2], *((None, None) if symmetric else want[1:]), -8, 7)
                with qk.use_kernel("triton"):
                    got, codes, grads = ops._forward(*args), ops._quantize(*args), ops._backward(*back)
                for a, b in zip(
                    (*got, *codes, *grads),
                    (
                        *want,
                        *reference.silu_mul_quantize_dynamic(*args),
                        *reference.silu_mul_fake_quantize_dynamic_backward(*back),
                    ),
                    strict=True,
                ):
                    same(a, b)


def test_what_triton_refuses() -> None:
    from qkernels.triton.silu_mul_quantize import unsupported

    x, one = torch.randn(4, 8), torch.ones(4, 1)
    assert unsupported(FORWARD, x, x, -1, -8, 7, True) is None
    assert "float64" in unsupported(FORWARD, x.double(), x, -1, -8, 7, True)
    assert "group_size None" in unsupported(QUANTIZE, x, x, 0, -8, 7, True)
    assert unsupported(BACKWARD, x, x, x, one, one, -8, 7) is None
    assert "scales for each row" in unsupported(BACKWARD, x, x, x, torch.ones(2, 1), None, -8, 7)


def test_memory_saved_for_backward() -> None:
    leaf = torch.randn(64, 1024, requires_grad=True)
    gate, up = leaf * 2, leaf * 3
    product = partial(qk.silu_mul_fake_quantize_dynamic, gate, up, group_size=32)
    assert saved_bytes(product) == 2 * gate.numel() * 4
    assert saved_bytes(lambda: product(symmetric=False)) == 2 * gate.numel() * 4 + 8 * 64 * 32


def op_samples() -> list[tuple[str, tuple]]:
    samples: list[tuple[str, tuple]] = []
    base = torch.randn(4, 24)
    for gate in (base, base.t().contiguous().t(), torch.empty(0, 24), base.bfloat16()):
        up = torch.randn(4, 24)[: len(gate)].to(gate)
        for symmetric, group in ((True, -1), (False, 8), (False, 0)):
            args = (gate, up, group, -8, 7, symmetric)
            samples += [(FORWARD, args), (QUANTIZE, args)]
            _, *qparams = reference.silu_mul_fake_quantize_dynamic_forward(*args)
            samples.append((BACKWARD, (up, gate, up, *((None, None) if symmetric else qparams), -8, 7)))
    return samples


@pytest.mark.parametrize("number", range(len(op_samples())))
def test_opcheck(number: int) -> None:
    op, args = op_samples()[number]
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_without_recompiles(backend: str) -> None:
    def fn(gate: Tensor, up: Tensor) -> Tensor:
        return qk.silu_mul_fake_quantize_dynamic(gate * 2, up, bits=4, group_size=8, symmetric=False)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for step, batch in enumerate((8, 5, 16)):
        leaves = [torch.randn(batch, 24, requires_grad=True) for _ in range(2)]
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            y = compiled(*leaves)
            got = torch.autograd.grad(y.square().sum(), leaves)
        want = fn(*leaves)
        same(y.detach(), want.detach())
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = [torch.randn(4, 24, requires_grad=True) for _ in range(2)]
    product = partial(qk.silu_mul_fake_quantize_dynamic, symmetric=False)
    plainly = torch.autograd.grad(product(*leaves).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(product, *leaves, use_reentrant=False).square().sum(), leaves)
    for a, b in zip(again, plainly, strict=True):
        same(a, b)


X = torch.randn(4, 6)
BAD = {
    "gate dtype": (lambda: qk.silu_mul_quantize_dynamic(X.long(), X), "gate: got torch.int64"),
    "up dtype": (lambda: qk.silu_mul_quantize_dynamic(X, X.double()), "up: got torch.float64"),
    "up shape": (
        lambda: qk.silu_mul_fake_quantize_dynamic(X, X[:, :1]),
        r"up: got shape \[4, 1\]; accepted: gate's shape \[4, 6\]",
    ),
    "dims": (lambda: qk.silu_mul_quantize_dynamic(X[0, 0], X[0, 0]), "x: got 0 dims"),
    "group_size": (lambda: qk.silu_mul_fake_quantize_dynamic(X, X, group_size=4), "group_size: got 4"),
    "group_size 0": (lambda: qk.silu_mul_fake_quantize_dynamic(X, X, group_size=0), "group_size: got 0"),
    "bits": (lambda: qk.silu_mul_fake_quantize_dynamic(X, X, bits=1), "bits: got 1"),
    "codes": (lambda: ops._quantize(X, X, -1, -200, 200, True), "quant_min, quant_max: got -200, 200"),
    "grad": (lambda: ops._backward(X.double(), X, X, None, None, -8, 7), "grad: got torch.float64"),
}


@pytest.mark.parametrize("kernel", compiled(FORWARD))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()
