"""Non-uniform quantization: every kernel bit for bit against the reference, gradients against autograd in fp64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, channels_last, clamp, scale_of
from compare import same
from conftest import kernels_of, on_backends, untouched
from gradients import saved_bytes
from torch import Tensor

import qkernels as qk
from qkernels import checks, codebooks
from qkernels.ops import codebook as ops
from qkernels.ops.fake_quantize import backward_mask
from qkernels.reference import codebook as reference
from qkernels.reference.fake_quantize import expand
from qkernels.reference.fake_quantize_learnable import sum_to

pytestmark = pytest.mark.sanitized

FORWARD = "fake_quantize_codebook_forward"
LEARNABLE = "fake_quantize_codebook_learnable_backward"
COMPILED = [name for name in kernels_of(FORWARD) if name.startswith("cpu_")]
NAN, INF = math.nan, math.inf


def some_codebooks(dtype: torch.dtype) -> list[Tensor]:
    """Every depth of the search, full and not; levels out of order, twice, far apart."""
    return [
        codebooks.nf4(),
        torch.tensor([0.7, -0.3]),
        torch.randn(7).to(dtype),  # in disorder
        torch.tensor([0.5, -1, 0.5, 0.25, 0.25, 3e38, -3e38, 0]),
        torch.randn(33, dtype=torch.float64).sort().values,
        torch.randn(100).repeat_interleave(2)[:130],
        torch.linspace(-1, 1, 256)[torch.randperm(256)],
        torch.randn(17).to(dtype),
    ]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All but the sums, on every path, all granularities, layouts and dtypes, bit for bit."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape) * 20, torch.randn(x.shape).to(dtype)
    every = some_codebooks(dtype)
    for codebook in every if x.numel() < 1000 else every[::6]:  # 16 levels and 256
        args = (scale, codebook)
        y, mask = reference.fake_quantize_codebook_forward_mask(x, *args)
        dx = reference.fake_quantize_codebook_backward(grad, x, *args)
        codes = reference.quantize_codebook(x, *args)
        back = reference.dequantize_codebook(codes, *args, dtype)
        for kernel in COMPILED:
            with qk.use_kernel(kernel):
                same(ops._forward(x, *args), y)
                if x.numel():
                    assert qk.library.host.last_isa() == kernel.removeprefix("cpu_")
                y_masked, bits = ops._forward_mask(x, *args)
                same(y_masked, y)
                same(bits, mask)
                same(ops._backward(grad, x, *args), dx)
                same(qk.quantize_codebook(x, *args), codes)
                same(qk.dequantize_codebook(codes, *args, dtype=dtype), back)
        same(torch.where(x.isnan(), torch.nan, back), y)


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_learnable_backward(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """dx bit for bit; the sums within fp32 rounding of fp64, and the same bits on every path and thread count."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape) * 20, torch.randn(x.shape).to(dtype)
    for codebook in [codebooks.nf4(), (torch.randn(130) * 2).to(dtype)][: 2 if x.numel() < 50_000 else 1]:
        exact = reference.fake_quantize_codebook_learnable_backward(grad, x, scale, codebook, 0.5, True)
        size = reference.scaled(x, scale, codebook)[0].double().abs() + codebook.double().abs().max()
        first = None
        for kernel in COMPILED:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with qk.use_kernel(kernel):
                    got = ops._learnable_backward(grad, x, scale, codebook, 0.5, True)
                    dx, dscale, nothing = ops._learnable_backward(grad, x, scale, codebook, 0.5, False)
                assert nothing.shape == (0,)
                first = first or got
                for a, b in zip((*got, dx, dscale), (*first, *first[:2]), strict=True):
                    same(a, b)
        same(first[0], exact[0])
        assert first[1].shape == scale.shape
        assert first[2].shape == codebook.shape
        assert first[2].dtype == codebook.dtype
        if x.numel() and "special" not in name:
            magnitude = sum_to(grad.double().abs() * size, scale)
            error = (first[1] - exact[1]).double().abs()
            # 2**-20: up to 64 fp32 additions in a lane, then fp64, of terms no larger than dy·size.
            assert (error <= magnitude * 2**-20 + 1e-12).all(), (error / magnitude).max()
            torch.testing.assert_close(first[2], exact[2], rtol=1e-6 if dtype == torch.float64 else 2**-7, atol=1e-6)


@pytest.mark.skipif("triton" not in kernels_of(FORWARD), reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_triton_equals_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = INPUTS[name][0](dtype)
    if x.numel() > 5000:
        pytest.skip("slow in the interpreter")
    scale, grad = scale_of(shape) * 20, torch.randn(x.shape).to(dtype)
    codebook = some_codebooks(dtype)[-1 if x.numel() % 2 else 3]
    args = (x, scale, codebook)
    codes = reference.quantize_codebook(*args)
    calls = {
        "fake_quantize_codebook_forward": args,
        "fake_quantize_codebook_forward_mask": args,
        "fake_quantize_codebook_backward": (grad, *args),
        "fake_quantize_codebook_learnable_backward": (grad, *args, 0.5, True),
        "quantize_codebook": args,
        "dequantize_codebook": (codes, scale, codebook, dtype),
    }
    for op, call in calls.items():
        if dict(qk.which(op, *call))["triton"] is not None:
            assert op == LEARNABLE
            continue
        expected = getattr(reference, op)(*call)
        with qk.use_kernel("triton"):
            got = getattr(torch.ops.qkernels, op)(*call)
        if isinstance(got, Tensor):
            got, expected = (got,), (expected,)
        for at, (a, b) in enumerate(zip(got, expected, strict=True)):
            if op == LEARNABLE and at:
                if "special" not in name:
                    torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-3, atol=1e-4)
            else:
                same(a, b)


def by_autograd(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """The definition, with distances to every level and straight-through gradients, by autograd alone."""
    v = x / expand(scale, x)
    level = codebook[(v[..., None].detach() - codebook.detach()).abs().argmin(-1)]
    clipped = clamp(v, codebook.detach().min(), codebook.detach().max())
    return (level + clipped - clipped.detach()) * expand(scale, x)


@pytest.mark.parametrize("kernel", kernels_of(LEARNABLE))
@pytest.mark.parametrize("shape", [(1,), (6, 1), (1, 40), (6, 5)])
@pytest.mark.parametrize("levels", [16, 40])
def test_gradients_against_autograd_in_fp64(kernel: str, shape: tuple[int, ...], levels: int) -> None:
    x = (torch.randn(6, 40, dtype=torch.float64) * 2).requires_grad_()
    scale = (torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_()
    codebook = torch.randn(levels, dtype=torch.float64).requires_grad_()
    grad = torch.randn(6, 40, dtype=torch.float64)
    if dict(qk.which(LEARNABLE, grad, x, scale, codebook, 1.0, True))[kernel] is not None:
        pytest.skip("not a call for this kernel")
    wanted = by_autograd(x, scale, codebook)
    expected = torch.autograd.grad(wanted, (x, scale, codebook), grad)
    with qk.use_kernel(kernel):
        y = qk.fake_quantize_codebook(x, scale, codebook)
        got = torch.autograd.grad(y, (x, scale, codebook), grad)
        floats = [t.detach().float().requires_grad_() for t in (x, scale, codebook)]
        y_fp32 = qk.fake_quantize_codebook(*floats, grad_factor=0.25)
        got_fp32 = torch.autograd.grad(y_fp32, floats[1:], grad.float())
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(got_fp32, expected[1:], strict=True):
        torch.testing.assert_close(a.double(), b * 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", kernels_of(LEARNABLE))
def test_one_of_the_two_learned(kernel: str) -> None:
    x, codebook = torch.randn(4, 32), codebooks.nf4()
    scale = torch.ones(4, 1)
    with qk.use_kernel(kernel):
        for learned, fixed in (((scale, codebook), ()), ((scale,), (codebook,)), ((codebook,), (scale,))):
            for t in (scale, codebook):
                t.grad = None
                t.requires_grad_(any(t is other for other in learned))
            qk.fake_quantize_codebook(x, scale, codebook).sum().backward()
            assert all(t.grad is None for t in fixed)
            reference_grads = reference.fake_quantize_codebook_learnable_backward(
                torch.ones(4, 32), x, scale, codebook, 1.0, True
            )
            for t in learned:
                torch.testing.assert_close(t.grad, reference_grads[1 if t is scale else 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", kernels_of(FORWARD))
def test_known_values(kernel: str) -> None:
    """Ties go to the lower level; infinities to the ends; NaN stays; the order of the levels does not matter."""
    x = torch.tensor([0.5, 0.51, -0.5, -0.49, 3.0, 3.1, INF, -INF, NAN, 2.0, -0.0]) * 2
    expected = torch.tensor([0.0, 1, -1, 0, 2, 4, 4, -1, NAN, 2, 0]) * 2
    codes = [3, 1, 0, 3, 2, 4, 4, 0, 3, 2, 3]
    codebook = torch.tensor([-1.0, 1.0, 2.0, 0.0, 4.0])
    with qk.use_kernel(kernel):
        y = qk.fake_quantize_codebook(x, torch.tensor([2.0]), codebook)
        assert qk.quantize_codebook(x, torch.tensor([2.0]), codebook).tolist() == codes
        bad = torch.tensor([0, 5, 255], dtype=torch.uint8)
        assert qk.dequantize_codebook(bad, torch.ones(1), codebook).isnan().tolist() == [False, True, True]
        x.requires_grad_()
        qk.fake_quantize_codebook(x, torch.tensor([2.0]), codebook).sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert x.grad.tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("kernel", kernels_of(FORWARD))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bad_scales_and_levels(kernel: str, dtype: torch.dtype) -> None:
    """A dead channel gives zeros; negative and NaN scales give NaN, and so does a level that is not finite."""
    x = torch.randn(5, 20).to(dtype)
    x[0] = 0
    scale = torch.tensor([0.0, 1e-42, -0.1, NAN, 0.1]).reshape(5, 1)
    with qk.use_kernel(kernel):
        y = qk.fake_quantize_codebook(x, scale, codebooks.nf4()).float()
        for bad in (NAN, INF, -INF):
            for codebook in (torch.tensor([0.5, bad, -1]), torch.tensor([bad] * 3)):
                assert qk.fake_quantize_codebook(x, scale[4:], codebook).isnan().all()
                codes = qk.quantize_codebook(x, scale[4:], codebook)
                same(codes, reference.quantize_codebook(x, scale[4:], codebook))
                assert qk.dequantize_codebook(codes, scale[4:], codebook, dtype=dtype).isnan().all()
    assert (y[0] == 0).all()
    tiny = torch.finfo(torch.float32).tiny
    same(y[1], (x[1].sign().double() * tiny).to(dtype).float())
    assert y[2].isnan().all()
    assert y[3].isnan().all()
    assert y[4].isfinite().all()


def test_absmax_scale_clips_nothing() -> None:
    """x·(1/x) never rounds to more than 1, so the largest weight of a block keeps its gradient."""
    w = (torch.randn(512, 256) * torch.logspace(-6, 6, 512)[:, None]).requires_grad_()
    scale = w.detach().abs().reshape(512, -1, 64).amax(-1)
    y = qk.fake_quantize_codebook(w, scale, codebooks.nf4())
    y.sum().backward()
    assert (w.grad == 1).all()
    assert (y.detach().abs().reshape(512, -1, 64).amax(-1) == scale).all()


def test_memory_saved_for_backward() -> None:
    leaf = torch.randn(64, 1024, requires_grad=True)
    activation, output = leaf * 2, torch.relu(leaf)
    scale, codebook = torch.tensor([0.5]), codebooks.nf4()
    quantize = partial(qk.fake_quantize_codebook, scale=scale, codebook=codebook)
    parameters = scale.untyped_storage().nbytes() + codebook.untyped_storage().nbytes()
    assert saved_bytes(lambda: quantize(leaf)) == leaf.untyped_storage().nbytes() + parameters  # the parameter itself
    assert saved_bytes(lambda: quantize(activation)) == leaf.numel() // 8
    assert saved_bytes(lambda: quantize(output)) == output.untyped_storage().nbytes() + parameters  # relu keeps it


def test_both_ways_back_give_one_gradient() -> None:
    x = torch.randn(8, 50, requires_grad=True)
    grad = torch.randn(50, 8).t()
    quantize = partial(qk.fake_quantize_codebook, scale=torch.full((8, 1), 0.9), codebook=codebooks.apot(4))
    kept = torch.autograd.grad(quantize(x), x, grad)[0]
    same(kept.contiguous(), torch.where((x.detach() / 0.9).abs() <= 1, grad, 0).contiguous())
    same(torch.autograd.grad(quantize(x * 1), x, grad)[0].contiguous(), kept.contiguous())
    for value in (lambda: quantize(x), lambda: quantize(x * 1)):  # the second derivative of sum(y²): 2·inside
        (first,) = torch.autograd.grad(value().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        same(second, torch.where((x.detach() / 0.9).abs() <= 1, 2.0, 0.0))
    scale = torch.ones(1, requires_grad=True)
    y = qk.fake_quantize_codebook(x, scale, codebooks.nf4())
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)  # as with torch's own ops
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def op_samples() -> list[tuple[str, tuple]]:
    x, grad = torch.randn(4, 24), torch.randn(4, 24)
    scale, codebook = torch.rand(4, 1) + 0.1, codebooks.nf4()
    samples: list[tuple[str, tuple]] = []
    for value in (x, x.t().contiguous().t(), torch.empty(4, 0), x[:, ::2]):
        dy, params = grad[:, : value.shape[1]], (scale, codebook)
        codes = torch.empty_like(value, dtype=torch.uint8).fill_(3)
        samples += [
            ("fake_quantize_codebook_forward", (value, *params)),
            ("fake_quantize_codebook_forward_mask", (value, *params)),
            ("fake_quantize_codebook_backward", (dy, value, *params)),
            ("fake_quantize_codebook_learnable_backward", (dy, value, *params, 0.5, True)),
            ("fake_quantize_codebook_learnable_backward", (dy, value, *params, 0.5, False)),
            ("quantize_codebook", (value, *params)),
            ("dequantize_codebook", (codes, *params, torch.bfloat16)),
        ]
    return samples


@pytest.mark.parametrize("number", range(len(op_samples())))
def test_opcheck(number: int) -> None:
    op, args = op_samples()[number]
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, args)


def test_every_op_of_the_family_is_opchecked() -> None:
    assert {k.op for k in qk.kernels() if "codebook" in k.op} == {op for op, _ in op_samples()}


COMPILE_CASES = {
    "mask": lambda x, s, c: qk.fake_quantize_codebook(x * 1, s, c),
    "leaf": lambda x, s, c: qk.fake_quantize_codebook(x, s, c),
    "learnable": lambda x, s, c: qk.fake_quantize_codebook(x, s, c, grad_factor=0.5),
    "codes": lambda x, s, c: x * qk.dequantize_codebook(qk.quantize_codebook(x, s, c), s, c),
}


@pytest.mark.parametrize(("case", "backend"), on_backends(COMPILE_CASES))
def test_compile_fullgraph_without_recompiles(case: str, backend: str) -> None:
    fn = COMPILE_CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for step, (batch, scale) in enumerate([(8, 0.5), (8, 0.8), (16, 0.5), (5, 0.9)]):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            x = torch.randn(batch, 24, requires_grad=True)
            learn = case == "learnable"
            s = torch.tensor([scale], requires_grad=learn)
            codebook = codebooks.apot(3).requires_grad_(learn)
            leaves = [x, s, codebook] if learn else [x]
            y = compiled(x, s, codebook)
            got = torch.autograd.grad(y.square().sum(), leaves)
        expected = fn(x, s, codebook)
        same(y.detach(), expected.detach())
        for a, b in zip(got, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 24))
        self.scale = torch.nn.Parameter(torch.ones(16, 1))
        self.codebook = torch.nn.Parameter(codebooks.nf4())

    def forward(self, x: Tensor) -> Tensor:
        w = qk.fake_quantize_codebook(self.weight, self.scale, self.codebook)
        return torch.nn.functional.linear(x, w)


def test_export_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = Layer(), torch.randn(4, 24, requires_grad=True)
    program = torch.export.export(layer.eval(), (x.detach(),))
    same(program.module()(x.detach()), layer(x).detach())
    layer(x).square().sum().backward()
    plain = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for got, want in zip([x.grad, *(p.grad for p in layer.parameters())], plain, strict=True):
        same(got, want)


def test_a_learned_codebook_fits_its_data() -> None:
    """Gradient steps on codebook and scale lower the error, through levels that change places."""
    x = torch.randn(64, 64)
    codebook = torch.linspace(-1, 1, 8)[torch.randperm(8)].requires_grad_()
    scale = torch.full((64, 1), 5.0, requires_grad=True)
    optimizer = torch.optim.SGD([codebook, scale], lr=0.1)
    errors = []
    for _ in range(30):
        error = (qk.fake_quantize_codebook(x, scale, codebook, grad_factor=0.5) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0], errors


@pytest.mark.parametrize("kernel", COMPILED)
def test_offsets_beyond_2_31(kernel: str) -> None:
    """Elements beyond 2**31 of a lazily committed tensor, reached by strides."""
    storage = untouched(2**31 + 4096, torch.bfloat16)
    x = storage.as_strided((2, 4096), (2**31, 1))
    x.copy_(torch.randn(2, 4096))
    scale = torch.tensor([[0.8], [0.9]])
    with qk.use_kernel(kernel):
        y = qk.fake_quantize_codebook(x, scale, codebooks.nf4())
    same(y, reference.fake_quantize_codebook_forward(x.contiguous(), scale, codebooks.nf4()))


# Bad input: each error names the argument and what is accepted.

X, ONE, NF4 = torch.randn(4, 6), torch.ones(1), codebooks.nf4()
CODES = torch.zeros(4, 6, dtype=torch.uint8)
BAD = {
    "x dtype": (lambda: qk.fake_quantize_codebook(X.long(), ONE, NF4), "x: got torch.int64"),
    "scale dtype": (lambda: qk.fake_quantize_codebook(X, ONE.int(), NF4), "scale: got torch.int32"),
    "scale shape": (lambda: qk.quantize_codebook(X, torch.ones(4, 4), NF4), r"scale: got shape \[4, 4\]"),
    "codebook dtype": (lambda: qk.fake_quantize_codebook(X, ONE, NF4.int()), "codebook: got torch.int32"),
    "codebook rank": (
        lambda: qk.fake_quantize_codebook(X, ONE, NF4.view(4, 4)),
        r"codebook: got shape \[4, 4\]; accepted: one dim of 2 to 256 levels",
    ),
    "one level": (lambda: qk.fake_quantize_codebook(X, ONE, NF4[:1]), r"codebook: got shape \[1\]"),
    "too many": (lambda: qk.quantize_codebook(X, ONE, torch.randn(257)), r"codebook: got shape \[257\]"),
    "too many for codes": (
        lambda: qk.dequantize_codebook(CODES, ONE, torch.randn(257)),
        r"codebook: got shape \[257\]",
    ),
    "codes dtype": (lambda: qk.dequantize_codebook(X.char(), ONE, NF4), "codes: got torch.int8; accepted: torch.uint8"),
    "dtype": (lambda: qk.dequantize_codebook(CODES, ONE, NF4, dtype=torch.int8), "dtype: got torch.int8; accepted"),
    "grad shape": (lambda: ops._backward(X[:2], X, ONE, NF4), r"grad: got shape \[2, 6\]; accepted: x's shape"),
    "grad dtype": (lambda: ops._learnable_backward(X.double(), X, ONE, NF4, 1.0, True), "grad: got torch.float64"),
}


@pytest.mark.parametrize("kernel", kernels_of(FORWARD))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codebooks.normal_float(9), "bits: got 9; accepted: 2 to 8"),
        (lambda: codebooks.powers_of_two(8, signed=False), "bits: got 8; accepted: 1 to 7"),
        (lambda: codebooks.apot(4, k=4), "k: got 4; accepted: 1 to 3"),
        (lambda: codebooks.kmeans(X, 1), "levels: got 1; accepted: 2 to 256"),
        (lambda: codebooks.kmeans(X[:0], 4), "x: got no values"),
        (lambda: codebooks.kmeans(X, 4, weight=-X.abs()), "weight: accepted: x's shape"),
    ],
)
def test_bad_codebooks(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_other_device_is_named() -> None:
    with pytest.raises(RuntimeError, match="codebook: got a tensor on meta; accepted: x's device, cpu"):
        checks.codebook(X, ONE, NF4.to("meta"))


def test_codes_keep_the_memory_layout() -> None:
    x = channels_last(torch.randn(2, 3, 4, 5))
    codes = qk.quantize_codebook(x, ONE, NF4)
    assert codes.stride() == x.stride()
    same(qk.dequantize_codebook(codes, ONE, NF4), qk.fake_quantize_codebook(x, ONE, NF4))


def test_mask_goes_through_the_shared_backward() -> None:
    y, mask = ops._forward_mask(X, ONE, NF4)
    same(backward_mask(y, mask), torch.where(X.abs() <= 1, y, 0))
