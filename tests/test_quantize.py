"""Real quantization: every kernel bit for bit against the reference, and quantize-dequantize against fake-quantize."""

from __future__ import annotations

import math

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of
from compare import same
from conftest import assert_ran, kernels_of

import qkernels as qk
from qkernels.reference import quantize as reference

pytestmark = pytest.mark.sanitized

COMPILED = [name for name in kernels_of("quantize") if name not in ("triton", "reference")]
CODES = [(torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int32, -(2**24), 2**24), (torch.int8, -8, 7)]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = INPUTS[name][0](dtype)
    scale = scale_of(shape)
    for code, low, high in CODES:
        for zero_point in (None, torch.randint(max(low, -100), min(high, 100), shape, dtype=torch.int32)):
            if zero_point is not None and low <= -8:
                zero_point = zero_point.clamp(low, high)
            q = reference.quantize(x, scale, zero_point, low, high, code)
            back = [reference.dequantize(q, scale, zero_point, out) for out in FLOATS]
            for kernel in COMPILED:
                with qk.use_kernel(kernel):
                    got = qk.quantize(x, scale, zero_point, quant_min=low, quant_max=high, dtype=code)
                    same(got, q)
                    for out, expected in zip(FLOATS, back, strict=True):
                        same(qk.dequantize(got, scale, zero_point, dtype=out), expected)
                        if x.numel():
                            assert_ran(kernel)


@pytest.mark.parametrize("kernel", kernels_of("quantize"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_round_trip_is_fake_quantize(kernel: str, dtype: torch.dtype) -> None:
    x = (torch.randn(16, 40) * 3).to(dtype)
    scale, zero_point = torch.rand(16, 1) * 0.1 + 0.01, torch.randint(-100, 100, (16, 1))
    with qk.use_kernel(kernel):
        q = qk.quantize(x, scale, zero_point)
        y = qk.fake_quantize(x, scale, zero_point, quant_min=-128, quant_max=127)
        same(qk.dequantize(q, scale, zero_point, dtype=dtype), y)


@pytest.mark.parametrize("kernel", kernels_of("quantize"), indirect=True)
def test_known_values(kernel: str) -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, math.inf, -math.inf, math.nan, 300.0])
    q = qk.quantize(x, torch.ones(1), torch.tensor([3], dtype=torch.int8))
    assert q.tolist() == [3, 5, 3, 1, 127, -128, 3, 127]
    q = qk.quantize(x, torch.ones(1), torch.tensor([128]), dtype=torch.uint8)
    assert q.tolist() == [128, 130, 128, 126, 255, 0, 128, 255]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("quantize", (torch.randn(4, 6), torch.rand(4, 1) + 0.1, None, -128, 127, torch.int8)),
        ("quantize", (torch.randn(4, 6).t(), torch.rand(1) + 0.1, torch.tensor([3]), 0, 255, torch.uint8)),
        ("dequantize", (torch.randint(-9, 9, (4, 6), dtype=torch.int8), torch.rand(4, 1) + 0.1, None, torch.float16)),
    ],
)
def test_opcheck(op: str, args: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.qkernels, op).default, args)


def test_compile_and_export() -> None:
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        q, scale, zero_point = qk.quantize_dynamic(x, group_size=8)
        return qk.dequantize(q, scale, zero_point) + qk.dequantize(qk.quantize(x, scale), scale)

    torch._dynamo.reset()
    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True)
    for batch in (4, 9, 3):
        x = torch.randn(batch, 24)
        with torch.compiler.set_stance("default" if batch == 4 else "fail_on_recompile"):
            same(compiled(x), round_trip(x))

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return round_trip(x)

    x = torch.randn(4, 24)
    program = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    same(program.module()(x), round_trip(x))


def test_threads_give_identical_bits() -> None:
    x = torch.randn(512, 700)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((*qk.quantize_dynamic(x), qk.quantize(x, torch.tensor([0.02]))))
    for a, b in zip(*results, strict=True):
        same(a, b)


X = torch.randn(4, 6)
ONE = torch.ones(1)
BAD = {
    "x dtype": (lambda: qk.quantize(X.int(), ONE), "x: got torch.int32"),
    "code dtype": (lambda: qk.quantize(X, ONE, dtype=torch.int16), "dtype: got torch.int16; accepted: torch.int8"),
    "range": (lambda: qk.quantize(X, ONE, quant_min=-129), "quant_min, quant_max: got -129, 127; accepted: what"),
    "zero_point": (lambda: qk.quantize(X, ONE, torch.tensor([200])), "zero_point: got 200"),
    "scale": (lambda: qk.quantize(X, torch.ones(3, 1)), r"scale: got shape \[3, 1\]"),
    "q dtype": (lambda: qk.dequantize(X, ONE), "q: got torch.float32; accepted: torch.int8"),
    "out dtype": (lambda: qk.dequantize(X.to(torch.int8), ONE, dtype=torch.int8), "dtype: got torch.int8; accepted"),
}


@pytest.mark.parametrize("kernel", kernels_of("quantize"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        call()
