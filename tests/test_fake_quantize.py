"""Fake quantization: every kernel bit for bit against the reference, gradients against autograd in fp64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, channels_last, clamp, scale_of
from compare import same
from conftest import assert_ran, kernels_of, untouched
from torch import Tensor

import qkernels as qk
from qkernels import checks
from qkernels.ops import dynamic
from qkernels.ops import fake_quantize as ops
from qkernels.ops import fake_quantize_learnable as learnable
from qkernels.ops import observe_fake_quantize as observe_ops
from qkernels.reference import dynamic as dynamic_reference
from qkernels.reference import fake_quantize as reference
from qkernels.reference import fake_quantize_learnable as learnable_reference

COMPILED = [name for name in kernels_of("fake_quantize_forward") if name not in ("triton", "reference")]
FORWARD_OPS = ("fake_quantize_forward", "fake_quantize_backward", "fake_quantize_learnable_backward")


def zero_points(shape: tuple[int, ...]) -> list[Tensor | None]:
    return [None, torch.randint(-8, 8, shape, dtype=torch.int32), torch.randn(shape) * 6, torch.tensor([-8])]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward, masks and dx on every path, all granularities, layouts and dtypes, bit for bit."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    for zero_point in zero_points(shape):
        args = (scale, zero_point, -8, 7)
        y = reference.fake_quantize_forward(x, *args)
        laid_out = torch.empty_like(y).copy_(grad)
        masks = [reference.fake_quantize_forward_mask(x, *args, lsq)[1] for lsq in (False, True)]
        dxs = [reference.fake_quantize_backward(grad, x, *args, lsq) for lsq in (False, True)]
        for kernel in COMPILED:
            with qk.use_kernel(kernel):
                same(ops._forward(x, *args), y)
                if x.numel():
                    assert_ran(kernel)
                for lsq, mask, dx in zip((False, True), masks, dxs, strict=True):
                    y_masked, bits = ops._forward_mask(x, *args, lsq)
                    same(y_masked, y)
                    same(bits, mask)
                    same(ops._backward(grad, x, *args, lsq), dx)
                    same(ops.backward_mask(laid_out, bits), torch.empty_like(y).copy_(dx))


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lsq", [False, True], ids=["clip", "lsq"])
def test_learnable_backward(name: str, shape: tuple[int, ...], dtype: torch.dtype, lsq: bool) -> None:
    """dx bit for bit; the sums within fp32 rounding of fp64, and the same bits on every path and thread count."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    for zero_point in zero_points(shape):
        args = (x, scale, zero_point, -8, 7)
        exact_sums = learnable_reference.fake_quantize_learnable_backward(grad, *args, 0.5, lsq)[
            1:
        ]  # terms as defined, in fp64
        magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
        first = None
        for kernel in COMPILED:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with qk.use_kernel(kernel):
                    got = learnable.learnable_backward(grad, *args, 0.5, lsq)
                if first is None:
                    first = got
                    same(got[0], reference.fake_quantize_backward(grad, *args, lsq))
                for a, b in zip(got, first, strict=True):
                    same(a, b)
        # 2**-20: up to 256 fp32 additions in a lane, then fp64, of terms no larger than dy·16.
        for got_sum, exact in zip(first[1:], exact_sums, strict=True):
            assert got_sum.shape == scale.shape
            if x.numel() and "special" not in name:
                error = (got_sum - exact).double().abs()
                assert (error <= magnitude * 2**-20 + 1e-12).all(), (error / magnitude).max()


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """LSQ+ written with autograd alone: round passes the gradient through, clamp does the rest."""

    def rounded(t: Tensor) -> Tensor:
        return t + (t.round() - t).detach()

    z = rounded(zero_point)
    q = rounded(x / scale) + z
    return (clamp(q, low, high) - z) * scale


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"))
@pytest.mark.parametrize("shape", [(1,), (6, 1), (1, 40), (6, 5)])
def test_gradients_against_autograd_in_fp64(kernel: str, shape: tuple[int, ...]) -> None:
    x = (torch.randn(6, 40, dtype=torch.float64) * 2).requires_grad_()
    scale = (torch.rand(shape, dtype=torch.float64) * 0.2 + 0.1).requires_grad_()
    zero_point = (torch.randn(shape, dtype=torch.float64) * 2).requires_grad_()
    grad = torch.randn(6, 40, dtype=torch.float64)
    expanded = [reference.expand(p, x) for p in (scale, zero_point)]
    expected = torch.autograd.grad(straight_through(x, *expanded, -8, 7), (x, scale, zero_point), grad)
    with qk.use_kernel(kernel):
        y = qk.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)
        got = torch.autograd.grad(y, (x, scale, zero_point), grad)
        got_fp32 = torch.autograd.grad(
            qk.fake_quantize(x.float(), scale.float(), zero_point.float(), quant_min=-8, quant_max=7, grad_factor=0.25),
            (scale, zero_point),
            grad.float(),
        )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(got_fp32, expected[1:], strict=True):
        torch.testing.assert_close(a, b * 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"))
def test_scale_learned_alone_and_shared_zero_point(kernel: str) -> None:
    x = torch.randn(4, 32)
    scale = torch.full((4, 1), 0.1, requires_grad=True)
    zero_point = torch.zeros(1, requires_grad=True)
    with qk.use_kernel(kernel):
        qk.fake_quantize(x, scale, zero_point, quant_min=-4, quant_max=3).sum().backward()
    s, z = scale.detach().double().requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    straight_through(x.double(), s.expand(4, 32), z.expand(4, 32), -4, 3).sum().backward()
    torch.testing.assert_close(scale.grad, s.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zero_point.grad, z.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.05, torch.tensor([0.05]), torch.full((8, 1), 0.05)], ids=["float", "one", "rows"])
def test_both_ways_back_give_one_gradient(dtype: torch.dtype, scale: Tensor | float) -> None:
    """A leaf is kept, an activation leaves one bit per element: the gradient is the same."""
    x = (torch.randn(8, 50) * 5).to(dtype).requires_grad_()
    grad = torch.randn(8, 50).to(dtype)
    quantize = partial(qk.fake_quantize, scale=scale, quant_min=-20, quant_max=30)
    kept = torch.autograd.grad(quantize(x), x, grad)[0]
    masked = torch.autograd.grad(quantize(x * 1), x, grad)[0]
    after_relu = torch.autograd.grad(quantize(torch.relu(x)), x, grad)[0]
    params = (torch.as_tensor(scale), None, -20, 30)
    same(kept, torch.where(reference.inside_range(x.detach(), *params), grad, 0))
    same(masked, kept)
    same(after_relu, torch.where(x > 0, kept, 0))


def saved_bytes(fn) -> int:
    """Bytes that the graph keeps for the backward pass, beyond what lives anyway."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return sum(kept.values())


def test_memory_saved_for_backward() -> None:
    leaf = torch.randn(64, 1024, requires_grad=True)
    activation = leaf * 2
    output = torch.relu(leaf)
    scale = torch.tensor([0.1])
    quantize = partial(qk.fake_quantize, scale=scale, quant_min=-8, quant_max=7)
    parameters = scale.untyped_storage().nbytes()
    assert saved_bytes(lambda: quantize(leaf)) == leaf.untyped_storage().nbytes() + parameters  # the parameter itself
    assert saved_bytes(lambda: quantize(activation)) == leaf.numel() // 8
    assert saved_bytes(lambda: quantize(output)) == output.untyped_storage().nbytes() + parameters  # relu keeps it
    assert saved_bytes(lambda: qk.fake_quantize_dynamic(activation)) == 0
    assert saved_bytes(lambda: qk.fake_quantize_dynamic(activation, symmetric=False)) == leaf.numel() // 8


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"), indirect=True)
def test_known_values(kernel: str) -> None:
    """Ties go to even before the zero point is added; infinities saturate; NaN stays; bounds are inclusive."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, math.inf, -math.inf, math.nan, 6.49, 6.51, -0.0])
    y = qk.fake_quantize(x, torch.ones(1), torch.tensor([1]), quant_min=-8, quant_max=7)
    expected = torch.tensor([0.0, 2, 2, 0, -2, 6, -9, math.nan, 6, 6, 0])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(y[-1])


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bad_scales(kernel: str, dtype: torch.dtype) -> None:
    """A dead channel gives zeros; a denormal scale acts as the smallest normal; negative and NaN scales give NaN."""
    x = torch.randn(6, 20).to(dtype)
    x[0] = 0
    scale = torch.tensor([0.0, 1e-42, -0.1, math.nan, 0.1, math.inf]).reshape(6, 1)
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7).float()
    assert (y[0] == 0).all()
    tiny = torch.finfo(torch.float32).tiny
    expected = x[1].double().sign() * torch.where(x[1] < 0, 8, 7) * tiny
    torch.testing.assert_close(y[1].double(), expected.to(dtype).double(), rtol=0, atol=0)
    assert y[2].isnan().all()
    assert y[3].isnan().all()
    assert y[4].isfinite().all()
    assert y[5].isnan().all()
    learned = learnable.learnable_backward(torch.ones_like(x), x, scale, None, -8, 7, 1.0)[1]
    assert learned[2:4].isnan().all()


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_equals_reference(kernel: str, dtype: torch.dtype, symmetric: bool) -> None:
    base = (torch.randn(6, 64) * 3).to(dtype)
    bad = base.clone()
    bad[1, 3], bad[2, 1], bad[3], bad[4] = math.nan, math.inf, 0, 1e-41
    inputs = [
        base,
        bad,
        base.t(),
        base[:, ::2],
        channels_last(torch.randn(2, 8, 4, 4).to(dtype)),
        torch.empty(0, 8, dtype=dtype),
        torch.empty(3, 0, dtype=dtype),
        (torch.rand(5, 37) + 1).to(dtype),
        (torch.randn(700) - 9).to(dtype),
    ]
    for x in inputs:
        for bits in (8, 4, 2):
            for group in (-1, 0, 2, 16, 32, 37):
                if group > 0 and x.shape[-1] % group:
                    continue
                args = (x, group, *qk.ops.dynamic.range_of_bits(bits), symmetric)
                expected = dynamic_reference.fake_quantize_dynamic_forward(*args)
                for got, want in zip(dynamic._dynamic_forward(*args), expected, strict=True):
                    same(got, want)


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_dynamic_forward"), indirect=True)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_dynamic_gradient(kernel: str, bits: int) -> None:
    x = torch.randn(16, 64, requires_grad=True)
    grad = torch.randn(16, 64)
    y, scale, zero_point = qk.fake_quantize_dynamic(x, bits=bits, group_size=32, return_qparams=True)
    assert scale.shape == (16, 2)
    assert (zero_point == 0).all()
    amax = x.detach().reshape(16, 2, 32).abs().amax(-1)
    torch.testing.assert_close(scale, amax / (2 ** (bits - 1) - 1), rtol=0, atol=0)
    same(torch.autograd.grad(y, x, grad)[0], grad)
    y, scale, zero_point = qk.fake_quantize_dynamic(x * 1, bits=bits, symmetric=False, return_qparams=True)
    low, high = qk.ops.dynamic.range_of_bits(bits)
    inside = reference.inside_range(x.detach(), scale, zero_point, low, high)
    same(torch.autograd.grad(y, x, grad)[0], torch.where(inside, grad, 0))
    assert not scale.requires_grad


@pytest.mark.parametrize("kernel", kernels_of("observe_fake_quantize"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 5, 1, 1)])
@pytest.mark.parametrize("steps", [0.0, 127.0, 127.5])
def test_observe_equals_reference(kernel: str, dtype: torch.dtype, shape: tuple[int, ...], steps: float) -> None:
    batches = [torch.randn(3, 5, 8, 7), channels_last(torch.randn(2, 5, 8, 7)), torch.randn(2, 5, 8, 7) + 9]
    batches += [batches[0] * math.nan, torch.empty(0, 5, 8, 7), torch.full((2, 5, 1, 1), math.inf)]
    flags = [(1, 1), (1, 1), (0, 1), (1, 1), (1, 1), (1, 0)]

    def run() -> list[list[Tensor]]:
        stats = [torch.full(shape, math.inf), torch.full(shape, -math.inf), torch.ones(shape)]
        stats.append(torch.zeros(shape, dtype=torch.int64))
        results = []
        for batch, (observe, fake) in zip(batches, flags, strict=True):
            out = observe_ops._observe(
                batch.to(dtype), torch.tensor([observe]), torch.tensor([fake], dtype=torch.uint8), *stats, 0.1, -128,
                127, steps, 1,
            )  # fmt: skip
            results.append([*out, *(s.clone() for s in stats)])
        return results

    with qk.use_kernel("reference"):
        expected = run()
    with qk.use_kernel(kernel):
        got = run()
    for step_got, step_expected in zip(got, expected, strict=True):
        for a, b in zip(step_got, step_expected, strict=True):
            same(a, b)
    # By hand: the statistics after two batches, kept through the batches that must not count.
    over = (0, 2, 3) if len(shape) > 1 else (0, 1, 2, 3)
    low = [batch.to(dtype).float().amin(over) for batch in batches[:2]]
    torch.testing.assert_close(got[0][2].flatten(), low[0].flatten(), rtol=0, atol=0)
    average = low[0] + torch.tensor(0.1) * (low[1] - low[0])
    torch.testing.assert_close(got[-1][2].flatten(), average.flatten(), rtol=1e-6, atol=0)


# The faults of the incumbents: each must not be ours.


def test_fault_learnable_gradient_with_negative_zero_point() -> None:
    """torch's learnable per-tensor backward truncates zp + 0.5: wrong for every negative zero point."""
    x = (torch.randn(1000, dtype=torch.float64)).requires_grad_()
    for zp in (-1.0, -2.0, -3.0, 2.5):
        scale = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
        zero_point = torch.tensor([zp], dtype=torch.float64, requires_grad=True)
        want = torch.autograd.grad(straight_through(x, scale, zero_point, -8, 7).sum(), (x, scale, zero_point))
        params = [t.detach().float().requires_grad_() for t in (x, scale, zero_point)]
        y = qk.fake_quantize_learnable_per_tensor_affine(*params, -8, 7)
        for got, expected in zip(torch.autograd.grad(y.sum(), params), want, strict=True):
            torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-3)


def test_fault_per_channel_infinity() -> None:
    """torch's per-channel CPU op maps +inf and 2**63 steps to quant_min."""
    x = torch.tensor([[1e19, 1e30, math.inf, -1e19, -math.inf]])
    y = qk.fake_quantize_per_channel_affine(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, -128, 127)
    assert y.tolist() == [[127, 127, 127, -128, -128]]


@pytest.mark.parametrize("data", ["normal", "relu", "zero"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_fault_fused_observer_trains_with_what_convert_uses(data: str, symmetric: bool, per_row: bool) -> None:
    import torch.ao.quantization as tq

    x = {"normal": torch.randn(6, 50), "relu": torch.randn(6, 50).relu() * 3, "zero": torch.zeros(6, 50)}[data]
    scheme = getattr(torch, f"per_{'channel' if per_row else 'tensor'}_{'symmetric' if symmetric else 'affine'}")
    observer_type = tq.MovingAveragePerChannelMinMaxObserver if per_row else tq.MovingAverageMinMaxObserver
    observer = observer_type(dtype=torch.qint8, qscheme=scheme, averaging_constant=0.01, quant_min=-128, quant_max=127)
    size = 0 if per_row else 1
    stats = [torch.full((size,), math.inf), torch.full((size,), -math.inf), torch.ones(size)]
    stats.append(torch.zeros(size, dtype=torch.int32))
    one = torch.ones(1, dtype=torch.int64)
    for step in range(3):
        observer(x * (1 + step))
        y = qk.fused_moving_avg_obs_fake_quant(x, one, one, *stats, 0.01, -128, 127, 0, per_row, symmetric)
        if step == 0:
            scale, zero_point = observer.calculate_qparams()
            torch.testing.assert_close(stats[2], scale, rtol=0, atol=0)
            torch.testing.assert_close(stats[3].long(), zero_point.long(), rtol=0, atol=0)
            expected = (
                torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, -128, 127)
                if per_row
                else torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), -128, 127)
            )
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
        qk.fused_moving_avg_obs_fake_quant(x * (1 + step), one, one, *stats, 0.01, -128, 127, 0, per_row, symmetric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fault_dtypes_that_torch_rejects(dtype: torch.dtype) -> None:
    """int64 zero points per channel, bf16 scales, learnable fp16, half inputs to the fused observer."""
    x = torch.randn(4, 20).to(dtype)
    scale, zero_point = torch.full((4,), 0.125), torch.tensor([-3, 0, 2, 7])
    want = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, -8, 7)
    for zp in (zero_point, zero_point.short(), zero_point.to(torch.int8), zero_point.float(), zero_point.bfloat16()):
        for s in (scale, scale.bfloat16(), scale.half(), scale.double()):
            same(qk.fake_quantize_per_channel_affine(x, s, zp, 0, -8, 7), want)
            same(qk.fake_quantize_per_channel_affine(x, s, zp, -2, -8, 7), want)
    learned = [t.requires_grad_() for t in (x.clone(), scale.to(dtype), zero_point.to(dtype))]
    qk.fake_quantize_learnable_per_channel_affine(*learned, 0, -8, 7).sum().backward()
    reference_grads = learnable_reference.fake_quantize_learnable_backward(
        torch.ones(4, 20).double(), x.double(), scale.view(4, 1).double(), zero_point.view(4, 1).double(), -8, 7, 1.0
    )
    for leaf, exact in zip(learned, reference_grads, strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact.reshape(leaf.shape), rtol=1e-2, atol=1e-3)
    stats = [torch.tensor([math.inf]), torch.tensor([-math.inf]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    one = torch.ones(1, dtype=torch.int64)
    y = qk.fused_moving_avg_obs_fake_quant(x, one, one, *stats, 0.01, -128, 127)
    assert y.dtype == dtype
    assert stats[0] == x.min().float()


def test_fault_symmetric_int4_does_not_clip_the_maximum() -> None:
    """torchao's symmetric int4 clips the largest weight of a group and stops its gradient."""
    x = torch.randn(256, 128, requires_grad=True)
    y = qk.fake_quantize_dynamic(x, bits=4, group_size=32)
    groups, out = x.detach().reshape(-1, 32), y.detach().reshape(-1, 32)
    at = groups.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(out.gather(1, at), groups.gather(1, at), rtol=1e-6, atol=0)
    y.sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("kernel", COMPILED)
def test_fault_offsets_beyond_2_31(kernel: str) -> None:
    """Elements beyond 2**31 of a lazily committed tensor, reached by strides."""
    storage = untouched(2**31 + 4096, torch.bfloat16)
    x = storage.as_strided((2, 4096), (2**31, 1))
    x.copy_(torch.randn(2, 4096))
    with qk.use_kernel(kernel):
        y = qk.fake_quantize(x, torch.tensor([[0.1], [0.2]]), quant_min=-8, quant_max=7)
    same(y, reference.fake_quantize_forward(x.contiguous(), torch.tensor([[0.1], [0.2]]), None, -8, 7))


def test_dense_tensor_beyond_2_31() -> None:
    """A dense tensor whose element numbers need 64 bits: 4 GiB in (zero pages) and 4 GiB out."""
    x = torch.empty(2, 2**30 + 2048, dtype=torch.bfloat16)
    tail = torch.randn(2, 2048).bfloat16()
    x[:, -2048:] = tail
    scale = torch.tensor([[0.1], [0.2]])
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)
    same(y[:, -2048:].contiguous(), reference.fake_quantize_forward(tail, scale, None, -8, 7))


def test_fault_dead_channels() -> None:
    """Real networks hold all-zero channels: a dynamic scale must not turn them into NaN."""
    x = torch.randn(4, 64)
    x[2] = 0
    for symmetric in (True, False):
        y, scale, _ = qk.fake_quantize_dynamic(x, symmetric=symmetric, return_qparams=True)
        assert (y[2] == 0).all()
        assert (scale > 0).all()
        assert y.isfinite().all()


# torch's signatures.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_drop_ins_equal_torch(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, 8, 8).to(dtype).requires_grad_()
    grad = torch.randn(6, 5, 8, 8).to(dtype)
    scale, zero_point = torch.tensor([0.07]), torch.tensor([3], dtype=torch.int32)
    scales, zero_points = torch.rand(5) * 0.1 + 0.01, torch.randint(-8, 8, (5,), dtype=torch.int32)
    pairs = [
        ("fake_quantize_per_tensor_affine", (0.07, 3, -8, 7)),
        ("fake_quantize_per_tensor_affine", (scale, zero_point, -8, 7)),
        ("fake_quantize_per_channel_affine", (scales, zero_points, 1, -8, 7)),
    ]
    for name, args in pairs:
        for value in (x, channels_last(x.detach()).requires_grad_()):
            ours, theirs = getattr(qk, name)(value, *args), getattr(torch, name)(value, *args)
            # fp64 is computed in fp64 here and in fp32 by torch.
            rtol = 1e-6 if dtype == torch.float64 else 0
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
            grads = [torch.autograd.grad(out, value, grad)[0] for out in (ours, theirs)]
            torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("per_channel", [False, True])
def test_learnable_drop_ins_equal_torch_where_torch_is_right(per_channel: bool) -> None:
    x = torch.randn(6, 50)
    name = f"fake_quantize_learnable_per_{'channel' if per_channel else 'tensor'}_affine"
    n = 6 if per_channel else 1
    args = (0, -8, 7, 0.3) if per_channel else (-8, 7, 0.3)
    grads = []
    for fn in (getattr(qk, name), getattr(torch, "_" + name)):
        leaves = [x.clone().requires_grad_(), torch.full((n,), 0.11, requires_grad=True)]
        leaves.append(torch.full((n,), 2.0, requires_grad=True))
        y = fn(*leaves, *args)
        y.backward(torch.linspace(-1, 1, 300).reshape(6, 50))
        grads.append([y.detach(), *(leaf.grad for leaf in leaves)])
    same(grads[0][0], grads[1][0])
    for got, want in zip(grads[0][1:], grads[1][1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_choosing_a_range_covers_its_ends() -> None:
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([2.0, 4.0, -1.0, 0.0])
    for quant_min, quant_max in ((-128, 127), (0, 255), (-8, 7), (-127, 127)):
        for symmetric in (True, False):
            scale, zero_point = qk.choose_qparams(
                low, high, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric
            )
            for value in (low, high, torch.zeros(4)):
                q = (value / scale).round() + zero_point
                assert (q >= quant_min - 1).all()
                assert (q <= quant_max + 1).all()
                if symmetric:
                    assert (q >= quant_min).all()
                    assert (q <= quant_max).all()


# The dispatcher, the compiler, threads.


def op_samples() -> list[tuple[str, tuple]]:
    x, grad = torch.randn(4, 24), torch.randn(4, 24)
    scale, zero_point = torch.rand(4, 1) * 0.1 + 0.01, torch.randint(-8, 8, (4, 1), dtype=torch.int32)
    stats = [torch.full((1,), math.inf), torch.full((1,), -math.inf), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    one = torch.ones(1, dtype=torch.int64)
    samples: list[tuple[str, tuple]] = []
    for value in (x, x.t().contiguous().t(), torch.empty(4, 0), x[:, ::2]):
        dy = grad[:, : value.shape[1]]
        for zp in (None, zero_point):
            params = (scale, zp, -8, 7)
            samples += [
                ("fake_quantize_forward", (value, *params)),
                ("fake_quantize_forward_mask", (value, *params, zp is None)),
                ("fake_quantize_backward", (dy, value, *params, zp is None)),
                ("fake_quantize_learnable_backward", (dy, value, *params, 0.5, zp is None)),
            ]
        for symmetric in (True, False):
            for group in (-1, 0):
                samples.append(("fake_quantize_dynamic_forward", (value, group, -8, 7, symmetric)))
        samples.append(("observe_fake_quantize", (value, one, one, *stats, 0.01, -128, 127, 127.0, 0)))
    for name, head in (("forward", (x,)), ("forward_mask", (x,)), ("backward", (grad, x))):
        samples.append((f"fake_quantize_{name}.scalar", (*head, 0.1, 2, -8, 7)))
    channels = (torch.rand(24) * 0.1 + 0.01, torch.randint(-8, 8, (24,), dtype=torch.int32), 1, -8, 7)
    for name, head in (("forward", (x,)), ("forward_mask", (x,)), ("backward", (grad, x))):
        samples.append((f"fake_quantize_{name}.channel", (*head, *channels)))
    samples.append(("fake_quantize_backward_bytes", (x, x > 0)))
    samples.append(("fake_quantize_backward_mask", (x, torch.randint(0, 255, (12,), dtype=torch.uint8))))
    return samples


@pytest.mark.parametrize("number", range(len(op_samples())))
def test_opcheck(number: int) -> None:
    op, args = op_samples()[number]
    packet, _, overload = op.partition(".")
    torch.library.opcheck(getattr(getattr(torch.ops.qkernels, packet), overload or "default"), args)


def test_every_op_of_the_family_is_opchecked() -> None:
    modules = ("fake_quantize", "fake_quantize_learnable", "dynamic", "observe_fake_quantize", "aten_fake_quantize")
    elsewhere = {"fake_quantize_straight_through_backward", "quantize_dynamic"}
    references = [kernel for kernel in qk.kernels() if kernel.name == qk.registry.REFERENCE]
    family = {kernel.op for kernel in references if kernel.fn.__module__.rpartition(".")[2] in modules}
    assert family - elsewhere == {op for op, _ in op_samples()}


COMPILE_CASES = {
    "static": lambda x, s, low, high: qk.fake_quantize(x * 1, s, quant_min=low, quant_max=high),
    "leaf": lambda x, s, low, high: qk.fake_quantize(x, s, quant_min=low, quant_max=high),
    "learnable": lambda x, s, low, high: qk.fake_quantize(x, s, s.detach() * 0, quant_min=low, quant_max=high),
    "channel": lambda x, s, low, high: qk.fake_quantize_per_channel_affine(
        x, s.expand(x.shape[1]), torch.zeros(x.shape[1]), 1, low, high
    ),
    "dynamic": lambda x, s, low, high: qk.fake_quantize_dynamic(x * s, bits=4, group_size=8),
    "asymmetric": lambda x, s, low, high: qk.fake_quantize_dynamic(x * s, bits=8, symmetric=False),
}


@pytest.mark.parametrize("case", COMPILE_CASES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_without_recompiles(case: str, backend: str) -> None:
    fn = COMPILE_CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    changes = [(8, 0.1, -8, 7), (8, 0.3, -8, 7), (8, 0.1, -128, 127), (16, 0.1, -2, 1), (5, 0.2, -4, 3)]
    for step, (batch, scale, low, high) in enumerate(changes):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            x = torch.randn(batch, 24, requires_grad=True)
            s = torch.tensor([scale], requires_grad=case == "learnable")
            leaves = [x, s] if s.requires_grad else [x]
            y = compiled(x, s, low, high)
            got = torch.autograd.grad(y.square().sum(), leaves)
        expected = fn(x, s, low, high)
        same(y.detach(), expected.detach())
        for a, b in zip(got, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 24))
        self.scale = torch.nn.Parameter(torch.full((16, 1), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        w = qk.fake_quantize(self.weight, self.scale, quant_min=-127, quant_max=127)
        return torch.nn.functional.linear(qk.fake_quantize_dynamic(x), w)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    layer, x = Layer().eval(), torch.randn(4, 24)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), strict=strict, dynamic_shapes={"x": {0: batch}})
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    assert "qkernels.fake_quantize_forward.default" in targets
    assert "qkernels.fake_quantize_dynamic_forward.default" in targets
    wider = torch.randn(7, 24)
    torch.testing.assert_close(program.module()(wider), layer(wider), rtol=0, atol=0)


def test_activation_checkpointing_and_autocast() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = Layer(), torch.randn(4, 24, requires_grad=True)
    layer(x).square().sum().backward()
    plain = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for got, want in zip([x.grad, *(p.grad for p in layer.parameters())], plain, strict=True):
        same(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()


TWICE = {
    "kept": lambda x: qk.fake_quantize(x, torch.tensor([0.1]), torch.tensor([2]), quant_min=-8, quant_max=7),
    "kept number": lambda x: qk.fake_quantize(x, 0.1, quant_min=-8, quant_max=7),
    "mask": lambda x: qk.fake_quantize(x * 1, 0.1, quant_min=-8, quant_max=7),
    "dynamic": lambda x: qk.fake_quantize_dynamic(x),
    "asymmetric": lambda x: qk.fake_quantize_dynamic(x, bits=4, symmetric=False),
}


@pytest.mark.parametrize("case", TWICE)
def test_second_derivative(case: str) -> None:
    """Of sum(y²): dx = 2·y·inside, and its derivative 2·inside."""
    x = torch.randn(6, 20, requires_grad=True)
    y = TWICE[case](x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = (first != 0) | (y == 0)
    assert inside.any()
    same(second, torch.where(inside, 2.0, 0.0))


def test_second_derivative_of_learned_scales_is_refused() -> None:
    x, scale = torch.randn(8, requires_grad=True), torch.tensor([0.1], requires_grad=True)
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(qk.fake_quantize(x, scale, quant_min=-8, quant_max=7).square().sum(), x)
    same(first.detach(), plain)
    with pytest.raises(RuntimeError, match="learned scales have no second derivative"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("kernel", COMPILED)
def test_threads_give_identical_bits(kernel: str) -> None:
    x, grad = torch.randn(300, 1111), torch.randn(300, 1111)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with qk.use_kernel(kernel):
            for shape in ((1,), (300, 1), (1, 1111)):
                args = (scale_of(shape).fill_(0.03), None, -8, 7)
                results.append([ops._forward(x, *args), *learnable.learnable_backward(grad, x, *args, 1.0)])
            results.append(list(dynamic._dynamic_forward(x, -1, -8, 7, False)))
    half = len(results) // 2
    for first, second in zip(results[:half], results[half:], strict=True):
        for a, b in zip(first, second, strict=True):
            same(a, b)


# Bad input: each error names the argument and what is accepted.

X = torch.randn(4, 6)
BAD = {
    "x dtype": (lambda: qk.fake_quantize(X.long(), torch.ones(1), quant_min=0, quant_max=1), "x: got torch.int64"),
    "scale dtype": (lambda: qk.fake_quantize(X, torch.ones(1).int(), quant_min=0, quant_max=1), "scale: got torch.int"),
    "scale shape": (lambda: qk.fake_quantize(X, torch.ones(4, 4), quant_min=0, quant_max=1), r"scale: got shape"),
    "scale rank": (lambda: qk.fake_quantize(X, torch.ones(4), quant_min=0, quant_max=1), r"scale: got shape \[4\]"),
    "zero_point shape": (
        lambda: qk.fake_quantize(X, torch.ones(4, 1), torch.zeros(1, 6), quant_min=0, quant_max=1),
        r"zero_point: got shape \[1, 6\]",
    ),
    "range order": (lambda: qk.fake_quantize(X, torch.ones(1), quant_min=3, quant_max=1), "quant_min: got 3, above"),
    "range size": (
        lambda: qk.fake_quantize(X, torch.ones(1), quant_min=0, quant_max=2**24 + 1),
        "quant_min, quant_max: got 0, 16777217",
    ),
    "zero_point value": (
        lambda: qk.fake_quantize(X, torch.ones(1), torch.tensor([500]), quant_min=-128, quant_max=127),
        "zero_point: got 500; accepted: quant_min to quant_max, -128 to 127",
    ),
    "zero_point number": (lambda: qk.fake_quantize(X, 0.1, 9, quant_min=-8, quant_max=7), "zero_point: got 9"),
    "zero_point tensor": (
        lambda: qk.fake_quantize(X, 0.1, torch.zeros(1), quant_min=-8, quant_max=7),
        "zero_point: got a tensor beside a float scale",
    ),
    "grad shape": (
        lambda: ops._backward(X[:2], X, torch.ones(1), None, -8, 7),
        r"grad: got shape \[2, 6\]; accepted: x's shape \[4, 6\]",
    ),
    "grad dtype": (lambda: ops._backward(X.double(), X, torch.ones(1), None, -8, 7), "grad: got torch.float64"),
    "mask": (lambda: ops.backward_mask(X, torch.zeros(2, dtype=torch.uint8)), "mask: got"),
    "group_size": (lambda: qk.fake_quantize_dynamic(X, group_size=4), "group_size: got 4; accepted: -1"),
    "group_size 0": (lambda: qk.fake_quantize_dynamic(X, group_size=0), "group_size: got 0"),
    "axis": (
        lambda: qk.fake_quantize_per_channel_affine(X, torch.ones(4), torch.zeros(4), 2, -8, 7),
        "axis: got 2; accepted: -2 to 1",
    ),
    "channels": (
        lambda: qk.fake_quantize_per_channel_affine(X, torch.ones(5), torch.zeros(5), 0, -8, 7),
        r"got shape \[5\]; accepted: one value for each of x's 4 channels",
    ),
}


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    if kernel == "triton" and case in ("axis", "channels"):
        pytest.skip("what is on the CPU goes to kernels with an axis, which only the CPU has")
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_other_device_is_named() -> None:
    """By the reference's check, as a second device is not at hand: the compiled one compares with the CPU."""
    with pytest.raises(RuntimeError, match="scale: got a tensor on meta; accepted: x's device, cpu"):
        checks.fake_quantize(X, torch.ones(1, device="meta"), None, -8, 7)


def test_bits_out_of_range() -> None:
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits: got {bits}; accepted: 2 to 8"):
            qk.fake_quantize_dynamic(X, bits=bits)


def test_a_number_as_zero_point_is_looked_at_on_every_device() -> None:
    """A kernel on a GPU looks at no value; here a device without any."""
    x, scale = torch.empty(3, device="meta"), torch.ones(1, device="meta")
    for zero_point in (-9, 8, 1.5):
        with pytest.raises(RuntimeError, match=f"zero_point: got {zero_point}; accepted: "):
            qk.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)  # type: ignore[arg-type]
    assert qk.fake_quantize(x, scale, 0, quant_min=-8, quant_max=7).shape == x.shape
