"""The CUDA kernel of the int4 linear layer on the emulator (see test_cuda_emulated.py), and when it is chosen."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels import layouts, library, registry
from qkernels.reference import int4_gemm as reference

emulated = pytest.mark.skipif(library.gpu != "cpu", reason="the CUDA kernels are not emulated")
HALF_TYPES = (torch.bfloat16, torch.float16)
KINDS = ("symmetric", "zero_point", "minimum")


def arguments(
    m: int,
    n: int,
    k: int,
    group_size: int,
    kind: str = "symmetric",
    dtype: torch.dtype = torch.bfloat16,
    *,
    scale_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = torch.float32,
    out_dtype: torch.dtype | None = None,
    whole: bool = False,
) -> tuple[Any, ...]:
    """Of qkernels::int4_linear, in a GPU's layout; ``whole``: of numbers whose sums fp32 holds exactly."""
    groups = k // group_size
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    x, scale, minimum = torch.randn(m, k), torch.rand(n, groups) * 0.2 + 0.01, torch.randn(n, groups)
    scale *= torch.where(torch.rand(n, groups) < 0.2, -1, 1)
    bias = torch.randn(n)
    if whole:
        x, bias = torch.randint(-4, 5, (m, k)).float(), torch.randint(-9, 9, (n,)).float()
        scale, minimum = 2.0 ** torch.randint(-2, 3, (n, groups)), torch.randint(-16, 17, (n, groups)) / 4
    scale, minimum = scale.to(scale_dtype), minimum.to(scale_dtype) if kind == "minimum" else None
    zero_point = torch.randint(-8, 8, (n, groups), dtype=torch.int8) if kind == "zero_point" else None
    offset = reference.offset_of(scale, zero_point, minimum)
    weight_sum = reference.weight_of(q, scale, offset, group_size).sum(1).float()
    by_group = (None if t is None else t.t().contiguous() for t in (scale, zero_point, minimum))
    return (
        x.to(dtype), layouts.int4_to_halves(q, group_size), *by_group, weight_sum,
        None if bias_dtype is None else bias.to(bias_dtype), group_size, 16, None, None, -128, 127, out_dtype or dtype,
    )  # fmt: skip


def check(y: Tensor, args: tuple[Any, ...]) -> None:
    """y against the product in fp64, within the bound that int4_linear's documentation gives."""
    x, data, scale, zero_point, minimum, weight_sum, bias, group_size = (
        t.cpu() if isinstance(t, Tensor) else t for t in args[:8]
    )
    n, k = weight_sum.numel(), x.shape[-1]
    scale, zero_point, minimum = (None if t is None else t.t() for t in (scale, zero_point, minimum))
    offset = reference.offset_of(scale, zero_point, minimum)
    weight = reference.weight_of(layouts.int4_unpack(data, n, k, group_size), scale, offset, group_size)
    most = 15 * scale.double().abs() + (0 if offset is None else offset.double().abs())
    exact = x.double() @ weight.t()
    bound = (k + 4) * 2**-23 * (x.double().abs() @ most.repeat_interleave(k // scale.shape[1], 1).t())
    if bias is not None:
        exact = exact + bias.double()
        bound = bound + exact.abs() * 2**-23
    assert y.dtype == args[-1]
    assert y.shape == exact.shape
    rounding = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}[y.dtype]
    error = (y.cpu().double() - exact).abs()
    assert (error <= bound * (1 + rounding) + exact.abs() * rounding).all(), (error / bound).max()


def run(args: tuple[Any, ...]) -> Tensor:
    with qk.use_kernel("cuda"):
        return registry.run("int4_linear", *args)


# Rows in every class, channels of whole and of cut tiles, k in every kind of group and rows of data that end half way
# through a tile; three processors, so that columns are shared by many blocks, and blocks have parts in many columns.
SHAPES = [
    (1, 128, 1024, 128),
    (3, 100, 256, 64),
    (8, 33, 128, 32),
    (9, 257, 512, 256),
    (16, 128, 192, 64),
    (16, 130, 96, 32),
    (17, 64, 640, 128),
    (30, 300, 192, 192),
    (32, 1, 256, 32),
    (33, 129, 384, 96),
    (63, 70, 320, 160),
    (64, 256, 256, 128),
    (5, 40, 200, 200),
    (2, 40, 8, 8),
    (4, 5000, 128, 64),
    (7, 1281, 384, 384),
    (6, 200, 1152, 384),  # these have stripes that begin within a group
    (11, 150, 960, 192),
    (20, 90, 960, 96),
]


@emulated
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_bound(shape: tuple[int, int, int, int], kind: str) -> None:
    for dtype in HALF_TYPES:
        args = arguments(*shape, kind, dtype)
        check(run(args), args)


@emulated
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_that_are_exact(shape: tuple[int, int, int, int], kind: str) -> None:
    """Every code, scale, offset and element of x in its place: to the last bit."""
    for dtype, scale_dtype in zip(HALF_TYPES, (torch.float16, torch.bfloat16), strict=True):
        args = arguments(*shape, kind, dtype, scale_dtype=scale_dtype, out_dtype=torch.float32, whole=True)
        torch.testing.assert_close(run(args), reference.int4_linear(*args), rtol=0, atol=0)


@emulated
@pytest.mark.parametrize("processors", [1, 2, 7, 50])
def test_any_number_of_processors(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(4, 400, 2048, 64, "zero_point", whole=True, out_dtype=torch.float32)
    want = reference.int4_linear(*args)
    monkeypatch.setenv("EMULATED_PROCESSORS", str(processors))
    torch.testing.assert_close(run(args), want, rtol=0, atol=0)


@emulated
def test_narrow_products_are_cut_along_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tiles, on eight processors of 50; they are not left to two stripes of four."""
    (built,) = (path for path in torch.ops.loaded_libraries if "emulated" in path)
    blocks = ctypes.c_ulong.in_dll(ctypes.CDLL(built), "emulated_blocks")
    monkeypatch.setenv("EMULATED_PROCESSORS", "50")
    args = arguments(4, 128, 1024, 64)
    before = blocks.value
    check(run(args), args)
    assert blocks.value - before == 8 + 4  # and the sums of four rows


@emulated
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_bias_and_output(bias_dtype: torch.dtype | None, out_dtype: torch.dtype) -> None:
    args = arguments(6, 150, 256, 64, bias_dtype=bias_dtype, out_dtype=out_dtype)
    check(run(args), args)


@emulated
def test_strided_and_misaligned_inputs() -> None:
    args = arguments(6, 150, 256, 64, "minimum")
    x = args[0]
    wide = torch.full((6, 512), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    data = torch.empty(args[1].numel() + 4, dtype=torch.uint8)[4:].view(args[1].shape).copy_(args[1])
    want = run(args)
    assert torch.equal(run((wide[:, ::2], *args[1:])), want)
    assert torch.equal(run((shifted, data, *args[2:])), want)
    assert torch.equal(run((x.reshape(2, 1, 3, -1), *args[1:])), want.reshape(2, 1, 3, -1))


@emulated
def test_nan_stays_in_its_row_and_its_channel() -> None:
    args = list(arguments(9, 140, 320, 64))
    args[0][4, 100], args[0][5, 7] = torch.nan, torch.inf
    args[2][2, 131] = torch.nan
    nan = run(tuple(args)).isnan()
    assert nan[:, 131].all()
    assert nan[4].all()
    assert not nan[[row for row in range(9) if row not in (4, 5)]][:, [n for n in range(140) if n != 131]].any()


@emulated
def test_what_does_not_fit_is_named() -> None:
    args = list(arguments(4, 64, 128, 32))
    raw = torch.ops.qkernels.int4_linear_cuda.default

    def refused(text: str, at: int, value: Any) -> None:
        with pytest.raises(RuntimeError, match=text):
            raw(*[value if i == at else arg for i, arg in enumerate(args)])

    refused("x: got torch.float32; accepted: torch.bfloat16", 0, args[0].float())
    refused("x: got 65 rows; accepted: up to 64", 0, torch.zeros(65, 128).bfloat16())
    refused("x: got K = 124", 0, torch.zeros(4, 124).bfloat16())
    refused(r"data: got shape \[64, 32\]; accepted: contiguous \[64, 64\]", 1, args[1][:, :32].contiguous())
    refused(r"scale: got shape \[3, 64\]", 2, args[2][:3])
    refused("zero_point: got torch.int64", 3, torch.zeros(4, 64, dtype=torch.int64))
    refused(r"weight_sum|data", 5, torch.zeros(65))
    refused(r"bias: got shape \[63\]", 6, torch.zeros(63))
    refused("group_size: got 16; accepted: K = 128, or a multiple of 32", 7, 16)
    refused("act_bits: got 8; accepted: 16", 8, 8)
    refused("out_dtype: got torch.float64", 13, torch.float64)
    assert raw(*(torch.zeros(0, 128).bfloat16(), *args[1:])).shape == (0, 64)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the CUDA kernels were there for CPU tensors."""
    monkeypatch.setattr(library, "gpu", "cpu")
    monkeypatch.setattr(library, "cuda_state", [None])
    return monkeypatch


def reason(*args: Any) -> str | None:
    return next(k for k in qk.kernels("int4_linear") if k.name == "cuda").unsupported(*args)


def test_reasons(loaded: pytest.MonkeyPatch) -> None:
    args = arguments(4, 16, 128, 32)
    assert reason(*args) is None
    for other, text in [
        ((args[0].float(), *args[1:]), "takes x of torch.bfloat16 and torch.float16, got torch.float32"),
        ((*args[:8], 8, *args[9:]), "takes act_bits 16, got 8"),
        ((args[0], torch.zeros(1, 32, 16, 4), *args[2:]), 'takes weights in the layout "halves-1"'),
        (arguments(65, 16, 128, 32), "takes 1 to 64 rows of x, got 65"),
        (arguments(0, 16, 128, 32), "takes 1 to 64 rows of x, got 0"),
        (arguments(4, 16, 100, 100), "takes K that is a multiple of 8, for copies of 16 bytes, got 100"),
        (arguments(4, 16, 96, 48), "takes a group_size that is K or a multiple of 32, got 48"),
    ]:
        said = reason(*other)
        assert said is not None
        assert said.startswith(text)


def test_choice(loaded: pytest.MonkeyPatch) -> None:
    """Triton's kernel goes first, the CUDA kernel takes what Triton does not, and each runs where it is forced."""
    args = arguments(4, 16, 128, 32)
    kernels = {kernel.name: kernel for kernel in qk.kernels("int4_linear")}
    names = [name for name in kernels if not name.startswith("cpu_")]
    assert names == ["triton", "cuda", "reference"]
    ran: list[str] = []

    def kernel(name: str, refusal: str | None) -> registry.Kernel:
        unsupported = kernels["cuda"].unsupported if name == "cuda" else lambda *_: refusal
        return registry.Kernel("int4_linear", name, lambda *_: ran.append(name), unsupported)

    for refusal, expected in ((None, "triton"), ("takes something else", "cuda")):
        others = [kernel(name, refusal if name == "triton" else None) for name in names]
        loaded.setitem(registry._kernels, "int4_linear", others)
        assert registry.select("int4_linear", *args).name == expected
        listed = qk.which("int4_linear", *args)
        assert next(name for name, reason in listed if reason is None) == expected
        assert dict(listed)["cuda"] is None
        assert registry.select("int4_linear", args[0].float(), *args[1:]).name == (
            "triton" if refusal is None else "reference"
        )
        with qk.use_kernel("cuda"):
            registry.run("int4_linear", *args)
            with pytest.raises(RuntimeError, match="cannot run: takes act_bits 16"):
                registry.run("int4_linear", *args[:8], 8, *args[9:])
    assert ran == ["cuda", "cuda"]
