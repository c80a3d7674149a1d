"""int8_mm and int8_scaled_mm: exact sums, and every path bit for bit against the reference; the ops of the family."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from compare import same
from conftest import paths_of, untouched
from int8_cases import (
    INT32,
    OUT_DTYPES,
    OUTPUTS,
    SHAPES,
    codes,
    exact,
    layouts,
    linear_input,
    ran,
    sample_args,
    scaled_args,
)
from torch import Tensor

from qkernels import gemm_checks, library, registry
from qkernels.ops.int8_gemm import PackedInt8, int8_linear, int8_mm, int8_scaled_mm
from qkernels.reference import int8_gemm as reference

pytestmark = pytest.mark.sanitized

OPS = ("int8_mm", "int8_scaled_mm", "int8_pack", "int8_unpack", "int8_linear")


@pytest.fixture(params=[*paths_of("int8_mm"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_mm_is_exact(kernel: str, m: int, n: int, k: int) -> None:
    for a, b in itertools.product(layouts(m, k).values(), layouts(k, n).values()):
        out = int8_mm(a, b)
        assert out.dtype == torch.int32
        assert out.is_contiguous()
        assert torch.equal(out.long(), exact(a, b))
        assert m == 0 or n == 0 or ran(kernel)


@pytest.mark.parametrize("lowest", [-64, -127, -128])
def test_the_largest_products_of_weights_of_any_range(kernel: str, lowest: int) -> None:
    """Some paths multiply pairs of bytes in int16, in another way for each range; here all reach its end."""
    ends = torch.tensor([lowest, min(-lowest, 127)], dtype=torch.int8)
    w = ends[torch.randint(2, (70, 37))]
    w[:33] = lowest
    for m in (1, 2, 5, 16, 17):
        for a in (torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(2, (m, 37))], torch.full((m, 37), -128)):
            assert torch.equal(int8_mm(a.to(torch.int8), w.t()).long(), exact(a, w.t()))


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


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, sample_args(op))


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_listed(op: str) -> None:
    expected = (
        ("cpu_amx", "cpu_avx512vnni", "cpu_avx2", "cpu_scalar", "reference")
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


def test_forced_reference_never_runs_the_compiled_kernel() -> None:
    a, b = codes(2, 3), codes(3, 5)
    with library.use_kernel("cpu_scalar"):
        int8_mm(a, b)
    with library.use_kernel("reference"):
        int8_mm(a, b)
    assert library.host.last_isa() == "scalar"
