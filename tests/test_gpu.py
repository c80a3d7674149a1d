"""What only a GPU can show: every GPU kernel's values and gradients there, graphs, streams, no syncs, huge tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of
from compare import same
from on_gpu import syncs_raise
from torch import Tensor

import qkernels as qk
from qkernels import registry, selfcheck
from qkernels.ops import fake_quantize as ops
from qkernels.ops import fake_quantize_learnable as learnable
from qkernels.reference import fake_quantize as reference
from qkernels.reference import fake_quantize_learnable as learnable_reference
from qkernels.samples import trials

if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)

GPU_KERNELS = [
    kernel
    for kernel in registry.kernels()
    if selfcheck.device_of(kernel) == "cuda" and kernel.unsupported() is None and kernel.op in trials
]
ODD = (37, 1029)
MANY, REPEATS = (300, 1040), 20  # of a sum that must come out the same every time
LARGE = 4096
NAMES = sorted({kernel.name for kernel in GPU_KERNELS})
kernels = pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
names = pytest.mark.parametrize("name", NAMES)


def bits(t: Tensor) -> Tensor:
    return torch.nan_to_num(t.cpu().double(), nan=12345.0, posinf=1e300, neginf=-1e300)


def example(kernel: registry.Kernel, size: tuple[int, int] | None = None) -> tuple[Any, ...]:
    """Arguments on the GPU that the kernel takes; without ``size`` of one that is no multiple of anything."""
    torch.manual_seed(0)
    rows, columns = size or ODD
    x = torch.randn(rows, columns + (-columns % 8 if "dynamic" in kernel.op else 0))
    half = x[:, : columns // 8 * 8].bfloat16()  # what a kernel for half types alone takes
    for values in (x, half, x[:, :8], torch.randn(2, 8, 5, 6)):
        for args in trials[kernel.op].samples(values):
            on_gpu = selfcheck.on("cuda", selfcheck.held_on("cuda", kernel.op, args))
            if kernel.unsupported(*on_gpu) is None:
                return on_gpu
    pytest.skip("takes no such input")


def test_kernels_are_there() -> None:
    """A GPU that none of the kernels serves is a failure, not a pass of nothing."""
    assert GPU_KERNELS, dict(qk.which("fake_quantize_forward", torch.zeros(1, device="cuda")))


def dtypes_of(kernel: registry.Kernel) -> tuple[torch.dtype, ...]:
    return selfcheck.QUICK_DTYPES if kernel.name == "triton" else selfcheck.DTYPES


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{kernel.op}-{kernel.name}-{dtype}")
        for kernel in GPU_KERNELS
        for dtype in dtypes_of(kernel)
    ],
)
def test_equals_the_reference(kernel: registry.Kernel, dtype: torch.dtype) -> None:
    """On everything by CUDA; by Triton on the quick inputs, as it compiles most of them for half a second."""
    for outcome in selfcheck.check_op(kernel.op, [kernel], kernel.name == "triton", [dtype]):
        assert outcome.fault is None, outcome.fault
        if outcome.cases == 0:
            pytest.skip(f"takes no {dtype}")


@kernels
def test_takes_some_case(kernel: registry.Kernel) -> None:
    """That not every dtype is skipped above."""
    cases = (
        selfcheck.on("cuda", selfcheck.held_on("cuda", kernel.op, args))
        for x in selfcheck.inputs(kernel.name == "triton", dtypes_of(kernel))
        for args in trials[kernel.op].samples(x)
    )
    assert any(kernel.unsupported(*case) is None for case in cases)


@names
@pytest.mark.parametrize(("case", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_granularity(name: str, case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward, masks, dx and the learned gradients against the CPU reference, in every layout and misaligned."""
    if name == "triton" and dtype not in selfcheck.QUICK_DTYPES:
        pytest.skip("each of these compiles for half a second")
    x = INPUTS[case][0](dtype)
    grad, scale = torch.randn(x.shape).to(dtype), scale_of(shape)
    on_gpu = x.cuda() if case == "expanded" else selfcheck.on("cuda", (x,))[0]
    for zero_point in (None, torch.randint(-8, 8, shape, dtype=torch.int32), torch.randn(shape) * 6):
        params = (scale, zero_point, -8, 7)
        gpu_params = selfcheck.on("cuda", params)
        lsq = zero_point is None or zero_point.is_floating_point()
        y, mask = reference.fake_quantize_forward_mask(x, *params, lsq)
        dx, dscale, dzp = learnable_reference.fake_quantize_learnable_backward(grad, x, *params, 0.5, lsq)
        magnitude = learnable_reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
        with qk.use_kernel(name):
            same(ops._forward(on_gpu, *gpu_params), y)
            got_y, got_mask = ops._forward_mask(on_gpu, *gpu_params, lsq)
            same(got_y, y)
            if case != "expanded":
                same(got_mask, mask)
            same(ops._backward(grad.cuda(), on_gpu, *gpu_params, lsq), dx)
            got = learnable.learnable_backward(grad.cuda(), on_gpu, *gpu_params, 0.5, lsq)
        same(got[0], dx)
        if case != "special values":
            for a, b in zip(got[1:], (dscale, dzp), strict=True):
                assert ((a.cpu() - b).double().abs() <= magnitude * 2**-18 + 1e-6).all()


@names
def test_gradients_against_fp64(name: str) -> None:
    """Public functions end to end: gradients of x, scale and zero point against the reference in fp64 on the CPU."""
    for shape in [(1,), (64, 1), (64, 8), (1, 256)]:
        x, grad = torch.randn(64, 256), torch.randn(64, 256)
        scale, zero_point = torch.rand(shape) * 0.2 + 0.1, torch.randn(shape) * 2
        args = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        exact = [t.double().detach().requires_grad_() for t in args]
        with qk.use_kernel("reference"):
            y = qk.fake_quantize(*exact, quant_min=-8, quant_max=7)
            expected = torch.autograd.grad(y, exact, grad.double())
        on_gpu = [t.detach().cuda().requires_grad_() for t in args]
        with qk.use_kernel(name):
            y = qk.fake_quantize(*on_gpu, quant_min=-8, quant_max=7)
            got = torch.autograd.grad(y, on_gpu, grad.cuda())
        for a, b in zip(got, expected, strict=True):
            error = (a.cpu().double() - b).norm() / b.norm()
            assert error < 1e-3, (shape, error)  # one element on a tie of fp32 and not of fp64 moves it by as much


@kernels
def test_cuda_graph(kernel: registry.Kernel) -> None:
    """Captured once, replayed on other inputs: what an eager call gives."""
    args = example(kernel)
    with qk.use_kernel(kernel.name):
        op = registry.run
        for _ in range(3):
            op(kernel.op, *selfcheck.on("cuda", args))
        captured_args = selfcheck.on("cuda", args)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = op(kernel.op, *captured_args)
        for seed in range(2):
            torch.manual_seed(seed)
            fresh = selfcheck.on("cuda", args)
            first = selfcheck.tensors_in(fresh)[0]
            first.copy_(torch.randn(first.shape) * 3 if first.is_floating_point() else torch.randint(2, first.shape))
            for held, new in zip(selfcheck.tensors_in(captured_args), selfcheck.tensors_in(fresh), strict=True):
                held.copy_(new)
            graph.replay()
            got = [t.clone() for t in selfcheck.tensors_in(result) + selfcheck.tensors_in(captured_args)]
            expected = selfcheck.tensors_in(op(kernel.op, *fresh)) + selfcheck.tensors_in(fresh)
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(bits(a), bits(b))


@kernels
def test_runs_on_the_current_stream(kernel: registry.Kernel) -> None:
    """The input is written late on a side stream: a kernel on another stream would read it too early."""
    args = example(kernel)
    with qk.use_kernel(kernel.name):
        expected = selfcheck.tensors_in(registry.run(kernel.op, *selfcheck.on("cuda", args)))
        late = selfcheck.on("cuda", args)
        values = [t.clone() for t in selfcheck.tensors_in(late)]
        for t in selfcheck.tensors_in(late):
            t.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            for t, value in zip(selfcheck.tensors_in(late), values, strict=True):
                t.copy_(value)
            got = selfcheck.tensors_in(registry.run(kernel.op, *late))
        stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


@kernels
def test_no_host_sync(kernel: registry.Kernel) -> None:
    args = example(kernel)
    with qk.use_kernel(kernel.name):
        registry.run(kernel.op, *args)
        with syncs_raise():
            registry.run(kernel.op, *args)


def test_module_has_no_host_sync() -> None:
    """A whole quantizer, forward and backward, in a training step."""
    layer = qk.prepare(torch.nn.Sequential(torch.nn.Linear(64, 32)), qk.QConfig()).cuda()
    qk.calibrate(layer, [torch.randn(16, 64, device="cuda")])
    x = torch.randn(16, 64, device="cuda", requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    with syncs_raise():
        layer(x).sum().backward()


@kernels
def test_second_device(kernel: registry.Kernel) -> None:
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    args = example(kernel)
    elsewhere = selfcheck.on("cuda:1", args)
    with qk.use_kernel(kernel.name):
        expected = selfcheck.tensors_in(registry.run(kernel.op, *args))
        got = selfcheck.tensors_in(registry.run(kernel.op, *elsewhere))
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        assert torch.equal(bits(a), bits(b))


@kernels
def test_same_bits_every_time(kernel: registry.Kernel) -> None:
    """Sums included: two-stage reductions, no float atomics."""
    args = example(kernel, MANY)
    with qk.use_kernel(kernel.name):
        first = selfcheck.tensors_in(registry.run(kernel.op, *selfcheck.on("cuda", args)))
        for _ in range(REPEATS):
            again = selfcheck.tensors_in(registry.run(kernel.op, *selfcheck.on("cuda", args)))
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))


@names
@pytest.mark.parametrize("granularity", ["tensor", "row", "column", "group"])
def test_large_in_fp32_equals_the_cpu(name: str, granularity: str) -> None:
    """16M elements, bit for bit what the CPU's compiled kernel gives."""
    x, grad = torch.randn(LARGE, LARGE), torch.randn(LARGE, LARGE)
    shapes: dict[str, tuple[int, ...]] = {
        "tensor": (1,),
        "row": (LARGE, 1),
        "column": (1, LARGE),
        "group": (LARGE, LARGE // 32),
    }
    shape = shapes[granularity]
    scale = torch.rand(shape) * 0.02 + 0.01
    y, mask = ops._forward_mask(x, scale, None, -128, 127)
    with qk.use_kernel(name):
        on_gpu = selfcheck.on("cuda", (x, scale, None, -128, 127))
        got, got_mask = ops._forward_mask(*on_gpu)
        same(got, y)
        same(got_mask, mask)
        got = learnable.learnable_backward(grad.cuda(), *on_gpu, 1.0)
    expected = learnable.learnable_backward(grad, x, scale, None, -128, 127, 1.0)
    same(got[0], expected[0])
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-4, atol=1e-2)


@names
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_offsets_beyond_two_to_the_31(name: str, granularity: str) -> None:
    rows, columns = 2**15 + 3, 2**16 + 8
    if torch.cuda.mem_get_info()[0] < 8 * 3 * rows * columns:
        pytest.skip("too little memory")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.linspace(-3, 3, columns).bfloat16()
    shape = {"tensor": (1,), "row": (rows, 1), "column": (1, columns)}[granularity]
    scale = torch.rand(shape, device="cuda") * 0.02 + 0.01
    last = scale if granularity == "tensor" else scale[-1:]
    with qk.use_kernel(name):
        y, mask = ops._forward_mask(x, scale, None, -128, 127)
        dx, dscale, _ = learnable.learnable_backward(x, x, scale, None, -128, 127, 1.0)
    expected, expected_mask = reference.fake_quantize_forward_mask(x[-1:].cpu(), last.cpu(), None, -128, 127)
    same(y[-1:], expected)
    assert not y[:-1].any()
    same(mask[-columns // 8 :], expected_mask)
    dx_row, dscale_row, _ = learnable_reference.fake_quantize_learnable_backward(
        x[-1:].cpu(), x[-1:].cpu(), last.cpu(), None, -128, 127, 1.0
    )
    same(dx[-1:], dx_row)
    got = dscale if granularity != "row" else dscale[-1:]
    torch.testing.assert_close(got.cpu(), dscale_row, rtol=1e-3, atol=1e-2)


@names
def test_bad_scales_and_zero_points_give_nan(name: str) -> None:
    """Values are not looked at by the host: a wrong one shows in the output, never as a silent wrong number."""
    x = torch.randn(4, 40, device="cuda")
    scale = torch.tensor([[0.1], [-0.1], [float("nan")], [0.1]], device="cuda")
    zero_point = torch.tensor([[0], [0], [0], [99]], device="cuda")
    with qk.use_kernel(name):
        y = ops._forward(x, scale, zero_point, -8, 7)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()


@names
def test_bad_arguments(name: str) -> None:
    x = torch.randn(4, 40, device="cuda")
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("scale: .*(device|cpu)", lambda: ops._forward(x, torch.ones(1), None, -8, 7)),
        ("scale: got shape", lambda: ops._forward(x, torch.ones(3, 1, device="cuda"), None, -8, 7)),
        ("quant_min", lambda: ops._forward(x, torch.ones(1, device="cuda"), None, 8, 7)),
        ("x: got", lambda: ops._forward(x.int(), torch.ones(1, device="cuda"), None, -8, 7)),
    ]
    with qk.use_kernel(name):
        for message, call in calls:
            with pytest.raises(RuntimeError, match=message):
                call()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_override_torch(compiled: bool) -> None:
    """torch's ops on our kernels: torch's numbers, forward and backward, without the waits of its own kernels."""
    x = torch.randn(64, 32, 8, 8, device="cuda")
    scale, zero_point = torch.rand(32, device="cuda") * 0.05 + 0.01, torch.randint(-9, 9, (32,), device="cuda").int()

    def step(x: Tensor) -> list[Tensor]:
        return [
            torch.fake_quantize_per_tensor_affine(x, 0.03, 5, -128, 127),
            torch.fake_quantize_per_tensor_affine(x, scale[:1], zero_point[:1], -128, 127),
            torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, -128, 127),
            torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point.float(), 1, -128, 127, 1.0),
        ]

    run = torch.compile(step) if compiled else step

    def results(function: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        outputs = function(leaf)
        return [*outputs, *(torch.autograd.grad(y, leaf, torch.ones_like(y))[0] for y in outputs)]

    expected = results(step)
    with qk.override_torch():
        got = results(run)
        if not compiled:
            with syncs_raise():
                results(run)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compiled_fullgraph() -> None:
    def step(x: Tensor, scale: Tensor) -> Tensor:
        return qk.fake_quantize(torch.relu(x), scale, quant_min=-8, quant_max=7).sum()

    x = torch.randn(64, 512, device="cuda", requires_grad=True)
    scale = torch.full((64, 1), 0.1, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(step(x, scale), (x, scale))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, scale), (x, scale))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_model_trains_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare, calibrate, five steps: the losses of both devices agree."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default, and coarser than the CPU

    def losses(device: str) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10)
        )
        batch, target = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
        model = qk.prepare(model, qk.QConfig()).to(device)
        qk.calibrate(model, [batch.to(device)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        result = []
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(model(batch.to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            result.append(loss.item())
        return result

    torch.testing.assert_close(torch.tensor(losses("cuda")), torch.tensor(losses("cpu")), rtol=2e-3, atol=2e-3)
