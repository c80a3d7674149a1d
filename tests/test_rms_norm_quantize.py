"""RMSNorm fused with dynamic quantization: exact after rstd, rstd against fp64, gradients against autograd in fp64."""

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
from torch.nn.functional import rms_norm

import qkernels as qk
from qkernels.ops import rms_norm_quantize as ops
from qkernels.reference import dynamic as dynamic_reference
from qkernels.reference import fake_quantize as plain
from qkernels.reference import rms_norm_quantize as reference

pytestmark = pytest.mark.sanitized

FORWARD, QUANTIZE, BACKWARD = (
    "rms_norm_fake_quantize_dynamic_forward",
    "rms_norm_quantize_dynamic",
    "rms_norm_fake_quantize_dynamic_backward",
)
EPS = 1e-6


def compiled(op: str) -> list[str]:
    """The kernels that take every input here; Triton has tests of its own below."""
    return [name for name in kernels_of(op) if name != "triton"]


def inputs(dtype: torch.dtype) -> list[Tensor]:
    base = (torch.randn(6, 64) * 3).to(dtype)
    bad = base.clone()
    bad[1, 3], bad[2, 1], bad[3], bad[4] = math.nan, math.inf, 0, 1e-30
    return [
        base,
        bad,
        base.t(),
        base[:, ::2],
        base[0],
        base[:1, :1].expand(3, 48),
        torch.randn(2, 3, 37).to(dtype) - 9,
        torch.randn(2, 20000).to(dtype),
        torch.empty(0, 8, dtype=dtype),
        torch.empty(3, 0, dtype=dtype),
        torch.randn(5, 1).to(dtype),
    ]


def weights(x: Tensor) -> list[Tensor | None]:
    w = torch.randn(x.shape[-1])
    return [None, w.to(x.dtype), w.bfloat16() if x.dtype == torch.float32 else w]


@pytest.mark.parametrize("kernel", compiled(FORWARD))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_values(kernel: str, dtype: torch.dtype, symmetric: bool) -> None:
    """rstd within 2**-21 of fp64's; y, codes, scale and zero point are what that rstd gives, bit for bit."""
    for x in inputs(dtype):
        exact = 1 / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
        for weight, group, bits in zip(weights(x) * 2, (-1, 16, 37, -1, 10000, 0), (8, 4, 8, 2, 8, 8), strict=True):
            if group > 0 and x.shape[-1] % group:
                continue
            args = (group, *qk.ops.dynamic.range_of_bits(bits), symmetric)
            with qk.use_kernel(kernel):
                *got, rstd = ops._forward(x, weight, EPS, *args)
                *got_codes, rstd_codes = ops._quantize(x, weight, EPS, *args)
            torch.testing.assert_close(
                rstd.double(), exact, rtol=2**-21 if dtype != torch.float64 else 1e-14, atol=0, equal_nan=True
            )
            same(rstd_codes, rstd)
            for a, b in zip(got, reference.given_rstd(x, weight, rstd, *args), strict=True):
                same(a, b)
            for a, b in zip(got_codes, reference.given_rstd_quantized(x, weight, rstd, *args), strict=True):
                same(a, b)


@pytest.mark.parametrize("kernel", compiled(FORWARD), indirect=True)
@pytest.mark.parametrize("group_size", [-1, 32, 8])
def test_near_the_unfused_sequence(kernel: str, group_size: int) -> None:
    """At most one step from fake_quantize_dynamic of torch's norm, and rarely that."""
    x, weight = torch.randn(50, 256) * 2, torch.rand(256) + 0.5
    y = qk.rms_norm_fake_quantize_dynamic(x, weight, group_size=group_size)
    with qk.use_kernel("reference"):
        want, scale, _ = qk.fake_quantize_dynamic(
            rms_norm(x, (256,), weight), group_size=group_size, return_qparams=True
        )
    steps = ((y - want) / plain.expand(scale, x)).abs()
    assert steps.max() < 1.001
    assert (steps > 0.5).float().mean() < 1e-3


def test_default_eps_is_torchs() -> None:
    for dtype in FLOATS:
        x = (torch.randn(4, 64) * 1e-3).to(dtype)
        want = rms_norm(x.double(), (64,), eps=None if dtype == torch.float64 else torch.finfo(torch.float32).eps)
        torch.testing.assert_close(rms_norm(x, (64,)).double(), want, rtol=1e-2, atol=1e-2)
        y = qk.rms_norm_fake_quantize_dynamic(x)
        torch.testing.assert_close(y.double(), want, rtol=0, atol=float(want.abs().max()) / 100)


@pytest.mark.parametrize("kernel", compiled(QUANTIZE))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_fake_quantized_values(kernel: str, dtype: torch.dtype, symmetric: bool) -> None:
    """A converted model computes what the trained one did."""
    x, weight = torch.randn(9, 96).to(dtype), torch.randn(96, requires_grad=True)
    for group_size in (-1, 32, None):
        options = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
        with qk.use_kernel(kernel):
            y = qk.rms_norm_fake_quantize_dynamic(x, weight, **options)
            q, scale, zero_point = qk.rms_norm_quantize_dynamic(x, weight, **options)
        assert q.dtype == torch.int8
        assert not scale.requires_grad
        same(qk.dequantize(q, scale, zero_point, dtype=dtype), y.detach())


def straight_through(x: Tensor, weight: Tensor | None, group_size: int | None, bits: int, symmetric: bool) -> Tensor:
    """The same in autograd alone: torch's norm, and a quantizer that passes the gradient where it does not clip."""
    v = rms_norm(x, x.shape[-1:], weight, EPS)
    low, high = qk.ops.dynamic.range_of_bits(bits)
    scale, zero_point = dynamic_reference.dynamic_qparams(v, group_size or 0, low, high, symmetric)
    y = plain.fake_quantize_forward(v, scale, zero_point, low, high)
    inside = plain.inside_range(v, scale, zero_point, low, high)
    return torch.where(inside, v, 0) + (y - torch.where(inside, v, 0)).detach()


@pytest.mark.parametrize("kernel", compiled(BACKWARD))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group_size"), [((7, 40), -1), ((2, 5, 48), 8), ((3, 33), 11), ((600, 130), -1)])
@pytest.mark.parametrize("with_weight", [True, False])
def test_gradients(kernel: str, symmetric: bool, shape: tuple[int, ...], group_size: int, with_weight: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) if with_weight else None
    grad = torch.randn(shape, dtype=torch.float64)
    leaves = [x] if weight is None else [x, weight]
    want = torch.autograd.grad(straight_through(x, weight, group_size, 2, symmetric), leaves, grad)
    options = {"eps": EPS, "bits": 2, "group_size": group_size, "symmetric": symmetric}
    got = torch.autograd.grad(qk.rms_norm_fake_quantize_dynamic(x, weight, **options), leaves, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        # The raw op on exactly representable inputs, so that only its own arithmetic differs from fp64's.
        args = [t.detach().to(dtype) for t in (grad, x)]
        w = None if weight is None else weight.detach().to(dtype)
        *qparams, rstd = ops._forward(args[1], w, EPS, group_size, -2, 1, symmetric)[1:]
        clipped = (None, None) if symmetric else qparams
        with qk.use_kernel(kernel):
            dx, dweight = ops._backward(*args, w, rstd, *clipped, -2, 1, True)
            again = ops._backward(*args, w, rstd, *clipped, -2, 1, True)
            without = ops._backward(*args, w, rstd, *clipped, -2, 1, False)
        want_dx, want_dw = reference.rms_norm_fake_quantize_dynamic_backward(*args, w, rstd, *clipped, -2, 1, True)
        same(again[0], dx)
        same(again[1], dweight)
        same(without[0], dx)
        assert without[1].numel() == 0
        rows = x.numel() // shape[-1]
        torch.testing.assert_close(dx, want_dx, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dweight, want_dw, rtol=tolerance, atol=tolerance * rows**0.5)


@pytest.mark.parametrize("kernel", compiled(BACKWARD))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward_takes_every_input(kernel: str, dtype: torch.dtype) -> None:
    for x in inputs(dtype):
        grad = torch.randn(x.shape).to(dtype)
        for weight in weights(x):
            for symmetric in (True, False):
                *qparams, rstd = reference.rms_norm_fake_quantize_dynamic_forward(
                    x, weight, EPS, -1, -128, 127, symmetric
                )[1:]
                args = (grad, x, weight, rstd, *((None, None) if symmetric else qparams), -128, 127, True)
                with qk.use_kernel(kernel):
                    got = ops._backward(*args)
                want = reference.rms_norm_fake_quantize_dynamic_backward(*args)
                for a, b in zip(got, want, strict=True):
                    assert a.dtype == b.dtype
                    assert a.stride() == b.stride()
                    tolerance = max(1e-4, 2 * torch.finfo(a.dtype).eps)
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("kernel", compiled(BACKWARD))
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (1, 3, 1), (1, 1, 30), (1, 3, 5), (4, 3, 30)])
def test_backward_takes_any_granularity(kernel: str, shape: tuple[int, ...]) -> None:
    x, grad, weight = torch.randn(4, 3, 30) * 2, torch.randn(4, 3, 30), torch.randn(30)
    scale, zero_point = torch.rand(shape) * 0.1, torch.randint(-8, 8, shape, dtype=torch.int32)
    args = (grad, x, weight, reference.rstd_of(x, EPS), scale, zero_point, -8, 7, True)
    with qk.use_kernel(kernel):
        got = ops._backward(*args)
    for a, b in zip(got, reference.rms_norm_fake_quantize_dynamic_backward(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", paths_of(FORWARD))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", [-1, 40, 0])
def test_paths_and_threads_give_identical_bits(kernel: str, dtype: torch.dtype, group_size: int) -> None:
    x, grad = torch.randn(2, 70, 1160).to(dtype)
    args = (x, torch.randn(1160), EPS, group_size, -8, 7, False)
    scale, zero_point, rstd = reference.rms_norm_fake_quantize_dynamic_forward(*args)[1:]
    calls = (
        lambda: ops._forward(*args),
        lambda: ops._quantize(*args),
        lambda: ops._backward(grad, *args[:2], rstd, scale, zero_point, -8, 7, True),
        lambda: ops._backward(grad, *args[:2], rstd, None, None, -8, 7, True),
    )
    want = results_on("cpu_scalar", 1, calls)
    for threads in (1, 2):
        for a, b in zip(results_on(kernel, threads, calls), want, strict=True):
            same(a, b)


@pytest.mark.parametrize("kernel", compiled(FORWARD))
def test_any_nan_in_weight_stays_one(kernel: str) -> None:
    """Rounding to bf16 must not carry its bits into the sign."""
    weight = torch.full((8,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    with qk.use_kernel(kernel):
        assert ops._forward(torch.ones(3, 8, dtype=torch.bfloat16), weight, EPS, -1, -8, 7, True)[0].isnan().all()


@pytest.mark.skipif("triton" not in kernels_of(FORWARD), reason="no Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("long", [False, True])
def test_triton(dtype: torch.dtype, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in one tile and, by tiles made small, rows too long for one; forward and backward."""
    from qkernels.triton.common import configs

    if long:
        for name, size in (("ONE_PASS", 8), ("LONG_TILE", 16), ("BACKWARD_ROW", 16)):
            monkeypatch.setattr(configs, name, size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bad = torch.randn(4, 48)
    bad[0, 3], bad[1, 1], bad[2], bad[3, :40] = math.nan, math.inf, 0, 1e-30
    cases = [
        (bad, (-1, 16)),
        (torch.randn(2, 3, 37), (-1, 1)),
        (torch.randn(64, 3).t(), (8,)),
        (torch.randn(33), (11,)),
    ]
    for case, (x, groups) in enumerate(cases):
        x = x.to(dtype).to(device)
        weight = (None, torch.randn(x.shape[-1]), torch.randn(x.shape[-1]).to(dtype))[case % 3]
        weight = weight if weight is None else weight.to(device)
        for group in groups:
            for symmetric in (True, False):
                args = (group, -8, 7, symmetric)
                with qk.use_kernel("triton"):
                    *got, rstd = ops._forward(x, weight, EPS, *args)
                    *codes, _ = ops._quantize(x, weight, EPS, *args)
                torch.testing.assert_close(rstd, reference.rstd_of(x, EPS), rtol=2**-21, atol=0, equal_nan=True)
                for a, b in zip(got, reference.given_rstd(x, weight, rstd, *args), strict=True):
                    same(a, b)
                for a, b in zip(codes, reference.given_rstd_quantized(x, weight, rstd, *args), strict=True):
                    same(a, b)
                back = (torch.randn_like(x), x, weight, rstd, *((None, None) if symmetric else got[1:]), -8, 7, True)
                with qk.use_kernel("triton"):
                    grads = ops._backward(*back)
                for a, b in zip(grads, reference.rms_norm_fake_quantize_dynamic_backward(*back), strict=True):
                    tolerance = max(1e-5, 2 * torch.finfo(a.dtype).eps)
                    assert a.dtype == b.dtype
                    assert a.stride() == b.stride()
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.skipif("triton" not in kernels_of(FORWARD), reason="no Triton")
def test_triton_sums_the_rows_of_many_programs() -> None:
    x, weight, grad = torch.randn(1030, 5), torch.randn(5), torch.randn(1030, 5)
    rstd = reference.rstd_of(x, EPS)
    args = (grad, x, weight, rstd, None, None, -8, 7, True)
    if torch.cuda.is_available():
        args = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
    with qk.use_kernel("triton"):
        got = ops._backward(*args)
    for a, b in zip(got, reference.rms_norm_fake_quantize_dynamic_backward(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_what_triton_refuses() -> None:
    from qkernels.triton.rms_norm_quantize import unsupported

    x, one = torch.randn(4, 8), torch.ones(4, 1)
    assert unsupported(FORWARD, x, None, EPS, -1, -8, 7, True) is None
    assert "float64" in unsupported(FORWARD, x.double(), None, EPS, -1, -8, 7, True)
    assert "group_size None" in unsupported(QUANTIZE, x, None, EPS, 0, -8, 7, True)
    assert unsupported(BACKWARD, x, x, None, one, one, one, -8, 7, True) is None
    assert "scales for each row" in unsupported(BACKWARD, x, x, None, one, torch.ones(2, 1), None, -8, 7, True)


def test_memory_saved_for_backward() -> None:
    leaf, weight = torch.randn(64, 1024, requires_grad=True), torch.ones(1024, requires_grad=True)
    x = leaf * 2
    kept = x.numel() * 4 + 1024 * 4 + 64 * 4  # x, weight, rstd
    norm = partial(qk.rms_norm_fake_quantize_dynamic, x, weight, group_size=32)
    assert saved_bytes(norm) == kept
    assert saved_bytes(lambda: norm(symmetric=False)) == kept + 8 * 64 * 32


@pytest.mark.parametrize("symmetric", [True, False])
def test_second_derivative(symmetric: bool) -> None:
    """With create_graph the backward pass is right as a function of grad, x and weight."""
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    seconds = []
    for fn in (
        lambda: qk.rms_norm_fake_quantize_dynamic(x, weight, eps=EPS, bits=4, symmetric=symmetric),
        lambda: straight_through(x, weight, -1, 4, symmetric),
    ):
        first = torch.autograd.grad(fn().square().sum(), (x, weight), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def op_samples() -> list[tuple[str, tuple]]:
    samples: list[tuple[str, tuple]] = []
    base = torch.randn(4, 24)
    for x in (base, base.t().contiguous().t(), torch.empty(0, 24), base.bfloat16()):
        for weight, symmetric, group in ((None, True, -1), (torch.randn(24), False, 8), (torch.randn(24), False, 0)):
            args = (x, weight, EPS, group, -8, 7, symmetric)
            samples += [(FORWARD, args), (QUANTIZE, args)]
            *qparams, rstd = reference.rms_norm_fake_quantize_dynamic_forward(*args)[1:]
            clipped = (None, None) if symmetric else qparams
            samples.append((BACKWARD, (torch.randn(4, 24)[: len(x)].to(x), x, weight, rstd, *clipped, -8, 7, True)))
    return samples


@pytest.mark.parametrize("number", range(len(op_samples())))
def test_opcheck(number: int) -> None:
    op, args = op_samples()[number]
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_without_recompiles(backend: str) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return qk.rms_norm_fake_quantize_dynamic(x * 2, w, bits=4, group_size=8, symmetric=False)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    weight = torch.rand(24, requires_grad=True)
    for step, batch in enumerate((8, 5, 16)):
        x = torch.randn(batch, 24, requires_grad=True)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            y = compiled(x, weight)
            got = torch.autograd.grad(y.square().sum(), (x, weight))
        want = fn(x, weight)
        same(y.detach(), want.detach())
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), (x, weight)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x, weight = torch.randn(4, 24, requires_grad=True), torch.rand(24, requires_grad=True)
    norm = partial(qk.rms_norm_fake_quantize_dynamic, symmetric=False)
    plainly = torch.autograd.grad(norm(x, weight).square().sum(), (x, weight))
    again = torch.autograd.grad(checkpoint(norm, x, weight, use_reentrant=False).square().sum(), (x, weight))
    for a, b in zip(again, plainly, strict=True):
        same(a, b)


X = torch.randn(4, 6)
BAD = {
    "x dtype": (lambda: qk.rms_norm_quantize_dynamic(X.long()), "x: got torch.int64"),
    "x dims": (lambda: qk.rms_norm_quantize_dynamic(X[0, 0], group_size=None), "x: got 0 dims"),
    "weight dtype": (lambda: qk.rms_norm_quantize_dynamic(X, X[0].long()), "weight: got torch.int64"),
    "weight shape": (
        lambda: qk.rms_norm_fake_quantize_dynamic(X, X),
        r"weight: got shape \[4, 6\]; accepted: x's last dim, \[6\]",
    ),
    "group_size": (lambda: qk.rms_norm_fake_quantize_dynamic(X, group_size=4), "group_size: got 4"),
    "group_size 0": (lambda: qk.rms_norm_fake_quantize_dynamic(X, group_size=0), "group_size: got 0"),
    "bits": (lambda: qk.rms_norm_fake_quantize_dynamic(X, bits=9), "bits: got 9"),
    "codes": (lambda: ops._quantize(X, None, EPS, -1, -200, 200, True), "quant_min, quant_max: got -200, 200"),
    "rstd shape": (
        lambda: ops._backward(X, X, None, torch.ones(3, 1), None, None, -8, 7, True),
        r"rstd: got torch.float32 of shape \[3, 1\]",
    ),
    "rstd dtype": (
        lambda: ops._backward(X, X, None, torch.ones(4, 1).double(), None, None, -8, 7, True),
        r"rstd: got torch.float64 of shape \[4, 1\]",
    ),
    "grad": (
        lambda: ops._backward(X[:2], X, None, torch.ones(4, 1), None, None, -8, 7, True),
        r"grad: got shape \[2, 6\]",
    ),
}


@pytest.mark.parametrize("kernel", compiled(FORWARD))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()
