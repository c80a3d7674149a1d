"""The CUDA kernel of the int4 linear layer on the emulator (see test_cuda_emulated.py), and when it is chosen."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from int4_cuda import HALF_TYPES, KINDS, SHAPES, arguments, check, emulated, run

import qkernels as qk
from qkernels import library, registry
from qkernels.reference import int4_gemm as reference


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
    if "triton" not in kernels:
        pytest.skip("the emulator registers the CUDA kernels alone")
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
