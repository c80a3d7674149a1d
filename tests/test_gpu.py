"""What only a GPU can show: every GPU kernel's values and gradients there, graphs, streams, no syncs, huge tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of
from test_cuda_int4_gemm import HALF_TYPES, KINDS, SHAPES, arguments
from test_cuda_int4_gemm import check as check_int4
from test_cuda_int4_gemm import run as run_int4_cuda
from torch import Tensor

import qkernels as qk
from qkernels import library, registry, selfcheck
from qkernels.ops import fake_quantize as ops
from qkernels.reference import fake_quantize as reference
from qkernels.reference import int4_gemm as int4_reference

if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)

GPU_KERNELS = [
    kernel
    for kernel in registry.kernels()
    if selfcheck.device_of(kernel) == "cuda" and kernel.unsupported() is None and kernel.op in selfcheck.ARGS
]
NAMES = sorted({kernel.name for kernel in GPU_KERNELS})
kernels = pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
names = pytest.mark.parametrize("name", NAMES)


def bits(t: Tensor) -> Tensor:
    return torch.nan_to_num(t.cpu().double(), nan=12345.0, posinf=1e300, neginf=-1e300)


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def example(kernel: registry.Kernel) -> tuple[Any, ...]:
    """Arguments of one call on the GPU, of a size that is not a multiple of anything."""
    x = torch.randn(37, 1032 if "dynamic" in kernel.op else 1029)
    for shape in (x, x[:, :8], torch.randn(2, 8, 5, 6)):
        for args in selfcheck.ARGS[kernel.op](shape):
            on_gpu = selfcheck.on("cuda", selfcheck.held_on("cuda", kernel.op, args))
            if kernel.refuses(*on_gpu) is None:
                return on_gpu
    pytest.skip("takes no such input")


def test_kernels_are_there() -> None:
    """A GPU that none of the kernels serves is a failure, not a pass of nothing."""
    assert GPU_KERNELS, dict(qk.which("fake_quantize_forward", torch.zeros(1, device="cuda")))


@kernels
def test_equals_the_reference(kernel: registry.Kernel) -> None:
    for outcome in selfcheck.check_op(kernel.op, [kernel], quick=False):
        assert outcome.fault is None, outcome.fault
        assert outcome.cases > 0


@pytest.mark.parametrize(("case", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_granularity(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward, masks, dx and the learned gradients against the CPU reference, in every layout."""
    x = INPUTS[case][0](dtype)
    grad, scale = torch.randn(x.shape).to(dtype), scale_of(shape)
    on_gpu = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda") if x.numel() else x.cuda()
    on_gpu = x.cuda() if case == "expanded" else on_gpu.copy_(x)
    for zero_point in (None, torch.randint(-8, 8, shape, dtype=torch.int32), torch.randn(shape) * 6):
        params = (scale, zero_point, -8, 7)
        gpu_params = selfcheck.on("cuda", params)
        lsq = zero_point is None or zero_point.is_floating_point()
        y, mask = reference.fake_quantize_forward_mask(x, *params, lsq)
        dx, dscale, dzp = reference.fake_quantize_learnable_backward(grad, x, *params, 0.5, lsq)
        magnitude = reference.sum_to(grad.double().abs() * 16, scale) if x.numel() else torch.zeros(shape)
        for name in NAMES:
            if name == "triton" and dtype not in (torch.float32, torch.bfloat16):
                continue  # each of these compiles for half a second
            with qk.use_kernel(name):
                same(ops._forward(on_gpu, *gpu_params), y)
                got_y, got_mask = ops._forward_mask(on_gpu, *gpu_params, lsq)
                same(got_y, y)
                if case != "expanded":
                    same(got_mask, mask)
                same(ops._backward(grad.cuda(), on_gpu, *gpu_params, lsq), dx)
                got = ops._learnable_backward(grad.cuda(), on_gpu, *gpu_params, 0.5, lsq)
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
            first = next(a for a in selfcheck.tensors_in(fresh) if a.is_floating_point() or a.dtype == torch.int8)
            first.copy_(torch.randn(first.shape) * 3)
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


@contextlib.contextmanager
def syncs_raise() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    torch.manual_seed(0)
    for args in selfcheck.ARGS[kernel.op](torch.randn(300, 1040)):
        with qk.use_kernel(kernel.name):
            first = selfcheck.tensors_in(registry.run(kernel.op, *selfcheck.on("cuda", args)))
            for _ in range(20):
                again = selfcheck.tensors_in(registry.run(kernel.op, *selfcheck.on("cuda", args)))
                assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))
        return


@names
@pytest.mark.parametrize("shape", [(1,), (4096, 1), (1, 4096), (4096, 128)], ids=str)
def test_large_in_fp32_equals_the_cpu(name: str, shape: tuple[int, ...]) -> None:
    """16M elements, bit for bit what the CPU's compiled kernel gives."""
    x, grad = torch.randn(4096, 4096), torch.randn(4096, 4096)
    scale = torch.rand(shape) * 0.02 + 0.01
    y, mask = ops._forward_mask(x, scale, None, -128, 127)
    with qk.use_kernel(name):
        on_gpu = selfcheck.on("cuda", (x, scale, None, -128, 127))
        got, got_mask = ops._forward_mask(*on_gpu)
        same(got, y)
        same(got_mask, mask)
        got = ops._learnable_backward(grad.cuda(), *on_gpu, 1.0)
    expected = ops._learnable_backward(grad, x, scale, None, -128, 127, 1.0)
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
        dx, dscale, _ = ops._learnable_backward(x, x, scale, None, -128, 127, 1.0)
    expected, expected_mask = reference.fake_quantize_forward_mask(x[-1:].cpu(), last.cpu(), None, -128, 127)
    same(y[-1:], expected)
    assert not y[:-1].any()
    same(mask[-columns // 8 :], expected_mask)
    dx_row, dscale_row, _ = reference.fake_quantize_learnable_backward(
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


def test_a_model_trains_as_on_the_cpu() -> None:
    """prepare, calibrate, five steps: the losses of both devices agree."""

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


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")


@pytest.mark.parametrize("k", [4096, 1040])
@pytest.mark.parametrize("n", [1024, 4096, 8200, 28672])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 128, 200, 513, 1500])
def test_int8_gemm_by_every_tile(m: int, n: int, k: int) -> None:
    """Every tile of this GPU's table, whole and not: the exact sums, and the reference's bits."""
    a, w = random_codes(m, k), random_codes(n, k)
    exact = a.double() @ w.double().t()
    zero_point = torch.randint(-128, 128, (m,), dtype=torch.int32, device="cuda")
    scales = torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda")
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    with qk.use_kernel("triton"):
        assert torch.equal(qk.int8_mm(a, w.t()).double(), exact)
        for z, out_dtype in ((None, torch.bfloat16), (zero_point, torch.float32)):
            got = qk.int8_scaled_mm(a, w.t(), *scales, zero_point_a=z, bias=bias, out_dtype=out_dtype)
            acc = exact if z is None else exact - z[:, None].double() * w.double().sum(1)
            want = (acc.float() * scales[1] * scales[0] + bias.float()).to(out_dtype)
            assert torch.equal(got, want)


def test_int8_gemm_of_any_layout() -> None:
    a, b = random_codes(70, 100), random_codes(100, 45)
    exact = a.double() @ b.double()
    layouts = (a, b), (a.t().contiguous().t(), b.t().contiguous().t()), (random_codes(71, 200)[1:, ::2], b)
    with qk.use_kernel("triton"):
        for left, right in layouts:
            assert torch.equal(qk.int8_mm(left, right).double(), left.double() @ right.double())
        assert torch.equal(qk.int8_mm(a[:, :0], b[:0]).double(), exact * 0)
        assert qk.int8_mm(a[:0], b).shape == (0, 45)


def test_int8_gemm_beyond_two_to_the_31_outputs() -> None:
    m, n, k = 2**16 + 8, 2**15 + 16, 32
    if torch.cuda.mem_get_info()[0] < 3 * 2 * m * n:
        pytest.skip("too little memory")
    a, w = random_codes(m, k), random_codes(n, k)
    one = torch.ones(1, device="cuda")
    with qk.use_kernel("triton"):
        out = qk.int8_scaled_mm(a, w.t(), one, one)
    for rows in (slice(0, 3), slice(m // 2, m // 2 + 3), slice(m - 3, m)):
        assert torch.equal(out[rows], (a[rows].double() @ w.double().t()).float().bfloat16())


def test_int8_gemm_layers_on_the_gpu() -> None:
    """The layer of the CPU, moved: the same bits; and its weights are packed anew for the GPU."""
    layer = qk.nn.Int8Linear.from_float(torch.nn.Linear(200, 70))
    x = torch.randn(33, 200)
    expected = layer(x)
    layer = layer.cuda()
    assert layer.data.shape == (70, 208)
    same(layer(x.cuda()), expected)
    same(layer.cpu()(x), expected)


def test_int4_gemm_layers_on_the_gpu() -> None:
    """Moved to the GPU and back: packed anew for each, the same state, the same numbers."""
    for act_bits in (8, 16):
        layer = qk.nn.Int4Linear.from_float(torch.nn.Linear(192, 70), 32, symmetric=False, act_bits=act_bits)
        x, state = torch.randn(33, 192), layer.state_dict()
        expected = layer(x)
        layer = layer.cuda()
        assert layer.data.shape == (70, 96)
        torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
        for key, value in layer.state_dict().items():
            assert torch.equal(value.cpu(), state[key])
        layer = layer.cpu()
        assert layer.data.dim() == 4
        same(layer(x), expected)
    table = qk.nn.Int4Embedding.from_float(torch.nn.Embedding(19, 96), 32, symmetric=False)
    ids = torch.randint(19, (3, 5))
    expected = table(ids)
    same(table.cuda()(ids.cuda()), expected)


int4_cuda = pytest.mark.skipif(library.cuda_missing() is not None, reason=str(library.cuda_missing()))
# With a whole model's sizes, where every multiprocessor has several blocks.
INT4_SHAPES = [
    *SHAPES,
    *((m, 4096, 4096, 128) for m in (1, 8, 9, 16, 17, 32, 33, 64)),
    (1, 14337, 4096, 64),
    (5, 28672, 1024, 32),
    (16, 1001, 14336, 14336),
    (64, 6144, 2048, 32),
]


@int4_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", INT4_SHAPES, ids=str)
def test_int4_cuda_within_the_bound(shape: tuple[int, int, int, int], kind: str) -> None:
    for dtype in HALF_TYPES:
        args = arguments(*shape, kind, dtype)
        check_int4(run_int4_cuda(selfcheck.on("cuda", args)), args)


@int4_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_cuda_sums_that_are_exact(shape: tuple[int, int, int, int], kind: str) -> None:
    """Tensor cores add small integers exactly: to the last bit what the reference gives."""
    for dtype in HALF_TYPES:
        args = arguments(*shape, kind, dtype, out_dtype=torch.float32, whole=True)
        same(run_int4_cuda(selfcheck.on("cuda", args)), int4_reference.int4_linear(*args))


@int4_cuda
@pytest.mark.parametrize("m", [1, 16, 64])
def test_int4_cuda_same_bits_in_a_graph_and_on_any_stream(m: int) -> None:
    """Sums in a fixed order and no state between calls: eagerly, replayed, and on two streams at once."""
    args = selfcheck.on("cuda", arguments(m, 5000, 4096, 128, "zero_point"))
    want = run_int4_cuda(args)
    assert all(torch.equal(run_int4_cuda(args), want) for _ in range(20))
    graph, x = torch.cuda.CUDAGraph(), torch.zeros_like(args[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run_int4_cuda((x, *args[1:]))
    x.copy_(args[0])
    graph.replay()
    assert torch.equal(captured, want)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run_int4_cuda(args))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


@int4_cuda
def test_int4_cuda_has_no_host_sync() -> None:
    args = selfcheck.on("cuda", arguments(4, 512, 512, 64, "minimum"))
    run_int4_cuda(args)
    with syncs_raise():
        run_int4_cuda(args)


@pytest.mark.parametrize("group_size", [32, 64, 128, 512, 40, -1])
@pytest.mark.parametrize("n", [1000, 4096, 14336])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 100, 200])
def test_int4_linear_by_every_tile(m: int, n: int, group_size: int) -> None:
    """On int8 activations the reference's bits where K is not cut, on floating ones its bound, with every kind of x."""
    k = 5120
    w, x = torch.randn(n, k, device="cuda"), torch.randn(m, k, device="cuda")
    for symmetric in (True, False):
        packed = qk.PackedInt4.from_float(w, group_size, symmetric)
        assert packed.layout == "halves-1"
        weight = packed.dequantize().double()
        _, scale, zero_point, _ = packed.unpack()
        offset = 0 if zero_point is None else ((zero_point.float() + 8) * scale).double()
        most = (15 * scale.double() + offset).abs().repeat_interleave(k // scale.shape[1], 1)
        for dtype, unit in ((torch.float32, 2.0**-11), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
            rows = x.to(dtype)
            allowed = rows.double().abs() @ most.t()
            with qk.use_kernel("reference"):
                want = qk.int4_linear(rows, packed, out_dtype=torch.float32)
            with qk.use_kernel("triton"):
                got = qk.int4_linear(rows, packed, out_dtype=torch.float32)
                floating = qk.int4_linear(rows, packed, act_bits=16, out_dtype=torch.float32)
                assert torch.equal(got, qk.int4_linear(rows, packed, out_dtype=torch.float32))
            if group_size == -1:
                same(got, want)
            assert ((got - want).double().abs() <= (k // 16 + 4) * 2.0**-22 * allowed).all()
            exact = rows.double() @ weight.t()
            unit = unit if m >= 128 else (k + 4) * 2.0**-23
            assert ((floating - exact).abs() <= unit * allowed + exact.abs() * 2.0**-23).all()


def test_int4_weights_on_the_gpu() -> None:
    """The layer of the CPU, moved: the same codes in another layout; the CPU's own layout is taken too."""
    x = torch.randn(5, 96)
    with qk.use_kernel("reference"):
        packed = qk.PackedInt4.from_float(torch.randn(70, 96), 32, False)
        there = packed.to("cuda")
        for a, b in zip(packed.unpack()[:3], there.unpack()[:3], strict=True):
            assert torch.equal(a, b.cpu())
        expected = qk.int4_linear(x, packed)
    of = packed.data, packed.scale, packed.zero_point, packed.minimum, packed.weight_sum
    panels = qk.PackedInt4(*(t if t is None else t.cuda() for t in of), packed.shape, packed.group_size)
    with qk.use_kernel("triton"):
        for weight in (there, panels):
            same(qk.int4_linear(x.cuda(), weight), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_on_the_gpu(bits: int) -> None:
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (257, 1027), dtype=torch.int8)
    with qk.use_kernel("reference"):
        expected = qk.pack_bits(q, bits)
    with qk.use_kernel("triton"):
        got = qk.pack_bits(q.cuda(), bits)
        assert torch.equal(got.cpu(), expected)
        assert torch.equal(qk.unpack_bits(got, bits, 1027).cpu(), q)
