from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from compare import same
from conftest import paths_of, untouched
from torch import Tensor

import qkernels as qk
from qkernels import gemm_checks, library, registry
from qkernels.ops.int8_gemm import PackedInt8, int8_linear, int8_mm, int8_scaled_mm
from qkernels.reference import int8_gemm as reference

OPS = ("int8_mm", "int8_scaled_mm", "int8_pack", "int8_unpack", "int8_linear")
SHAPES = [
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (1, 1, 1),
    (1, 33, 31),
    (2, 3, 5),
    (3, 32, 64),
    (4, 31, 63),
    (5, 70, 129),
    (13, 33, 67),
    (16, 64, 130),
    (17, 5, 3),
    (31, 65, 257),
    (64, 96, 200),
    (9, 200, 101),  # packed 4 panels and then 3 at once, 64, 32 and 5 k
    (2, 130, 300),
]
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32 = torch.iinfo(torch.int32)


@pytest.fixture(params=[*paths_of("int8_mm"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def ran(kernel: str) -> bool:
    return kernel == "reference" or f"cpu_{library.host.last_isa()}" == kernel


def codes(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """int64 sums by another way than the reference's."""
    return (a.long()[:, :, None] * b.long()[None]).sum(1)


def layouts(rows: int, cols: int) -> dict[str, Tensor]:
    """The same matrix, or one of its shape, in every memory layout that a caller may come with."""
    return {
        "contiguous": codes(rows, cols),
        "transposed": codes(cols, rows).t(),
        "sliced": codes(2 * rows + 1, 3 * cols + 1)[1::2, 1::3][:rows, :cols],
        "expanded rows": codes(1, cols).expand(rows, cols),
        "expanded cols": codes(rows, 1).expand(rows, cols),
        "offset": codes(rows * cols + 3)[3:].view(rows, cols),
    }


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_mm_is_exact(kernel: str, m: int, n: int, k: int) -> None:
    for a, b in itertools.product(layouts(m, k).values(), layouts(k, n).values()):
        out = int8_mm(a, b)
        assert out.dtype == torch.int32
        assert out.is_contiguous()
        assert torch.equal(out.long(), exact(a, b))
        assert m == 0 or n == 0 or ran(kernel)


@pytest.mark.parametrize("m", [1, 3, 16, 17])
@pytest.mark.parametrize(("low", "high"), [(-128, -128), (-128, 127), (127, 127)])
def test_mm_at_the_longest_k(kernel: str, m: int, low: int, high: int) -> None:
    k = gemm_checks.MAX_K
    a, b = torch.full((m, k), low, dtype=torch.int8), torch.full((5, k), high, dtype=torch.int8).t()
    for weights in (b, b.contiguous()):
        assert int8_mm(a, weights).unique().tolist() == [low * high * k]
    one = torch.ones(1)
    for zero_point in (-128, 127, INT32.min, INT32.max):
        out = int8_scaled_mm(a, b, one, one, zero_point_a=torch.tensor(zero_point), out_dtype=torch.float32)
        want = torch.tensor((low - zero_point) * high * k, dtype=torch.int64).float()
        assert out.unique().tolist() == [want.item()]


def test_mm_beyond_the_longest_k(kernel: str) -> None:
    k = gemm_checks.MAX_K + 1
    a, w = torch.zeros(2, k, dtype=torch.int8), torch.zeros(3, k, dtype=torch.int8)
    for call in (
        lambda: int8_mm(a, w.t()),
        lambda: int8_scaled_mm(a, w.t(), torch.ones(1), torch.ones(1)),
        lambda: PackedInt8.from_quantized(w, torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="got K = 131072; accepted: K <= 131071"):
            call()


def test_mm_beyond_2_31_elements(kernel: str) -> None:
    far = 2**31 + 64
    memory = untouched(far + 4096, torch.int8)
    tail = codes(4096)
    memory[far:] = tail
    a = memory.as_strided((3, 64), (64, 1), far)
    assert torch.equal(int8_mm(a, a.t()).long(), exact(a, a.t()))
    memory[:64] = tail[:64]
    for rows in (memory.as_strided((2, 64), (far, 1)), memory.as_strided((20, 64), (0, 1), far)):
        assert torch.equal(int8_mm(rows, a.t()).long(), exact(rows, a.t()))
    wide = memory.as_strided((64, 2), (1, far))
    assert torch.equal(int8_mm(a, wide).long(), exact(a, wide))


def scaled_args(m: int, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    scales_a = (
        torch.rand(()),
        torch.rand(1),
        torch.rand(1, 1),
        torch.rand(m),
        torch.rand(m, 1),
        torch.rand(m).bfloat16(),
    )
    scales_b = (torch.rand(()), torch.rand(1), torch.rand(n), torch.rand(1, n), torch.rand(2 * n)[::2].double())
    zero_points = (
        None,
        torch.tensor(-128),
        torch.tensor([127], dtype=torch.uint8),
        codes(m),
        codes(m, 1).int(),
        torch.randint(INT32.min, INT32.max, (m,)),
    )
    for i in range(6):
        bias = (None, torch.randn(n), torch.randn(n).half(), torch.randn(2 * n)[::2])[i % 4]
        yield scales_a[i], scales_b[i % 5], zero_points[i], bias


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_scaled_mm_equals_the_reference_bit_for_bit(
    kernel: str, m: int, n: int, k: int, out_dtype: torch.dtype
) -> None:
    for scale_a, scale_b, zero_point, bias in scaled_args(m, n):
        for b in (codes(n, k).t(), codes(k, n)):
            a = codes(m, k)
            out = int8_scaled_mm(a, b, scale_a, scale_b, zero_point_a=zero_point, bias=bias, out_dtype=out_dtype)
            want = reference.int8_scaled_mm(
                a, b, scale_a, scale_b, zero_point, None, bias, "none", out_dtype, None, None
            )
            same(out, want)
            assert m == 0 or n == 0 or ran(kernel)


def test_scaled_mm_against_float64(kernel: str) -> None:
    """The formula, independently of the reference: every step is exact here, because scales are powers of two."""
    m, n, k = 19, 45, 77
    a, b, z = codes(m, k), codes(k, n), codes(m)
    scale_a, scale_b, bias = 2.0 ** torch.randint(-8, 0, (m,)), 2.0 ** torch.randint(-8, 0, (n,)), codes(n).float()
    out = int8_scaled_mm(a, b, scale_a, scale_b, zero_point_a=z, bias=bias, out_dtype=torch.float32)
    want = (a.double() - z.double()[:, None]) @ b.double() * scale_b.double() * scale_a.double()[:, None] + bias
    same(out, want.float())


OUTPUTS = [
    ("relu", torch.float32, None, None),
    ("gelu", torch.bfloat16, None, None),
    ("silu", torch.float16, None, None),
    ("none", torch.int8, torch.tensor([0.5]), None),
    ("relu", torch.int8, torch.tensor(0.03), torch.tensor([-128], dtype=torch.int32)),
    ("gelu", torch.int8, torch.tensor(0.02).double(), torch.tensor(-120, dtype=torch.int8)),
    ("silu", torch.int8, torch.tensor([[0.02]]), torch.tensor(-100)),
    ("silu", torch.int8, torch.tensor(-1.0), torch.tensor(7)),
]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 4, 0), (1, 33, 31), (5, 70, 129), (17, 64, 130)])
def test_outputs_equal_the_reference_bit_for_bit(kernel: str, m: int, n: int, k: int, output: tuple) -> None:
    scale_a, scale_b, bias = torch.rand(m, 1) * 2e-3, torch.rand(n), torch.randn(n)
    if m > 4:
        scale_a[2], scale_a[3] = torch.nan, torch.inf
    for zero_point in (None, codes(m), torch.randint(INT32.min, INT32.max, (m,))):
        a, w = codes(m, k), codes(n, k)
        args = (a, w.t(), scale_a, scale_b, zero_point, None, bias, *output)
        same(torch.ops.qkernels.int8_scaled_mm(*args), reference.int8_scaled_mm(*args))
        data, colsum = torch.ops.qkernels.int8_pack(w)
        by_row = None if zero_point is None else zero_point[:, None]
        args = (a, data, colsum, scale_b, bias, scale_a, by_row, -128, 127, *output)
        same(torch.ops.qkernels.int8_linear(*args), reference.int8_linear(*args))
        assert m == 0 or ran(kernel)
    args = (linear_input(m, k, torch.bfloat16), data, colsum, scale_b, bias, None, None, -128, 127, *output)
    same(torch.ops.qkernels.int8_linear(*args), reference.int8_linear(*args))


def test_activations_are_torchs(kernel: str) -> None:
    """Every int8 product as an input, by torch's own functions in fp64."""
    a, b, scale = codes(64, 3), codes(3, 257), torch.tensor(3e-4)
    x = (a.double() @ b.double()).float() * scale
    for name in ("relu", "gelu", "silu"):
        want = getattr(torch.nn.functional, name)(x.double())
        got = int8_scaled_mm(a, b, scale, torch.ones(1), activation=name, out_dtype=torch.float32)
        assert x.abs().max() > 10
        torch.testing.assert_close(got.double(), want, rtol=2**-20, atol=4e-7)
    one, edges = torch.ones(1), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 60.0, -60.0, -200.0, 3e38])
    for name in ("relu", "gelu", "silu"):
        zero = torch.zeros(1, 1, dtype=torch.int8)
        got = int8_scaled_mm(zero, zero.expand(1, 8), one, one, bias=edges, activation=name, out_dtype=torch.float32)
        want = getattr(torch.nn.functional, name)(edges.double()).float()
        torch.testing.assert_close(got[0], want, equal_nan=True)


def test_a_chain_of_int8_layers(kernel: str) -> None:
    """Codes go from layer to layer; each layer's equal those of its float output, quantized."""
    x, first, second = torch.randn(2, 7, 50), PackedInt8.from_float(torch.randn(70, 50)), torch.randn(20, 70)
    bias, step, zero_point = torch.randn(70), torch.tensor(0.1), torch.tensor(-128)
    middle = int8_linear(x, first, bias, activation="relu")
    q = int8_linear(x, first, bias, activation="relu", out_scale=step, out_zero_point=zero_point)
    assert q.dtype == torch.int8
    same(q, (torch.round(middle * (1 / step)) - 128).clamp(-128, 127).to(torch.int8))
    packed = PackedInt8.from_float(second)
    y = int8_linear(q, packed, input_scale=step, input_zero_point=zero_point, out_dtype=torch.float32)
    weight, scale = packed.unpack()
    want = ((q.double() + 128) * step) @ (weight.double() * scale.double()[:, None]).t()
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-5)
    same(y, int8_linear(middle, packed, input_scale=step, input_zero_point=zero_point))
    assert int8_linear(q, packed, input_scale=step).dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_producers_feed_the_product(kernel: str, symmetric: bool) -> None:
    """Codes, scales and zero points of each token, as the norm and SwiGLU give them."""
    x, gate = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    packed = PackedInt8.from_float(torch.randn(33, 64))
    weight, weight_scale = packed.unpack()
    for q, scale, zero_point in (
        qk.rms_norm_quantize_dynamic(x, torch.rand(64), symmetric=symmetric),
        qk.silu_mul_quantize_dynamic(gate, x, symmetric=symmetric),
        qk.quantize_dynamic(x, symmetric=symmetric),
    ):
        assert q.dtype == torch.int8
        y = int8_linear(q, packed, input_scale=scale, input_zero_point=zero_point, out_dtype=torch.float32)
        values = (q.double() - zero_point.double()) * scale.double()
        want = values @ (weight.double() * weight_scale.double()[:, None]).t()
        torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (1, 1), (31, 3), (32, 4), (33, 31), (65, 130)])
def test_pack(kernel: str, n: int, k: int) -> None:
    for w in layouts(n, k).values():
        data, colsum = torch.ops.qkernels.int8_pack(w)
        assert data.shape == ((n + 31) // 32, (k + 3) // 4, 32, 4)
        for channel, i in itertools.product(range(0, n, 7), range(0, k, 5)):
            assert data[channel // 32, i // 4, channel % 32, i % 4] == w[channel, i]
        assert data.long().sum() == w.long().sum()  # the padding is zeros
        assert torch.equal(colsum, w.sum(1, dtype=torch.int32))
        assert torch.equal(torch.ops.qkernels.int8_unpack(data, n, k), w)


def test_packed_from_float(kernel: str) -> None:
    w = torch.randn(37, 50)
    w[3] = 0
    w[4] = 1e-42
    packed = PackedInt8.from_float(w)
    q, scale = packed.unpack()
    assert packed.shape == (37, 50)
    assert q.abs().amax(1)[torch.arange(37) > 4].eq(127).all()
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()
    assert scale[3] == torch.finfo(torch.float32).tiny
    out = int8_linear(torch.randn(2, 50), packed)
    assert out.isfinite().all()
    assert out[:, 3].eq(0).all()
    again = PackedInt8.from_quantized(q, scale)
    assert torch.equal(again.data, packed.data)
    for shape in ((37, 1), (37,)):
        assert torch.equal(PackedInt8.from_quantized(q, scale.view(shape)).scale, scale)
    assert PackedInt8.from_quantized(q, torch.tensor(0.5)).scale.tolist() == [0.5] * 37


ACTIVATIONS = [
    (None, None, -128, 127),
    (None, None, -8, 7),
    (torch.tensor(0.02), None, -128, 127),
    (torch.tensor([0.03]), torch.tensor(-128, dtype=torch.int32), -128, 127),
    (torch.tensor([[0.03]]), torch.tensor([127], dtype=torch.int8), -128, 127),
    (torch.tensor(0.25), torch.tensor(7), -8, 7),
]


def plain(dtype: torch.dtype) -> tuple[str, torch.dtype, None, None]:
    """The last arguments of the raw ops: no activation, a floating output."""
    return "none", dtype, None, None


def linear_input(m: int, k: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(m, k)
    if m > 4 and k > 3:
        x[0, 2] = torch.nan
        x[1, 1] = torch.inf
        x[2, 3] = -torch.inf
        x[3] = 0
        x[4] = 1e-42
    return x.to(dtype)


@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (2, 40, 1030), (6, 33, 2051)])
def test_linear_equals_the_reference_bit_for_bit(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    data, colsum = torch.ops.qkernels.int8_pack(codes(n, k))
    for bias, activation in itertools.product((None, torch.randn(n)), ACTIVATIONS):
        args = (linear_input(m, k, dtype), data, colsum, torch.rand(n), bias, *activation, *plain(dtype))
        same(torch.ops.qkernels.int8_linear(*args), reference.int8_linear(*args))
        assert m == 0 or n == 0 or ran(kernel)


@pytest.mark.parametrize("m", [1, 7, 40])
def test_linear_is_the_scaled_matmul_of_quantized_rows(kernel: str, m: int) -> None:
    """Against torch's own arithmetic, spelled out here and not shared with the reference."""
    n, k = 70, 131
    x, q, scale, bias = torch.randn(m, k), codes(n, k, low=-127), torch.rand(n), torch.randn(n)
    packed = PackedInt8.from_quantized(q, scale)
    scale_x = x.abs().max(1, keepdim=True).values / 127
    codes_x = torch.clamp(torch.round(x * (1 / scale_x)), -128, 127)
    want = (codes_x.double() @ q.double().t()).float() * scale * scale_x + bias
    same(int8_linear(x, packed, bias), want)
    step, zero_point = torch.tensor(0.031), torch.tensor(11)
    codes_x = torch.clamp(torch.round(x * (1 / step)) + 11, -128, 127)
    want = ((codes_x.double() - 11) @ q.double().t()).float() * scale * step + bias
    same(int8_linear(x, packed, bias, input_scale=step, input_zero_point=zero_point), want)


def test_linear_rounds_halves_to_even(kernel: str) -> None:
    packed = PackedInt8.from_quantized(torch.eye(6, dtype=torch.int8), torch.ones(6))
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1000.0]])
    assert int8_linear(x, packed, input_scale=torch.ones(1)).tolist() == [[0, 2, 2, 0, -2, 127]]


def test_linear_nan_and_infinity(kernel: str) -> None:
    packed = PackedInt8.from_float(torch.randn(40, 20))
    x = torch.randn(5, 20)
    clean = x.clone()
    x[1, 3] = torch.nan
    x[3, 19] = torch.inf
    dynamic, static = int8_linear(x, packed), int8_linear(x, packed, input_scale=torch.tensor(0.02))
    assert dynamic.isnan().all(1).tolist() == [False, True, False, True, False]
    assert static.isnan().all(1).tolist() == [False, True, False, False, False]
    assert torch.equal(dynamic[::2], int8_linear(clean, packed)[::2])
    clean[3, 19] = 127 * 0.02
    assert torch.equal(static[3], int8_linear(clean, packed, input_scale=torch.tensor(0.02))[3])


@pytest.mark.parametrize(("scale", "nan"), [(0.0, False), (1e-42, False), (-1.0, True), (float("nan"), True)])
def test_linear_odd_input_scales(kernel: str, scale: float, nan: bool) -> None:
    packed = PackedInt8.from_float(torch.randn(4, 8))
    out = int8_linear(torch.randn(3, 8), packed, input_scale=torch.tensor(scale))
    assert out.isnan().all() if nan else out.isfinite().all()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (2, 0, 8), (0, 8)])
def test_linear_leading_dims(kernel: str, shape: tuple[int, ...]) -> None:
    packed, x = PackedInt8.from_float(torch.randn(5, 8)), torch.randn(shape)
    out = int8_linear(x, packed)
    assert out.shape == (*shape[:-1], 5)
    assert torch.equal(out.view(-1, 5), int8_linear(x.reshape(-1, 8), packed))
    strided = torch.randn(*shape[:-1], 16)[..., ::2]
    assert torch.equal(int8_linear(strided, packed), int8_linear(strided.contiguous(), packed))


def test_linear_in_several_passes() -> None:
    """More rows than one pass of scratch memory holds, and blocks of unequal height."""
    n, k, m = 33, 4096, 5000
    packed, x = PackedInt8.from_float(torch.randn(n, k)), torch.randn(m, k)
    out = int8_linear(x, packed)
    for rows in (slice(0, 3), slice(4000, 4100), slice(m - 1, m)):
        assert torch.equal(out[rows], int8_linear(x[rows], packed))
    a, b = codes(m, k), codes(n, k).t()
    assert torch.equal(int8_mm(a, b)[4000:4100], int8_mm(a[4000:4100], b))


def test_threads_do_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    x, packed, a, b = (
        torch.randn(67, 515),
        PackedInt8.from_float(torch.randn(210, 515)),
        codes(67, 515),
        codes(515, 210),
    )
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(
                [
                    int8_linear(x, packed),
                    int8_linear(x[:3], packed),
                    int8_mm(a, b),
                    int8_mm(a[:3], b),
                    *torch.ops.qkernels.int8_pack(a),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def sample_args(op: str) -> tuple:
    data, colsum = torch.ops.qkernels.int8_pack(codes(6, 9))
    return {
        "int8_mm": (codes(3, 9), codes(6, 9).t()),
        "int8_scaled_mm": (
            codes(3, 9),
            codes(9, 6),
            torch.rand(3, 1),
            torch.rand(6),
            torch.tensor(3),
            None,
            torch.randn(6),
            *plain(torch.bfloat16),
        ),
        "int8_pack": (codes(6, 9),),
        "int8_unpack": (data, 6, 9),
        "int8_linear": (
            torch.randn(2, 3, 9),
            data,
            colsum,
            torch.rand(6),
            torch.randn(6),
            torch.tensor(0.1),
            torch.tensor(1),
            -128,
            127,
            *plain(torch.float32),
        ),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, sample_args(op))


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_listed(op: str) -> None:
    expected = (
        ("cpu_avx512vnni", "cpu_avx2", "cpu_scalar", "reference")
        if op != "int8_unpack"
        else ("cpu_scalar", "reference")
    )
    if op in ("int8_mm", "int8_scaled_mm", "int8_linear"):
        expected = (*expected[:-1], "triton", "reference")
    assert [kernel.name for kernel in registry.kernels(op)] == list(expected)


def test_compile_does_not_recompile_when_the_batch_changes() -> None:
    packed = PackedInt8.from_float(torch.randn(6, 9))
    weight = codes(6, 9)

    def f(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = int8_scaled_mm(a, weight.t(), torch.ones(1), torch.ones(6))
        return int8_linear(x, packed).relu(), int8_mm(a, weight.t()), scaled

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 4, 40):  # first a size that no other dim has, which dynamic shapes would take for the same
            x, a = torch.randn(m, 9), codes(m, 9)
            for got, want in zip(compiled(x, a), f(x, a), strict=True):
                same(got, want)


def test_export() -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            packed = PackedInt8.from_float(torch.randn(6, 9))
            self.shape = packed.shape
            for name in ("data", "colsum", "scale"):
                self.register_buffer(name, getattr(packed, name))

        def forward(self, x: Tensor) -> Tensor:
            return int8_linear(x, PackedInt8(self.data, self.colsum, self.scale, self.shape))

    module = Linear()
    exported = torch.export.export(module, (torch.randn(3, 9),), dynamic_shapes=({0: torch.export.Dim("m")},))
    assert any(node.target is torch.ops.qkernels.int8_linear.default for node in exported.graph.nodes)
    x = torch.randn(11, 9)
    assert torch.equal(exported.module()(x), module(x))


MM_ERRORS = [
    ((codes(2, 3), codes(4, 5)), r"b: got shape \[4, 5\]; accepted: \[K, N\] with a's K, 3"),
    ((codes(2, 3).int(), codes(3, 5)), "a: got torch.int32; accepted: torch.int8"),
    ((codes(2, 3), codes(3, 5).byte()), "b: got torch.uint8; accepted: torch.int8"),
    ((codes(3), codes(3, 5)), r"a: got shape \[3\]; accepted: 2 dims"),
    ((codes(2, 3), codes(1, 3, 5)), r"b: got shape \[1, 3, 5\]; accepted: 2 dims"),
]


@pytest.mark.parametrize(("args", "message"), MM_ERRORS)
def test_mm_errors(kernel: str, args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        int8_mm(*args)
    with pytest.raises(RuntimeError, match=message):
        int8_scaled_mm(*args, torch.ones(1), torch.ones(1))


SCALED_ERRORS = [
    ({"scale_a": torch.ones(3)}, r"scale_a: got shape \[3\]; accepted: one element, \[M\] or \[M, 1\] with 2"),
    ({"scale_a": torch.ones(1, 2)}, r"scale_a: got shape \[1, 2\]"),
    ({"scale_a": torch.ones(2).int()}, "scale_a: got torch.int32; accepted: torch.float32"),
    ({"scale_b": torch.ones(4)}, r"scale_b: got shape \[4\]; accepted: one element, \[N\] or \[1, N\] with 5"),
    ({"scale_b": torch.ones(5, 1)}, r"scale_b: got shape \[5, 1\]"),
    ({"scale_b": torch.ones(5).long()}, "scale_b: got torch.int64"),
    ({"zero_point_a": torch.zeros(2)}, "zero_point_a: got torch.float32; accepted: an integer dtype"),
    ({"zero_point_a": torch.zeros(5).int()}, r"zero_point_a: got shape \[5\]"),
    ({"zero_point_a": torch.tensor(2**31)}, "zero_point_a: got 2147483648; accepted: what torch.int32 holds"),
    ({"bias": torch.zeros(4)}, r"bias: got shape \[4\]; accepted: \[N\] with 5"),
    ({"bias": torch.zeros(1)}, r"bias: got shape \[1\]"),
    ({"bias": torch.zeros(5).int()}, "bias: got torch.int32"),
    ({"out_dtype": torch.float64}, "out_dtype: got torch.float64; accepted: torch.float32, torch.bfloat16"),
    ({"out_dtype": torch.int32}, "out_dtype: got torch.int32"),
    ({"out_dtype": torch.int8}, "out_dtype: got torch.int8; accepted: .*, and with out_scale torch.int8"),
    ({"activation": "tanh"}, "activation: got 'tanh'; accepted: none, relu, gelu, silu"),
    ({"colsum_b": torch.zeros(4).int()}, r"colsum_b: got shape \[4\]; accepted: \[N\] with 5"),
    ({"colsum_b": torch.zeros(5)}, "colsum_b: got torch.float32; accepted: torch.int32"),
    ({"out_scale": torch.ones(2)}, r"out_scale: got shape \[2\]; accepted: one element"),
    ({"out_scale": torch.ones(1).int()}, "out_scale: got torch.int32"),
    ({"out_scale": torch.ones(1), "out_dtype": torch.bfloat16}, "out_dtype: got torch.bfloat16; accepted: torch.int8"),
    ({"out_zero_point": torch.zeros(1).int()}, "out_zero_point: got a tensor without out_scale"),
    ({"out_scale": torch.ones(1), "out_zero_point": torch.tensor(128)}, "out_zero_point: got 128; accepted"),
]


@pytest.mark.parametrize(("change", "message"), SCALED_ERRORS)
def test_scaled_mm_errors(kernel: str, change: dict, message: str) -> None:
    arguments = {"scale_a": torch.ones(2), "scale_b": torch.ones(5)} | change
    with pytest.raises(RuntimeError, match=message):
        int8_scaled_mm(codes(2, 3), codes(3, 5), **arguments)


LINEAR_ERRORS = [
    ({"x": torch.zeros(2, 8)}, r"x: got shape \[2, 8\]; accepted: \[\.\.\., 9\]"),
    ({"x": torch.zeros(())}, r"x: got shape \[\]; accepted: \[\.\.\., 9\]"),
    ({"x": torch.zeros(2, 9).double()}, "x: got torch.float64; accepted: torch.float32, torch.bfloat16, torch.float16"),
    ({"x": torch.zeros(2, 9).int()}, "x: got torch.int32"),
    ({"bias": torch.zeros(5)}, r"bias: got shape \[5\]; accepted: \[N\] with 6"),
    ({"input_scale": torch.ones(2)}, r"input_scale: got shape \[2\]; accepted: one element"),
    ({"input_scale": torch.ones(1).int()}, "input_scale: got torch.int32"),
    ({"input_zero_point": torch.tensor(1)}, "input_zero_point: got a tensor without input_scale"),
    ({"input_scale": torch.ones(1), "input_zero_point": torch.tensor(128)}, "input_zero_point: got 128; accepted"),
    ({"input_scale": torch.ones(1), "input_zero_point": torch.tensor(1.0)}, "input_zero_point: got torch.float32"),
    ({"input_scale": torch.ones(1), "input_zero_point": torch.zeros(2).int()}, r"input_zero_point: got shape \[2\]"),
    ({"quant_min": -129}, "quant_min, quant_max: got -129, 127; accepted: -128 <= quant_min < quant_max <= 127"),
    ({"quant_min": 5, "quant_max": 5, "input_scale": torch.ones(1)}, "quant_min, quant_max: got 5, 5"),
    ({"x": codes(2, 9)}, "input_scale: got None; accepted: the scale of the codes x"),
    ({"x": codes(2, 9), "input_scale": torch.ones(3)}, r"input_scale: got shape \[3\]; accepted: one element, \[2\]"),
    ({"x": codes(2, 9), "input_scale": torch.ones(2).int()}, "input_scale: got torch.int32"),
    (
        {"x": codes(2, 9), "input_scale": torch.ones(2), "input_zero_point": torch.zeros(1, 2).int()},
        r"input_zero_point: got shape \[1, 2\]",
    ),
    ({"activation": "tanh"}, "activation: got 'tanh'"),
    ({"out_dtype": torch.float64}, "out_dtype: got torch.float64"),
    ({"out_scale": torch.ones(1), "out_zero_point": torch.tensor(-129)}, "out_zero_point: got -129"),
]


@pytest.mark.parametrize(("change", "message"), LINEAR_ERRORS)
def test_linear_errors(kernel: str, change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 9), "packed": PackedInt8.from_float(torch.randn(6, 9))} | change
    with pytest.raises(RuntimeError, match=message):
        int8_linear(**arguments)


def test_raw_linear_errors(kernel: str) -> None:
    x, data, colsum, scale, *rest = sample_args("int8_linear")
    op = torch.ops.qkernels.int8_linear
    for args, message in (
        (
            (x[..., :4], data, colsum, scale),
            r"data: got shape \[1, 3, 32, 4\]; accepted: what int8_pack gives for N = 6",
        ),
        ((x, data.int(), colsum, scale), "data: got torch.int32"),
        ((x, data.transpose(1, 2).contiguous().transpose(1, 2), colsum, scale), "data: got strided memory"),
        ((x, data, colsum.long(), scale), "colsum: got torch.int64; accepted: contiguous torch.int32"),
        ((x, data, colsum, scale[:5]), r"scale: got shape \[5\]; accepted: \[N\] with 6"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args, *rest)
    with pytest.raises(RuntimeError, match=r"data: got shape \[1, 3, 32, 4\]"):
        torch.ops.qkernels.int8_unpack(data, 33, 9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_packing_refuses_weights_that_are_not_finite(bad: float) -> None:
    w = torch.randn(3, 4)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="w: got NaN or infinite values; accepted: finite weights"):
        PackedInt8.from_float(w)


def test_packing_errors() -> None:
    with pytest.raises(ValueError, match=r"w: got torch.int8 of shape \[3, 4\]; accepted: floating \[N, K\]"):
        PackedInt8.from_float(codes(3, 4))
    with pytest.raises(ValueError, match=r"w: got torch.float32 of shape \[3\]"):
        PackedInt8.from_float(torch.zeros(3))
    with pytest.raises(ValueError, match=r"scale: got shape \[4\]; accepted: one element, \[3\] or \[3, 1\]"):
        PackedInt8.from_quantized(codes(3, 4), torch.ones(4))
    with pytest.raises(RuntimeError, match=r"w: got torch.float32; accepted: torch.int8"):
        PackedInt8.from_quantized(torch.zeros(3, 4), torch.ones(3))


def test_forced_reference_never_runs_the_compiled_kernel() -> None:
    a, b = codes(2, 3), codes(3, 5)
    with library.use_kernel("cpu_scalar"):
        int8_mm(a, b)
    with library.use_kernel("reference"):
        int8_mm(a, b)
    assert library.host.last_isa() == "scalar"
