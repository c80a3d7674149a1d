"""Stochastic rounding: the generator's known answers, kernels bit for bit, averages, gradients, recomputation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, channels_last, clamp, scale_of
from compare import same
from conftest import kernels_of, on_backends
from gradients import saved_bytes, straight_through
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels import checks
from qkernels.ops import stochastic as ops
from qkernels.reference import fake_quantize as nearest
from qkernels.reference import fake_quantize_learnable as learnable_reference
from qkernels.reference import quantize as reference_quantize
from qkernels.reference import stochastic as reference

pytestmark = pytest.mark.sanitized

COMPILED = [name for name in kernels_of("fake_quantize_stochastic_forward") if name.startswith("cpu_")]
fake_quantize = partial(qk.fake_quantize_stochastic, quant_min=-8, quant_max=7)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, words: str) -> None:
    """The vectors that the authors' library (Random123) publishes for philox4x32 with 10 rounds."""
    c, k, w = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    got = reference.philox(tuple(torch.tensor([v]) for v in c), (k[0], k[1]))
    assert [int(word) for word in got] == w


@pytest.mark.parametrize("kernel", kernels_of("quantize_stochastic"))
def test_kernels_draw_the_known_words(kernel: str) -> None:
    """u of the first four elements is read off by the threshold at which x stops being rounded up."""
    for seed, offset, words in (
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, 5, None),
        (2**40 + 7, -3, None),
    ):
        if words is None:
            key = (seed & reference.WORD, (seed >> 32) & reference.WORD)
            counter = (0, 0, offset & reference.WORD, (offset >> 32) & reference.WORD)
            words = tuple(int(w) for w in reference.philox(tuple(torch.tensor([c]) for c in counter), key))
        u = torch.tensor([w >> 8 for w in words], dtype=torch.float64) * 2.0**-24
        with qk.use_kernel(kernel):
            for dtype in (torch.float32, torch.float64):
                draw = partial(qk.quantize_stochastic, scale=torch.ones(1), seed=seed, offset=offset)
                assert draw(u.to(dtype)).tolist() == [0, 0, 0, 0]
                assert draw((u + 2.0**-24).to(dtype)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """y, mask, codes and dx bit for bit; the sums near those in fp64, the same on every path and thread count."""
    x = INPUTS[name][0](dtype)
    if x.numel() > 10000 and dtype in (torch.float64, torch.float16):
        pytest.skip("the sums in all their shapes are tried in fp32 and bf16")
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    for zero_point, *numbers in ((None, 3, 0, None), (torch.randn(shape) * 6, -9, 5, torch.tensor([2**33]))):
        args = (scale, zero_point, -8, 7, *numbers)
        y, mask = reference.fake_quantize_stochastic_forward(x, *args)
        codes = reference.quantize_stochastic(x, *args, torch.int8)
        gradients = reference.fake_quantize_stochastic_backward(grad, x, *args, 0.5)
        magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
        first = None
        for kernel in COMPILED:
            for threads in (1, 2) if kernel == COMPILED[0] else (1,):
                torch.set_num_threads(threads)
                with qk.use_kernel(kernel):
                    got = ops._forward(x, *args)
                    if x.numel():
                        assert qk.library.host.last_isa() == kernel.removeprefix("cpu_")
                    same(got[0], y)
                    same(got[1], mask)
                    same(ops._quantize(x, *args, torch.int8), codes)
                    sums = ops._backward(grad, x, *args, 0.5)
                same(sums[0], gradients[0])
                first = sums if first is None else first
                for a, b, exact in zip(sums[1:], first[1:], gradients[1:], strict=True):
                    same(a, b)
                    if x.numel() and "special" not in name:
                        assert ((a - exact).double().abs() <= magnitude * 2**-20 + 1e-12).all()


@pytest.mark.skipif("triton" not in kernels_of("quantize_stochastic"), reason="no GPU, and not interpreted")
@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_triton_equals_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = INPUTS[name][0](dtype)
    if name in ("short runs", "many channels last") or (x.numel() > 10000 and dtype != torch.float32):
        pytest.skip("interpreting takes too long")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    args = (scale, torch.randn(shape) * 6, -8, 7, -9, 5, torch.tensor([2**33]))
    expected = (
        *reference.fake_quantize_stochastic_forward(x, *args),
        reference.quantize_stochastic(x, *args, torch.int8),
        *reference.fake_quantize_stochastic_backward(grad, x, *args, 0.5),
    )
    there = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in (grad, x, *args)]
    with qk.use_kernel("triton"):
        got = (
            *ops._forward(*there[1:]),
            ops._quantize(*there[1:], torch.int8),
            *ops._backward(*there, 0.5),
        )
    for a, b in zip(got[:4], expected[:4], strict=True):
        same(a.cpu(), b)
    magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
    for a, b in zip(got[4:], expected[4:], strict=True):
        assert a.shape == b.shape
        if x.numel() and "special" not in name:
            assert ((a.cpu() - b).double().abs() <= magnitude * 2**-20 + 1e-12).all()


@pytest.mark.parametrize("kernel", COMPILED)
def test_every_alignment_and_code_dtype(kernel: str) -> None:
    """Runs of lengths and starts that share no factor with the blocks of four or the vectors."""
    for inner in (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 67, 509, 515, 1030):
        x = torch.randn(9, inner) * 2
        scale = torch.rand(9, 1) + 0.05
        for code, low, high in ((torch.int8, -8, 7), (torch.uint8, 0, 200), (torch.int32, -(2**24), 2**24)):
            args = (x, scale, None, low, high, 1, 2, None, code)
            expected = reference.quantize_stochastic(*args)
            with qk.use_kernel(kernel):
                same(ops._quantize(*args), expected)


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_stochastic_forward"), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_average_is_x(kernel: str, dtype: torch.dtype) -> None:
    """Within five standard deviations of the mean, at fractions of all sizes and both signs; nearest rounding fails."""
    n = 4096
    values = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.999, -0.01, -0.3, -0.5, -0.9, 3.1, -6.6, 100.3]).to(dtype)
    x = values[:, None].expand(-1, n).contiguous()
    y = qk.fake_quantize_stochastic(x, torch.ones(1), quant_min=-128, quant_max=127, seed=1)
    v = values.double()
    fraction = v - v.floor()
    sigma = (fraction * (1 - fraction) / n).sqrt()
    assert ((y.double().mean(1) - v).abs() <= 5 * sigma).all()
    assert ((y.double() == v.floor()[:, None]) | (y.double() == v.floor()[:, None] + 1)).all()
    off = (nearest.fake_quantize_forward(x, torch.ones(1), None, -128, 127).double().mean(1) - v).abs()
    assert (off > 5 * sigma).any()


def test_uniform_is_uniform_and_independent() -> None:
    """Sixteen bins by chi-square (15 degrees of freedom: 60 has p = 2e-7); neighbours, seeds and offsets unlike."""
    x = torch.empty(1 << 18)
    draws = [
        reference.uniform(x, seed, offset, None, torch.float64)
        for seed, offset in ((0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32))
    ]
    for u in draws:
        assert 0 <= u.min() < 2**-14
        assert 1 - 2**-14 < u.max() < 1
        counts = torch.histc(u, 16, 0, 1)
        expected = x.numel() / 16
        assert ((counts - expected).square() / expected).sum() < 60
    pairs = [(draws[0], other) for other in draws[1:]] + [(draws[0][:-k], draws[0][k:]) for k in (1, 2, 3, 4, 16)]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_stochastic_forward"), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_known_values(kernel: str, dtype: torch.dtype) -> None:
    """Integers stay, infinities and huge values saturate, NaN stays, −0 becomes 0, bad scales as everywhere."""
    x = torch.tensor([0, 1, -3, 6, -9, 5000, math.inf, -math.inf, math.nan, -0.0, 6.0, -8.0]).to(dtype)
    for seed in range(20):
        y = qk.fake_quantize_stochastic(x, torch.ones(1), torch.tensor([1]), quant_min=-8, quant_max=7, seed=seed)
        expected = torch.tensor([0, 1, -3, 6, -9, 6, 6, -9, math.nan, 0, 6, -8]).to(dtype)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert not torch.signbit(y[9])
    rows = torch.randn(4, 20).to(dtype)
    rows[0] = 0
    scale = torch.tensor([0.0, -0.1, math.nan, 0.1]).reshape(4, 1)
    y = fake_quantize(rows, scale, seed=0).float()
    assert (y[0] == 0).all()
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()


@pytest.mark.parametrize("kernel", kernels_of("quantize_stochastic"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_and_fake_quantization_agree(kernel: str, dtype: torch.dtype) -> None:
    x = (torch.randn(16, 41) * 3).to(dtype)
    scale, zero_point = torch.rand(16, 1) * 0.1 + 0.01, torch.randint(-100, 100, (16, 1))
    with qk.use_kernel(kernel):
        q = qk.quantize_stochastic(x, scale, zero_point, seed=5, offset=6)
        y = qk.fake_quantize_stochastic(x, scale, zero_point, quant_min=-128, quant_max=127, seed=5, offset=6)
        assert qk.quantize_stochastic(x * math.nan, scale, zero_point, seed=5)[3, 0] == zero_point[3]
    same(reference_quantize.dequantize(q, scale, zero_point, dtype), y)
    error = (y.double() - x.double()).abs()
    clipped = (q == -128) | (q == 127)
    assert ((error < scale * 1.01) | clipped).all()


def test_memory_order_decides() -> None:
    """A channels_last or transposed tensor draws in its own memory order, as its y is laid out."""
    flat = torch.rand(2 * 6 * 4 * 4)
    y = fake_quantize(flat, torch.ones(1), seed=1)
    image = flat.view(2, 4, 4, 6).permute(0, 3, 1, 2)
    assert image.is_contiguous(memory_format=torch.channels_last)
    same(fake_quantize(image, torch.ones(1), seed=1), y.view(2, 4, 4, 6).permute(0, 3, 1, 2))
    # Without gaps in its result, where x has some.
    wide = torch.stack([flat, flat], 1)[:, 0]
    same(fake_quantize(wide, torch.ones(1), seed=1), y)
    assert not torch.equal(fake_quantize(channels_last(image.contiguous()), torch.ones(1), seed=2), y.view(image.shape))


def test_seed_and_offset() -> None:
    """Equal numbers draw equally, as ints or as a tensor; other ones do not; all 64 bits of both count."""
    x = torch.rand(1000)
    draw = partial(fake_quantize, x, torch.ones(1))
    same(draw(seed=1, offset=2), draw(seed=1, offset=torch.tensor(2)))
    same(draw(seed=1, offset=-(2**62)), draw(seed=1, offset=torch.tensor([-(2**62)])))
    numbers = [(1, 2), (2, 1), (1, 3), (1, 2 + 2**32), (1 + 2**32, 2), (-1, 2), (1, -2)]
    draws = [draw(seed=seed, offset=offset) for seed, offset in numbers]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert 0.3 < (a != b).float().mean() < 0.4  # 2·E[f(1 − f)] = 1/3


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_stochastic_forward"))
@pytest.mark.parametrize("shape", [(1,), (6, 1), (1, 40), (6, 5)])
def test_gradients_against_autograd_in_fp64(kernel: str, shape: tuple[int, ...]) -> None:
    """LSQ+ by autograd alone, on x that lies exactly where the draw put it."""
    x = (torch.randn(6, 40, dtype=torch.float64) * 2).requires_grad_()
    scale = (torch.rand(shape, dtype=torch.float64) * 0.2 + 0.1).requires_grad_()
    zero_point = (torch.randn(shape, dtype=torch.float64) * 2).requires_grad_()
    grad = torch.randn(6, 40, dtype=torch.float64)
    s, z = (nearest.expand(p, x) for p in (scale, zero_point))
    v = x / s
    drawn = v.floor() + (reference.uniform(x, 3, 4, None, torch.float64) < v - v.floor())
    z = z + (z.round() - z).detach()
    y = (clamp(v + (drawn - v).detach() + z, -8, 7) - z) * s
    expected = torch.autograd.grad(y, (x, scale, zero_point), grad)
    with qk.use_kernel(kernel):
        ours = fake_quantize(x, scale, zero_point, seed=3, offset=4)
        got = torch.autograd.grad(ours, (x, scale, zero_point), grad)
        (halved,) = torch.autograd.grad(fake_quantize(x, scale, seed=3, grad_factor=0.5), scale, grad)
        (whole,) = torch.autograd.grad(fake_quantize(x, scale, seed=3), scale, grad)
    torch.testing.assert_close(ours, y, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(halved, whole / 2, rtol=1e-12, atol=0)
    assert straight_through(x, s, z, -8, 7).ne(ours).any()  # it is not rounding to nearest


def test_both_ways_back_give_one_gradient() -> None:
    """Through one bit per element where scale is fixed, from x where it is learned."""
    x = (torch.randn(8, 50) * 2).requires_grad_()
    grad, scale = torch.randn(8, 50), torch.full((8, 1), 0.2)
    masked = torch.autograd.grad(fake_quantize(x, scale, seed=1), x, grad)[0]
    learned = torch.autograd.grad(fake_quantize(x, scale.clone().requires_grad_(), seed=1), x, grad)[0]
    same(masked, learned)
    assert 0 < (masked == 0).sum() < x.numel()
    assert saved_bytes(lambda: fake_quantize(x * 1, scale, seed=1)) == x.numel() // 8
    with torch.no_grad():
        assert not fake_quantize(x, scale, seed=1).requires_grad
    assert not fake_quantize(x.detach(), scale, seed=1).requires_grad
    (first,) = torch.autograd.grad(fake_quantize(x, scale, seed=1).square().sum(), x, create_graph=True)
    same(torch.autograd.grad(first.sum(), x)[0], torch.where(masked == 0, 0.0, 2.0))
    learned_y = fake_quantize(x, scale.clone().requires_grad_(), seed=1)
    (first,) = torch.autograd.grad(learned_y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="learned scales have no second derivative"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("offset", [7, torch.tensor([7])], ids=["int", "tensor"])
@pytest.mark.parametrize("learned", [False, True])
def test_activation_checkpointing_repeats_the_draw(offset: int | Tensor, learned: bool) -> None:
    x = torch.rand(40, 24, requires_grad=True)
    scale = torch.tensor([0.3], requires_grad=learned)
    outputs = []

    def layer(x: Tensor) -> Tensor:
        y = fake_quantize(x * 2, scale, seed=11, offset=offset)
        outputs.append(y.detach())
        return y * y

    leaves = [x, scale] if learned else [x]
    plain = torch.autograd.grad(layer(x).sum(), leaves)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), leaves)
    assert len(outputs) == 3  # plain, checkpointed, and computed again
    for y in outputs[1:]:
        same(y, outputs[0])
    for a, b in zip(again, plain, strict=True):
        same(a, b)


def test_an_offset_changed_before_the_backward_pass_is_noticed() -> None:
    x, scale, step = torch.rand(8), torch.tensor([0.3], requires_grad=True), torch.tensor([0])
    y = fake_quantize(x, scale, seed=1, offset=step)
    step += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("learned", "backend"), on_backends([False, True]))
def test_compile_fullgraph_without_recompiles(backend: str, learned: bool) -> None:
    def fn(x: Tensor, s: Tensor, step: Tensor) -> Tensor:
        codes = qk.quantize_stochastic(x, s, seed=2, offset=step)
        return fake_quantize(x * 1, s, seed=1, offset=step) + codes

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    for step, batch in enumerate((8, 5, 9)):
        x, s = torch.randn(batch, 24, requires_grad=True), torch.tensor([0.3], requires_grad=learned)
        leaves = [x, s] if learned else [x]
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            y = compiled(x, s, torch.tensor([step]))
            got = torch.autograd.grad(y.square().sum(), leaves)
        expected = fn(x, s, torch.tensor([step]))
        same(y.detach(), expected.detach())
        for a, b in zip(got, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_opcheck() -> None:
    scale, zero_point = torch.rand(4, 1) * 0.1 + 0.01, torch.randint(-8, 8, (4, 1), dtype=torch.int32)
    x = torch.randn(4, 24)
    for value in (x, x.t().contiguous().t(), torch.empty(4, 0), x[:, ::2]):
        for zp, offset_tensor in ((None, None), (zero_point, torch.tensor([3]))):
            args = (value, scale, zp, -8, 7, 1, 2, offset_tensor)
            dy = torch.randn(value.shape)
            torch.library.opcheck(torch.ops.qkernels.fake_quantize_stochastic_forward.default, args)
            torch.library.opcheck(torch.ops.qkernels.fake_quantize_stochastic_backward.default, (dy, *args, 0.5))
            torch.library.opcheck(torch.ops.qkernels.quantize_stochastic.default, (*args, torch.int8))


X = torch.randn(4, 6)
ONE = torch.ones(1)
BAD = {
    "x": (lambda: fake_quantize(X.int(), ONE, seed=0), "x: got torch.int32"),
    "scale": (lambda: fake_quantize(X, torch.ones(3, 1), seed=0), r"scale: got shape \[3, 1\]"),
    "zero_point": (lambda: fake_quantize(X, ONE, torch.tensor([9]), seed=0), "zero_point: got 9"),
    "offset dtype": (
        lambda: fake_quantize(X, ONE, seed=0, offset=torch.tensor([1.0])),
        r"offset: got torch.float32 of shape \[1\]; accepted: an int, or one torch.int64 element on x's device",
    ),
    "offset shape": (
        lambda: qk.quantize_stochastic(X, ONE, seed=0, offset=torch.tensor([1, 2])),
        r"offset: got torch.int64 of shape \[2\]; accepted: an int, or one torch.int64 element",
    ),
    "code dtype": (lambda: qk.quantize_stochastic(X, ONE, seed=0, dtype=torch.int16), "dtype: got torch.int16"),
    "codes": (
        lambda: qk.quantize_stochastic(X, ONE, quant_min=-129, seed=0),
        "quant_min, quant_max: got -129, 127; accepted: what torch.int8 holds",
    ),
    "grad": (
        lambda: ops._backward(X[:2], X, ONE, None, -8, 7, 0, 0, None, 1.0),
        r"grad: got shape \[2, 6\]; accepted: x's shape \[4, 6\]",
    ),
}


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_stochastic_forward"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        call()


def test_offset_on_another_device_is_named() -> None:
    with pytest.raises(RuntimeError, match="offset: got a tensor on meta; accepted: x's device, cpu"):
        checks.offset(torch.zeros(1, dtype=torch.int64, device="meta"), X)
