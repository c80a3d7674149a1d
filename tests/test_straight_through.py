"""Straight-through conventions: kernels against the reference, and each of them against its paper."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of
from compare import same
from conftest import kernels_of, on_backends
from gradients import saved_bytes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels import checks
from qkernels.ops.fake_quantize_learnable import straight_through_backward
from qkernels.reference import fake_quantize as clip
from qkernels.reference import fake_quantize_learnable as learnable_reference
from qkernels.reference import fake_quantize_learnable as reference

pytestmark = pytest.mark.sanitized

OP = "fake_quantize_straight_through_backward"
COMPILED = [name for name in kernels_of(OP) if name.startswith("cpu_")]


@pytest.mark.parametrize("variant", checks.WITH_TERMS)
@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> None:
    """dx bit for bit; the sums within fp32 rounding of fp64, with the same bits on every path and thread count."""
    x = INPUTS[name][0](dtype)
    if x.numel() > 10000 and dtype in (torch.float64, torch.float16):
        pytest.skip("the sums in all their shapes are tried in fp32 and bf16")
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    for zero_point in (None, torch.randn(shape) * 6):
        args = (grad, x, scale, zero_point, -8, 7, variant, 0.3, 0.5)
        expected = reference.fake_quantize_straight_through_backward(*args)
        # The terms are at most dy·16, and EWGS's dy·(1 + 0.3·16)/2 inside the range.
        magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
        first = None
        for kernel in COMPILED:
            for threads in (1, 2) if kernel == COMPILED[0] else (1,):
                torch.set_num_threads(threads)
                with qk.use_kernel(kernel):
                    got = straight_through_backward(*args)
                if x.numel():
                    assert qk.library.host.last_isa() == kernel.removeprefix("cpu_")
                same(got[0], expected[0])
                first = got if first is None else first
                for a, b in zip(got, first, strict=True):
                    same(a, b)
                for a, b in zip(got[1:], expected[1:], strict=True):
                    assert a.shape == scale.shape
                    if x.numel() and "special" not in name:
                        assert ((a - b).double().abs() <= magnitude * 2**-20 + 1e-12).all()


@pytest.mark.skipif("triton" not in kernels_of(OP), reason="no GPU, and not interpreted")
@pytest.mark.parametrize("variant", checks.WITH_TERMS)
@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
def test_triton_equals_the_reference(name: str, shape: tuple[int, ...], variant: str) -> None:
    dtype = FLOATS[GRANULARITIES.index((name, shape)) % 4]
    x = INPUTS[name][0](dtype)
    if name in ("short runs", "many channels last"):
        pytest.skip("interpreting takes too long")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    args = (grad, x, scale, torch.randn(shape) * 6, -8, 7, variant, 0.3, 0.5)
    dx, *sums = reference.fake_quantize_straight_through_backward(*args)
    with qk.use_kernel("triton"):
        got = straight_through_backward(*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
    same(got[0].cpu(), dx)
    magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
    for a, b in zip(got[1:], sums, strict=True):
        assert a.shape == b.shape
        if x.numel() and "special" not in name:
            assert ((a.cpu() - b).double().abs() <= magnitude * 2**-20 + 1e-12).all()


def rounded(t: Tensor) -> Tensor:
    return t + (t.round() - t).detach()


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x = torch.randn(6, 40, dtype=dtype) * 2
    scale = torch.rand(shape, dtype=dtype) * 0.2 + 0.1
    zero_point = torch.randn(shape, dtype=dtype) * 2
    return [t.requires_grad_() for t in (x, scale, zero_point)]


SHAPES = [(1,), (6, 1), (1, 40), (6, 5)]


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("shape", SHAPES)
def test_pass(kernel: str, shape: tuple[int, ...]) -> None:
    leaves = operands(shape)
    grad = torch.randn(6, 40, dtype=torch.float64)
    with qk.use_kernel(kernel):
        y = qk.fake_quantize(*leaves, quant_min=-8, quant_max=7, straight_through="pass")
        dx, *sums = torch.autograd.grad(y, leaves, grad)
        lsq = qk.fake_quantize(*leaves, quant_min=-8, quant_max=7)
        _, *expected = torch.autograd.grad(lsq, leaves, grad)
    same(y.detach(), lsq.detach())
    same(dx, grad)
    assert (y.detach().abs() < leaves[0].detach().abs() - 0.5).any()  # clipped
    for a, b in zip(sums, expected, strict=True):
        if kernel == "triton":  # which adds them up in another order
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            same(a, b)


def lsq_of_the_paper(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int
) -> list[Tensor]:
    """dx, dscale and dzp of every element: arXiv 1902.08153, equations 3 and 5; arXiv 2004.09576."""
    z = torch.zeros(()) if zero_point is None else zero_point.round().clamp(low, high)
    v = x / scale
    below, above = v + z <= low, v + z >= high
    dscale = grad * torch.where(below, low - z, torch.where(above, high - z, v.round() - v))
    outside = below | above
    return [torch.where(outside, 0, grad), dscale, torch.where(outside, -grad * scale, 0)]


LSQ_KERNELS = kernels_of("fake_quantize_learnable_backward")


@pytest.mark.parametrize("kernel", LSQ_KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learned", ["scale", "both", "zero_point"])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-2, 1), (0, 15), (-1, 1)])
def test_lsq(kernel: str, shape: tuple[int, ...], learned: str, low: int, high: int) -> None:
    """The public function against the papers' formulas, in fp64 and fp32; zero points of either sign, of a float."""
    x, scale, zero_point = operands(shape)
    grad = torch.randn(6, 40, dtype=torch.float64)
    expanded = [clip.expand(t.detach(), x) for t in (scale, zero_point)]
    dx, *terms = lsq_of_the_paper(grad, x.detach(), *expanded, low, high)
    expected = [dx, *(learnable_reference.sum_to(t, scale).reshape(shape) * 0.25 for t in terms)]
    scale.requires_grad_(learned != "zero_point")
    zero_point.requires_grad_(learned != "scale")
    leaves = [t for t in (x, scale, zero_point) if t.requires_grad]
    wanted = [e for e, t in zip(expected, (x, scale, zero_point), strict=True) if t.requires_grad]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-4)):
        with qk.use_kernel(kernel):
            y = qk.fake_quantize(
                x.to(dtype), scale.to(dtype), zero_point.to(dtype), quant_min=low, quant_max=high, grad_factor=0.25,
                straight_through="lsq",
            )  # fmt: skip
            got = torch.autograd.grad(y, leaves, grad.to(dtype))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# At the ends, in the half steps beyond and just inside them.
EDGES = torch.tensor(
    [-2.0, -1.9375, -2.4375, -2.5625, 1.0, 0.9375, 1.1875, 1.5, 3, -0.5, math.inf, -math.inf, math.nan]
)
PASSES = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
PASSES_CLIP = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0])
STEPS = torch.tensor([-2, -0.0625, -2, -2, 1, 0.0625, 1, 1, 1, 0.5, 1, -2, math.nan])


@pytest.mark.parametrize("kernel", LSQ_KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("zero_point", [None, torch.tensor([1]), torch.tensor([-3]), torch.tensor([2.25])])
@pytest.mark.parametrize("repeat", [1, 40])
def test_lsq_at_the_ends(kernel: str, dtype: torch.dtype, zero_point: Tensor | None, repeat: int) -> None:
    """The ends are outside; whichever way back is taken, and whether one scale or each element's own is learned."""
    z = 0 if zero_point is None else int(zero_point.round())
    convention = {"quant_min": -2 + z, "quant_max": 1 + z, "straight_through": "lsq"}
    x = (EDGES.repeat(repeat) * 0.5).to(dtype).requires_grad_()
    passes, steps = PASSES.repeat(repeat).to(dtype), STEPS.repeat(repeat)
    grad = torch.randint(1, 9, x.shape).to(dtype)
    with qk.use_kernel(kernel):
        for kept in (True, False):  # x itself, or one bit for each
            for scale in (0.5, torch.tensor([0.5]), torch.full(x.shape, 0.5)):
                z_or_zero_point = z if isinstance(scale, float) else zero_point
                y = qk.fake_quantize(x if kept else x * 1, scale, z_or_zero_point, **convention)
                same(torch.autograd.grad(y, x, grad)[0], passes * grad)
        scale = torch.full(x.shape, 0.5, requires_grad=True)
        y = qk.fake_quantize(x, scale, zero_point, **convention)
        dx, dscale = torch.autograd.grad(y, (x, scale), grad)
        finite = ~x.detach().isnan()
        one = torch.full((1,), 0.5, requires_grad=True)
        (total,) = torch.autograd.grad(
            qk.fake_quantize(x.detach()[finite], one, zero_point, **convention), one, grad[finite]
        )
        clipping = {**convention, "straight_through": "clip"}
        clip_dx = torch.autograd.grad(qk.fake_quantize(x, one.detach(), zero_point, **clipping), x, grad)[0]
    same(dx, passes * grad)
    torch.testing.assert_close(dscale, steps * grad.float(), rtol=0, atol=0, equal_nan=True)
    assert total.item() == (steps * grad.float())[finite].sum().item()
    same(clip_dx, PASSES_CLIP.repeat(repeat).to(dtype) * grad)  # torch's convention is as it was


@pytest.mark.parametrize("kernel", LSQ_KERNELS, ids=str)
def test_lsq_and_clip_where_they_differ(kernel: str) -> None:
    x, scale = torch.tensor([1.2], requires_grad=True), torch.ones(1, requires_grad=True)
    with qk.use_kernel(kernel):
        for convention, expected in (("lsq", (0, 1)), ("clip", (1, -0.2))):
            y = qk.fake_quantize(x, scale, quant_min=-2, quant_max=1, straight_through=convention)
            torch.testing.assert_close(
                torch.autograd.grad(y, (x, scale)), tuple(torch.tensor([float(e)]) for e in expected)
            )


def test_lsq_selects() -> None:
    """An infinite gradient outside the range is dropped, not multiplied by 0."""
    x, grad = torch.tensor([5.0, -7.5, 0.25]), torch.tensor([math.inf, -math.inf, 1.0])
    for kernel in LSQ_KERNELS:
        leaf = x.clone().requires_grad_()
        with qk.use_kernel(kernel):
            for scale in (torch.ones(3), torch.ones(3, requires_grad=True)):
                y = qk.fake_quantize(leaf, scale, quant_min=-2, quant_max=1, straight_through="lsq")
                same(torch.autograd.grad(y, leaf, grad)[0], torch.tensor([0.0, 0, 1]))


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """As the paper writes it: clip to [0, alpha] with autograd's own gradients, then round straight through."""
    steps = 2**bits - 1
    clipped = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    return rounded(clipped * steps / alpha.detach()) * alpha.detach() / steps


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("lowest", ["0", "signed"])
def test_pact_learns_the_papers_alpha(kernel: str, per_channel: bool, bits: int, lowest: str) -> None:
    """y, dx and dalpha where scale is computed from alpha; the paper's range starts at code 0, ours may at any."""
    quant_min = 0 if lowest == "0" else -(2 ** (bits - 1))
    quant_max = quant_min + 2**bits - 1
    zero_point = torch.full((6, 1) if per_channel else (1,), quant_min)
    x = (torch.randn(6, 40, dtype=torch.float64) * 2).requires_grad_()
    alpha = (torch.rand(6, 1, dtype=torch.float64) + 1)[: 6 if per_channel else 1].clone().requires_grad_()
    grad = torch.randn(6, 40, dtype=torch.float64)
    expected_y = pact(x, alpha, bits)
    expected = torch.autograd.grad(expected_y, (x, alpha), grad)
    by_hand = torch.where(x > alpha, grad, 0)
    by_hand = by_hand.sum(1, True) if per_channel else by_hand.sum().reshape(1, 1)
    torch.testing.assert_close(expected[1], by_hand, rtol=1e-12, atol=1e-12)
    with qk.use_kernel(kernel):
        y = qk.fake_quantize(
            x, alpha / (quant_max - quant_min), zero_point, quant_min=quant_min, quant_max=quant_max,
            straight_through="pact",
        )  # fmt: skip
        got = torch.autograd.grad(y, (x, alpha), grad)
    for a, b in zip((y, *got), (expected_y, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", kernels_of(OP), indirect=True)
def test_pact_at_the_ends(kernel: str) -> None:
    """0 <= x < alpha passes: half a step below alpha is not clipped, alpha itself is; NaN and infinities are."""
    x = torch.tensor([-0.4, 0.0, 2.6, 3.0, 3.4, math.inf, -math.inf, math.nan])
    grad = torch.tensor([1.0, 2, 3, 4, 5, math.inf, 7, 8])
    dx, dscale, dzp = straight_through_backward(
        grad[:5], x[:5], torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, 3, "pact", 0.0, 1.0
    )
    assert dx.tolist() == [0, 2, 3, 0, 0]
    assert dscale.item() == 3 * (4 + 5)
    assert dzp.item() == -(1 + 4 + 5)
    dx, dscale, _ = straight_through_backward(grad, x, torch.ones(8), None, 0, 3, "pact", 0.0, 1.0)
    assert dx.tolist() == [0, 2, 3, 0, 0, 0, 0, 0]
    assert dscale.tolist()[:7] == [0, 0, 0, 12, 15, math.inf, 0]
    assert dscale[7].isnan()


class EwgsRound(torch.autograd.Function):
    """The paper's rounding, where its error is counted in steps."""

    @staticmethod
    def forward(ctx, v: Tensor, delta: float) -> Tensor:
        ctx.delta = delta
        ctx.save_for_backward(v - v.round())
        return v.round()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (error,) = ctx.saved_tensors
        return grad * (1 + ctx.delta * grad.sign() * error), None


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delta", [0.0, 0.2, 1.0])
def test_ewgs(kernel: str, shape: tuple[int, ...], delta: float) -> None:
    """All gradients, with nothing but the gradient of rounding replaced: clipped first, then rounded."""
    leaves = operands(shape)
    x, scale, zero_point = (clip.expand(t, leaves[0]) for t in leaves)
    grad = torch.randn(6, 40, dtype=torch.float64)
    z = rounded(zero_point)
    v = x / scale + z
    clipped = torch.where(v < -8, -8.0, torch.where(v > 7, 7.0, v))
    expected = torch.autograd.grad(EwgsRound.apply(clipped - z, delta) * scale, leaves, grad)
    with qk.use_kernel(kernel):
        y = qk.fake_quantize(*leaves, quant_min=-8, quant_max=7, straight_through="ewgs", ewgs_delta=delta)
        got = torch.autograd.grad(y, leaves, grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", kernels_of(OP), indirect=True)
def test_ewgs_at_the_ends(kernel: str) -> None:
    """The ends are inside, the half steps beyond them are not."""
    x = torch.tensor([-2.4, -2.0, -1.75, 0.75, 1.0, 1.2, 9.0, math.nan])
    grad = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128])
    dx, dscale, dzp = straight_through_backward(grad, x, torch.ones(8), None, -2, 1, "ewgs", 0.5, 1.0)
    assert dx.tolist() == [0, 2, 4 * 1.125, 8 * 0.875, 16, 0, 0, 0]
    # Inside: dy·(round(v) − v·(1 + 0.5·(v − round(v)))).
    inside = [0, 4 * (-2 + 1.75 * 1.125), 8 * (1 - 0.75 * 0.875), 0]
    assert dscale.tolist()[:7] == [-2.0, *inside, 32, 64]
    assert dscale[7].isnan()
    assert dzp.tolist()[:7] == [-1, 0, 0, 0, 0, -32, -64]


def test_ewgs_in_the_papers_units() -> None:
    """x in [0, 1], L levels, the error in [0, 1] too: the paper's delta is ours times quant_max − quant_min."""
    x = torch.rand(100, dtype=torch.float64, requires_grad=True)
    grad, levels, delta = torch.randn(100, dtype=torch.float64), 4, 0.7
    error = x.detach() - (x.detach() * (levels - 1)).round() / (levels - 1)
    y = qk.fake_quantize(
        x, 1 / (levels - 1), quant_min=0, quant_max=levels - 1, straight_through="ewgs",
        ewgs_delta=delta / (levels - 1),
    )  # fmt: skip
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(dx, grad * (1 + delta * grad.sign() * error), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["clip", *checks.VARIANTS])
@pytest.mark.parametrize("scale", [0.1, torch.tensor([0.1]), torch.full((8, 1), 0.1)], ids=["float", "one", "rows"])
def test_forward_and_fixed_scales(variant: str, scale: Tensor | float) -> None:
    """y never depends on the variant; dx does not depend on whether a scale is learned too."""
    x = (torch.randn(8, 50) * 2).requires_grad_()
    grad = torch.randn(8, 50)
    quantize = partial(qk.fake_quantize, quant_min=-8, quant_max=7, straight_through=variant, ewgs_delta=0.1)
    y = quantize(x, scale, 2)
    with torch.no_grad():
        same(y.detach(), qk.fake_quantize(x, scale, 2, quant_min=-8, quant_max=7))
        same(y.detach(), quantize(x, scale, 2))
    learned = torch.as_tensor(scale).clone().reshape(-1, 1).requires_grad_()
    same(
        torch.autograd.grad(y, x, grad)[0],
        torch.autograd.grad(quantize(x, learned, torch.tensor([2])), (x, learned), grad)[0],
    )
    # x needs no gradient: the scale is learned all the same.
    (alone,) = torch.autograd.grad(quantize(x.detach(), learned, torch.tensor([2])), learned, grad)
    same(alone, torch.autograd.grad(quantize(x, learned, torch.tensor([2])), (x, learned), grad)[1])


def test_memory_saved_for_backward() -> None:
    activation = torch.randn(64, 1024, requires_grad=True) * 2
    scale = torch.tensor([0.1])
    for variant, expected in (
        ("lsq", activation.numel() // 8),
        ("pass", 0),
        ("pact", 4 * activation.numel() + 4),
        ("ewgs", 4 * activation.numel() + 4),
    ):
        quantize = partial(qk.fake_quantize, quant_min=-8, quant_max=7, straight_through=variant)
        assert saved_bytes(partial(quantize, activation, scale)) == expected


@pytest.mark.parametrize(("variant", "backend"), on_backends(checks.VARIANTS))
def test_compile_fullgraph(variant: str, backend: str) -> None:
    def fn(x: Tensor, s: Tensor) -> Tensor:
        return qk.fake_quantize(x * 1, s, quant_min=-8, quant_max=7, straight_through=variant, ewgs_delta=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for step, batch in enumerate((8, 5)):
        x, s = torch.randn(batch, 24, requires_grad=True), torch.tensor([0.1], requires_grad=True)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            got = torch.autograd.grad(compiled(x, s).square().sum(), (x, s))
        for a, b in zip(got, torch.autograd.grad(fn(x, s).square().sum(), (x, s)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", checks.WITH_TERMS)
def test_opcheck(variant: str) -> None:
    x, scale = torch.randn(4, 24), torch.rand(4, 1) * 0.1 + 0.01
    zero_point = torch.randint(-8, 8, (4, 1), dtype=torch.int32)
    for value in (x, x.t().contiguous().t(), torch.empty(4, 0), x[:, ::2]):
        dy = torch.randn(value.shape)
        for zp in (None, zero_point):
            args = (dy, value, scale, zp, -8, 7, variant, 0.1, 0.5)
            torch.library.opcheck(torch.ops.qkernels.fake_quantize_straight_through_backward.default, args)


@pytest.mark.parametrize("variant", checks.VARIANTS)
def test_activation_checkpointing(variant: str) -> None:
    x, scale = torch.randn(4, 24, requires_grad=True), torch.tensor([0.1], requires_grad=True)
    fn = partial(qk.fake_quantize, quant_min=-8, quant_max=7, straight_through=variant)
    plain = torch.autograd.grad(fn(x, scale).square().sum(), (x, scale))
    again = torch.autograd.grad(checkpoint(fn, x, scale, use_reentrant=False).square().sum(), (x, scale))
    for a, b in zip(again, plain, strict=True):
        same(a, b)


def test_second_derivatives() -> None:
    """Right where the gradient of x is dy or nothing; refused for the rest."""
    x = torch.randn(20, requires_grad=True)
    for variant in checks.VARIANTS:
        y = qk.fake_quantize(x, torch.tensor([0.1]), quant_min=-8, quant_max=7, straight_through=variant)
        loss = y.square().sum()
        if variant in ("lsq", "pass"):
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            v = x.detach() / 0.1
            passes = (v > -8) & (v < 7) if variant == "lsq" else v == v
            same(torch.autograd.grad(first.sum(), x)[0], torch.where(passes, 2.0, 0.0))
        else:
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(first.sum(), x)
    scale = torch.tensor([0.1], requires_grad=True)
    loss = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7, straight_through="lsq").square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), x)


def test_module_and_spec() -> None:
    x = torch.randn(5, 16, requires_grad=True) * 3
    x.retain_grad()
    quantizer = qk.nn.FakeQuantize(bits=4, quantizer="minmax", straight_through="pass")
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([0.5]))
    quantizer(x).sum().backward()
    same(x.grad, torch.ones(5, 16))
    config = qk.QConfig(weight=qk.QSpec(straight_through="ewgs"), input=None)
    model = qk.prepare(torch.nn.Sequential(torch.nn.Linear(16, 4)), config)
    (weight,) = (m for m in model.modules() if isinstance(m, qk.nn.FakeQuantize))
    assert weight.straight_through == "ewgs"
    assert qk.nn.FakeQuantize(bits=4, straight_through="lsq").straight_through == "lsq"
    with pytest.raises(ValueError, match="straight_through: got 'pass' with quantizer=\"ema\"; accepted"):
        qk.nn.FakeQuantize(quantizer="ema", straight_through="pass")
    with pytest.raises(ValueError, match="straight_through: got 'none'; accepted: clip, lsq, pass, pact, ewgs"):
        qk.QSpec(straight_through="none").for_input(torch.nn.Linear(2, 2))


X = torch.randn(4, 6)
ONE = torch.ones(1)
BAD = {
    "variant": (
        lambda: qk.fake_quantize(X, ONE, quant_min=-8, quant_max=7, straight_through="none"),
        "straight_through: got 'none'; accepted: clip, lsq, pass, pact, ewgs",
    ),
    "raw variant": (
        lambda: straight_through_backward(X, X, ONE, None, -8, 7, "clip", 0.0, 1.0),
        "straight_through: got 'clip'; accepted: pass, pact, ewgs",
    ),
    "delta": (
        lambda: qk.fake_quantize(X, ONE, quant_min=-8, quant_max=7, straight_through="ewgs", ewgs_delta=-1.0),
        "ewgs_delta: got -1; accepted: finite, at least 0",
    ),
    "raw delta": (
        lambda: straight_through_backward(X, X, ONE, None, -8, 7, "ewgs", math.inf, 1.0),
        "ewgs_delta: got inf; accepted: finite, at least 0",
    ),
    "grad": (
        lambda: straight_through_backward(X[:2], X, ONE, None, -8, 7, "pass", 0.0, 1.0),
        r"grad: got shape \[2, 6\]; accepted: x's shape \[4, 6\]",
    ),
    "scale": (
        lambda: straight_through_backward(X, X, torch.ones(3, 1), None, -8, 7, "pact", 0.0, 1.0),
        r"scale: got shape \[3, 1\]",
    ),
}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        call()
