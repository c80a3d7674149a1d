"""ReLU fused with fake quantization: torch.relu and qk.fake_quantize bit for bit, gradients too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of, zero_points
from compare import same
from conftest import kernels_of, on_backends, paths_of, results_on
from gradients import saved_bytes
from torch import Tensor

import qkernels as qk
from qkernels import layouts
from qkernels.ops import relu_fake_quantize as ops
from qkernels.reference import fake_quantize as plain
from qkernels.reference import fake_quantize_learnable as learnable_reference
from qkernels.reference import relu_fake_quantize as reference

pytestmark = pytest.mark.sanitized

FORWARD = "relu_fake_quantize_forward"


def compiled(op: str) -> list[str]:
    """The kernels that take every input here; Triton has a test of its own below."""
    return [name for name in kernels_of(op) if name != "triton"]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
def test_equals_the_two_ops(name: str, shape: tuple[int, ...]) -> None:
    """Values, dx, masks; the sums for scale and zero point in fp64 to fp32 rounding."""
    for dtype in FLOATS:
        x = INPUTS[name][0](dtype)
        scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
        every = dtype == torch.float32 and x.numel() < 2**17  # the large inputs are there for the threads
        for zero_point in zero_points(shape) if every else [torch.randn(shape) * 6]:
            args = (scale, zero_point, -8, 7)
            r = torch.empty_like(x).copy_(x.relu())
            y = plain.fake_quantize_forward(r, *args)
            magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
            for lsq in (False, True):
                dx, *sums = learnable_reference.fake_quantize_learnable_backward(grad, r, *args, 0.5, lsq)
                dx = torch.empty_like(x).copy_(torch.where(x > 0, dx, 0))
                mask = layouts.pack_mask(plain.inside_range(r, *args, lsq) & (x > 0), y)
                for kernel in compiled(FORWARD):
                    with qk.use_kernel(kernel):
                        same(ops._forward(x, *args), y)
                        for got, want in zip(ops._forward_mask(x, *args, lsq), (y, mask), strict=True):
                            same(got, want)
                        same(ops._backward(grad, x, *args, lsq), dx)
                        got_dx, *got_sums = ops._learnable_backward(grad, x, *args, 0.5, lsq)
                    same(got_dx, dx)
                    for got, want in zip(got_sums, sums, strict=True):
                        assert got.shape == want.shape
                        assert got.dtype == want.dtype
                        if x.numel() and "special" not in name:
                            assert ((got - want).double().abs() <= magnitude * 2**-20 + 1e-12).all()


@pytest.mark.parametrize("kernel", compiled(FORWARD))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", ["nothing", "scale", "both", "zero_point"])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("convention", ["clip", "lsq"])
def test_gradients_are_those_of_the_two_functions(
    kernel: str, dtype: torch.dtype, learned: str, leaf: bool, convention: str
) -> None:
    x = (torch.randn(8, 50) * 5).to(dtype).requires_grad_()
    scale, zero_point = torch.full((8, 1), 0.2), torch.tensor([3.0])
    scale.requires_grad_(learned in ("scale", "both"))
    zero_point.requires_grad_(learned in ("zero_point", "both"))
    leaves = [t for t in (x, scale, zero_point) if t.requires_grad]
    value = x if leaf else x * 1
    options = {"quant_min": -8, "quant_max": 7, "grad_factor": 0.5, "straight_through": convention}
    grad = torch.randn(8, 50).to(dtype)
    with qk.use_kernel(kernel):
        fused = qk.relu_fake_quantize(value, scale, zero_point, **options)
        got = torch.autograd.grad(fused, leaves, grad, retain_graph=True)
    two = qk.fake_quantize(torch.relu(value), scale, zero_point, **options)
    same(fused.detach(), two.detach())
    for a, b, t in zip(got, torch.autograd.grad(two, leaves, grad), leaves, strict=True):
        if t is x:
            same(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", paths_of(FORWARD))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (4, 1), (1, 40000)])
def test_paths_and_threads_give_identical_bits(kernel: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = (torch.randn(4, 40000).to(dtype) for _ in range(2))
    args = (x, scale_of(shape), None, -8, 7)
    calls = (
        lambda: ops._forward(*args),
        lambda: ops._forward_mask(*args),
        lambda: ops._backward(grad, *args),
        lambda: ops._learnable_backward(grad, *args, 1.0),
    )
    want = results_on("cpu_scalar", 1, calls)
    for threads in (1, 2):
        for a, b in zip(results_on(kernel, threads, calls), want, strict=True):
            same(a, b)


@pytest.mark.skipif("triton" not in kernels_of(FORWARD), reason="no Triton")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("name", "shape"), [("special values", (17,)), ("odd", (7, 1)), ("odd", (1, 33)), ("sliced", (1,))]
)
def test_triton(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, scale = INPUTS[name][0](dtype).to(device), scale_of(shape).to(device)
    grad = torch.randn(x.shape).to(x)
    for zero_point, lsq in ((None, True), (None, False), ((torch.randn(shape) * 6).to(device), True)):
        args = (x, scale, zero_point, -8, 7)
        want_sums = reference.relu_fake_quantize_learnable_backward(grad, *args, 0.5, lsq)
        with qk.use_kernel("triton"):
            same(ops._forward(*args), reference.relu_fake_quantize_forward(*args))
            for got, want in zip(
                ops._forward_mask(*args, lsq), reference.relu_fake_quantize_forward_mask(*args, lsq), strict=True
            ):
                same(got, want)
            same(ops._backward(grad, *args, lsq), want_sums[0])
            dx, *sums = ops._learnable_backward(grad, *args, 0.5, lsq)
        same(dx, want_sums[0])
        if name != "special values":
            for got, want in zip(sums, want_sums[1:], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_numbers_for_parameters() -> None:
    for dtype in FLOATS:
        x = torch.randn(40).to(dtype)
        same(
            qk.relu_fake_quantize(x, 0.1, 3, quant_min=0, quant_max=15),
            qk.fake_quantize(x.relu(), 0.1, 3, quant_min=0, quant_max=15),
        )


def test_memory_saved_for_backward() -> None:
    """An activation leaves one bit per element; relu alone keeps its whole output."""
    leaf = torch.randn(64, 1024, requires_grad=True)
    activation, scale = leaf * 2, torch.tensor([0.1])
    quantize = partial(qk.relu_fake_quantize, quant_min=0, quant_max=15)
    assert saved_bytes(lambda: quantize(activation, scale)) == leaf.numel() // 8
    assert saved_bytes(lambda: quantize(leaf, scale)) == leaf.numel() * 4 + 4  # the leaf itself
    assert saved_bytes(lambda: quantize(activation, scale.clone().requires_grad_())) == leaf.numel() * 4 + 4


def test_second_derivative() -> None:
    for leaf, convention in ((True, "clip"), (False, "clip"), (True, "lsq"), (False, "lsq")):
        x = torch.randn(6, 20, requires_grad=True)
        y = qk.relu_fake_quantize(x if leaf else x * 1, 0.1, quant_min=0, quant_max=15, straight_through=convention)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        end = 15.5 if convention == "clip" else 15
        same(second, torch.where((x > 0) & (x.detach() / 0.1 < end), 2.0, 0.0))
    scale = torch.tensor([0.1], requires_grad=True)
    y = qk.relu_fake_quantize(x, scale, quant_min=0, quant_max=15)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)  # as with torch's own ops
    with pytest.raises(RuntimeError, match="learned scales have no second derivative"):
        first.sum().backward()


def op_samples() -> list[tuple[str, tuple]]:
    x, grad = torch.randn(4, 24), torch.randn(4, 24)
    scale, zero_point = torch.rand(4, 1) * 0.1 + 0.01, torch.randint(-8, 8, (4, 1), dtype=torch.int32)
    samples: list[tuple[str, tuple]] = []
    for value in (x, x.t().contiguous().t(), torch.empty(4, 0), x[:, ::2]):
        dy = grad[:, : value.shape[1]]
        for zp in (None, zero_point):
            params = (scale, zp, -8, 7)
            samples += [
                ("relu_fake_quantize_forward", (value, *params)),
                ("relu_fake_quantize_forward_mask", (value, *params, zp is None)),
                ("relu_fake_quantize_backward", (dy, value, *params, zp is None)),
                ("relu_fake_quantize_learnable_backward", (dy, value, *params, 0.5, zp is None)),
            ]
    return samples


@pytest.mark.parametrize("number", range(len(op_samples())))
def test_opcheck(number: int) -> None:
    op, args = op_samples()[number]
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, args)


@pytest.mark.parametrize(("learned", "backend"), on_backends([True, False]))
def test_compile_fullgraph_without_recompiles(backend: str, learned: bool) -> None:
    def fn(x: Tensor, s: Tensor) -> Tensor:
        return qk.relu_fake_quantize(x * 2, s, quant_min=0, quant_max=15)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    scale = torch.tensor([0.1], requires_grad=learned)
    for step, batch in enumerate((8, 5, 16)):
        x = torch.randn(batch, 24, requires_grad=True)
        leaves = [x, scale] if learned else [x]
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            y = compiled(x, scale)
            got = torch.autograd.grad(y.square().sum(), leaves)
        want = fn(x, scale)
        same(y.detach(), want.detach())
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x, scale = torch.randn(4, 24, requires_grad=True), torch.tensor([0.1], requires_grad=True)
    quantize = partial(qk.relu_fake_quantize, quant_min=0, quant_max=15)
    plainly = torch.autograd.grad(quantize(x, scale).square().sum(), (x, scale))
    again = torch.autograd.grad(checkpoint(quantize, x, scale, use_reentrant=False).square().sum(), (x, scale))
    for a, b in zip(again, plainly, strict=True):
        same(a, b)


X = torch.randn(4, 6)
BAD = {
    "x dtype": (lambda: qk.relu_fake_quantize(X.long(), torch.ones(1), quant_min=0, quant_max=1), "x: got torch.int64"),
    "scale dtype": (
        lambda: qk.relu_fake_quantize(X, torch.ones(1).int(), quant_min=0, quant_max=1),
        "scale: got torch.int",
    ),
    "scale shape": (lambda: qk.relu_fake_quantize(X, torch.ones(4), quant_min=0, quant_max=1), r"scale: got shape \[4"),
    "range order": (lambda: qk.relu_fake_quantize(X, 0.1, quant_min=3, quant_max=1), "quant_min: got 3, above"),
    "zero_point value": (
        lambda: qk.relu_fake_quantize(X, 0.1, 500, quant_min=-128, quant_max=127),
        "zero_point: got 500; accepted: quant_min to quant_max",
    ),
    "zero_point tensor": (
        lambda: qk.relu_fake_quantize(X, 0.1, torch.zeros(1), quant_min=-8, quant_max=7),
        "zero_point: got a tensor beside a float scale",
    ),
    "grad shape": (lambda: ops._backward(X[:2], X, torch.ones(1), None, -8, 7), r"grad: got shape \[2, 6\]"),
}


@pytest.mark.parametrize("kernel", compiled(FORWARD))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()
