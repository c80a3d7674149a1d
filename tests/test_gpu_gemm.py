"""The int8 and int4 products on a GPU: every tile of its table, layouts, layers, huge outputs, graphs, streams."""

from __future__ import annotations

import pytest
import torch
from compare import same
from int4_cuda import HALF_TYPES, KINDS, SHAPES, arguments
from int4_cuda import check as check_int4
from int4_cuda import run as run_int4_cuda
from on_gpu import syncs_raise
from torch import Tensor

import qkernels as qk
from qkernels import library, selfcheck
from qkernels.reference import int4_gemm as int4_reference

if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)


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


INT4_NK, REPEATS = (5000, 4096), 20


@int4_cuda
@pytest.mark.parametrize("m", [1, 16, 64])
def test_int4_cuda_same_bits_in_a_graph_and_on_any_stream(m: int) -> None:
    """Sums in a fixed order and no state between calls: eagerly, replayed, and on two streams at once."""
    args = selfcheck.on("cuda", arguments(m, *INT4_NK, 128, "zero_point"))
    want = run_int4_cuda(args)
    assert all(torch.equal(run_int4_cuda(args), want) for _ in range(REPEATS))
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
    for _ in range(REPEATS):
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


INT4_K = 5120


@pytest.mark.parametrize("group_size", [32, 64, 128, 512, 40, -1])
@pytest.mark.parametrize("n", [1000, 4096, 14336])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 100, 200])
def test_int4_linear_by_every_tile(m: int, n: int, group_size: int) -> None:
    """On int8 activations the reference's bits where K is not cut, on floating ones its bound, with every kind of x."""
    k = INT4_K
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
