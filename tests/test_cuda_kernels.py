"""Shapes that decide between the CUDA kernels' paths: hoisted channels, pieces, columns, rows in registers.

Runs where the kernel "cuda" takes CPU tensors, on the emulator (see test_cuda_emulated.py); skipped elsewhere.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from cases import channels_last, scale_of
from compare import same
from torch import Tensor

import qkernels as qk
from qkernels.ops import dynamic
from qkernels.ops import fake_quantize as ops
from qkernels.ops import fake_quantize_learnable as learnable
from qkernels.ops import foreach_fake_quantize as foreach
from qkernels.reference import dynamic as dynamic_reference
from qkernels.reference import fake_quantize as reference
from qkernels.reference import fake_quantize_learnable as learnable_reference
from qkernels.reference import quantize as reference_quantize

pytestmark = pytest.mark.skipif(qk.library.gpu != "cpu", reason="the CUDA kernels are not emulated")
HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


# Vectors of 4 (fp32) and 8 (halves) elements; 256 threads of 4 vectors to a block; 3 emulated processors.
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((40001,), (1,)),
    ((16384,), (1,)),
    ((300, 64), (1, 64)),
    ((1000, 33), (1, 33)),
    ((2500, 3), (1, 3)),
    ((9, 1030), (1, 1030)),
    ((2, 4099), (1, 4099)),
    ((64, 512), (64, 16)),
    ((64, 512), (64, 1)),
    ((33, 1031), (33, 1)),
    ((3, 8, 7, 7), (1, 8, 1, 1)),
    ((5, 16, 8, 8), (1, 16, 1, 1)),
    ((6, 4, 4, 4, 4), (2, 1, 4, 2, 4)),
    ((4, 6, 5, 4), (4, 3, 1, 2)),
    ((2, 70000), (2, 1)),
    ((1, 270000), (1, 1)),
    ((700, 5), (700, 1)),
    ((50, 14), (50, 7)),
    ((5, 5504), (5, 1)),  # blocks of one row each, of fewer threads, with lanes beyond its end
    ((40, 1536), (40, 1)),
    ((3, 4100), (3, 1)),  # whole vectors, but masks whose bytes have bits of two rows
    ((2, 3, 40, 40), (1, 3, 1, 1)),
    ((32, 4096), (32, 4)),
    ((256, 384), (2, 3)),
]


@pytest.mark.parametrize(("shape", "granularity"), SHAPES)
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
def test_paths(shape: tuple[int, ...], granularity: tuple[int, ...], dtype: torch.dtype) -> None:
    layouts = [torch.randn(shape).to(dtype)]
    if len(shape) == 4:
        layouts.append(channels_last(layouts[0]))
    if layouts[0].numel() < 50000:
        layouts.append(torch.randn(layouts[0].numel() + 1).to(dtype)[1:].view(shape))  # misaligned
    scale, zero_point = scale_of(granularity), torch.randn(granularity) * 4
    for x in layouts:
        grad = torch.empty_like(x).copy_(torch.randn(shape))
        args = (scale, zero_point, -8, 7)
        bound = learnable_reference.sum_to(grad.double().abs() * 16, scale) * 2**-20 + 1e-12
        for lsq in (False, True):
            y, mask = ops._forward_mask(x, *args, lsq)
            for got, want in zip((y, mask), reference.fake_quantize_forward_mask(x, *args, lsq), strict=True):
                same(got, want)
            same(ops._forward(x, *args), y)
            dx = reference.fake_quantize_backward(grad, x, *args, lsq)
            same(ops._backward(grad, x, *args, lsq), dx)
            same(ops.backward_mask(grad, mask), dx)
            learned = learnable.learnable_backward(grad, x, *args, 0.5, lsq)
            same(learned[0], dx)
            sums = learnable_reference.fake_quantize_learnable_backward(grad, x, *args, 0.5, lsq)[
                1:
            ]  # as defined, in fp64
            for got, want in zip(learned[1:], sums, strict=True):
                assert ((got - want).double().abs() <= bound).all()
            again = learnable.learnable_backward(grad, x, *args, 0.5, lsq)
            for first, second in zip(learned, again, strict=True):
                same(first, second)
        q = qk.quantize(x, scale, zero_point, quant_min=-8, quant_max=7)
        same(q, reference_quantize.quantize(x, *args, torch.int8))
        same(qk.dequantize(q, scale, zero_point), reference_quantize.dequantize(q, *args[:2], torch.float32))


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [8, 16, 24, 32, 64, 128, 136, 256, 1000, 1024, 1032, 4096, 17000])
def test_dynamic_rows(columns: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(7 if columns > 2000 else 150, columns) * 3).to(dtype)
    x[1, 3], x[3, 0] = math.nan, math.inf
    x[2] = 0
    for got, want in zip(
        dynamic._dynamic_forward(x, -1, -8, 7, symmetric),
        dynamic_reference.fake_quantize_dynamic_forward(x, -1, -8, 7, symmetric),
        strict=True,
    ):
        same(got, want)
    for got, want in zip(
        qk.quantize_dynamic(x, symmetric=symmetric),
        dynamic_reference.quantize_dynamic(x, -1, -128, 127, symmetric),
        strict=True,
    ):
        same(got, want)


def test_one_row_longer_than_the_registers() -> None:
    x = torch.randn(2, 40000)
    for symmetric in (True, False):
        for group in (-1, 0):
            got = dynamic._dynamic_forward(x, group, -128, 127, symmetric)
            want = dynamic_reference.fake_quantize_dynamic_forward(x, group, -128, 127, symmetric)
            for a, b in zip(got, want, strict=True):
                same(a, b)


def test_what_the_host_cannot_check_gives_nan() -> None:
    """Values on the device are not read: an integer zero point outside the range gives NaN, codes quant_min."""
    x, zero_point = torch.randn(4, 20), torch.tensor([[500], [0], [-9], [7]])
    y = qk.fake_quantize(x, torch.full((4, 1), 0.1), zero_point, quant_min=-8, quant_max=7)
    assert y.isnan().all(1).tolist() == [True, False, True, False]
    q = qk.quantize(x, torch.full((4, 1), 0.1), zero_point, quant_min=-8, quant_max=7)
    assert q[0].tolist() == q[2].tolist() == [-8] * 20


def test_too_many_levels_are_named() -> None:
    x, scale = torch.randn((2, 2) * 7), torch.rand((2, 1) * 7) + 0.1
    with pytest.raises(RuntimeError, match="scale: got a granularity of 13 levels in x's memory order; accepted"):
        qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)


def many(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor | None, int, int]]:
    """More tensors than one launch takes, of every path of the foreach kernels."""
    granularities = [(1,), (6, 1), (1, 700), (6, 7), (2, 1), (1, 1), (1, 7), (3, 350)]
    calls: list[tuple[Tensor, Tensor, Tensor | None, int, int]] = []
    for at in range(44):
        rows, columns = (6, 700) if at % 11 else (12, 3500)
        x = torch.randn(rows, columns) if at % 5 else torch.randn(rows * columns + 1)[1:].view(rows, columns)
        scale = scale_of(granularities[at % 8])
        zero_point = (None, torch.randint(-8, 8, scale.shape), torch.randn(1) * 4, torch.randn(scale.shape).double())
        calls.append((x.to(dtype), scale, zero_point[at % 4], -8, 7 + at))
    calls.append((torch.randn(200, 3).to(dtype), scale_of((1, 3)), None, -8, 7))  # by columns
    calls.append((torch.randn(4, 6, 10).to(dtype), scale_of((4, 1, 5)), None, -8, 7))  # two dimensions
    calls.append((torch.randn(0, 3).to(dtype), scale_of((1, 3)), None, -8, 7))
    calls.append((torch.randn(()).to(dtype), scale_of((1,)), None, -8, 7))
    return calls


@pytest.mark.parametrize("dtype", [*HALF_AND_FLOAT, torch.float64], ids=str)
@pytest.mark.parametrize("lsq", [False, True], ids=["clip", "lsq"])
def test_foreach(dtype: torch.dtype, lsq: bool) -> None:
    calls = many(dtype)
    lists = [list(values) for values in zip(*calls, strict=True)]
    grads = [torch.randn(x.shape).to(dtype) for x in lists[0]]
    factors = [0.1 * at for at in range(len(calls))]
    ys, dxs = foreach._forward(*lists), foreach._backward(grads, *lists, lsq)
    learned = foreach._learnable_backward(grads, *lists, factors, lsq)
    for at, call in enumerate(calls):
        same(ys[at], ops._forward(*call))
        same(dxs[at], ops._backward(grads[at], *call, lsq))
        want = learnable.learnable_backward(grads[at], *call, factors[at], lsq)
        for part in range(3):
            same(learned[part][at], want[part])


def emulated(counter: str) -> ctypes.c_ulong:
    (library,) = (path for path in torch.ops.loaded_libraries if "emulated" in path)
    return ctypes.c_ulong.in_dll(ctypes.CDLL(library), counter)


def test_each_tensor_is_asked_for_its_device_once() -> None:
    """Type and index, a call into torch each; in eager mode such calls are much of a small tensor's time."""
    asked = emulated("emulated_device_questions")
    x, grad, scale, zero_point = torch.randn(64, 64), torch.randn(64, 64), torch.ones(64, 1), torch.zeros(64)[:, None]
    flag, statistics = torch.ones(1), [torch.zeros(1), torch.zeros(1), torch.ones(1)]
    args = (scale, zero_point, -8, 7)
    mask = ops._forward_mask(x, *args, False)[1]
    for tensors, op, given in (
        (3, ops._forward, (x, *args)),
        (3, ops._forward_mask, (x, *args, False)),
        (4, ops._backward, (grad, x, *args, False)),
        (2, ops.backward_mask, (grad, mask)),
        (4, learnable.learnable_backward, (grad, x, *args, 1.0, False)),
        (1, dynamic._dynamic_forward, (x, -1, -8, 7, True)),
        (
            7,
            torch.ops.qkernels.observe_fake_quantize,
            (x, flag, flag, *statistics, torch.zeros(1).int(), 0.1, -8, 7, 0, 0),
        ),
    ):
        before = asked.value
        op(*given)
        assert asked.value - before <= 2 * tensors, op


def test_the_latter_of_two_stages_starts_early_and_only_then_is_memory_needed() -> None:
    """A gradient of one scale takes two stages, of one scale for each row one."""
    early, allocated = emulated("emulated_early"), emulated("emulated_allocations")
    x, grad = torch.randn(64, 1024), torch.randn(64, 1024)
    for scale, stages in ((torch.ones(1), 2), (torch.ones(64, 1), 1)):
        before = early.value, allocated.value
        learnable.learnable_backward(grad, x, scale, None, -8, 7, 1.0, False)
        assert early.value - before[0] == stages - 1
        assert allocated.value - before[1] == 3 + stages - 1


def test_foreach_launches() -> None:
    """A launch for some 30 tensors, 18 where sums are taken; none for each."""
    launches = emulated("emulated_launches")

    def launched(op: Any, *args: Any) -> int:
        before = launches.value
        op(*args)
        return launches.value - before

    xs = [torch.randn(64, 256) for _ in range(16)]
    for scales in ([torch.ones(1)] * 16, [torch.ones(64, 1)] * 16):
        lists = (xs, scales, [None] * 16, [-8] * 16, [7] * 16)
        assert launched(foreach._forward, *lists) == 1
        assert launched(foreach._backward, xs, *lists) == 1
        assert launched(foreach._learnable_backward, xs, *lists, [1.0] * 16) == (2 if scales[0].numel() == 1 else 1)
    assert launched(foreach._forward, xs * 4, [torch.ones(1)] * 64, [None] * 64, [-8] * 64, [7] * 64) <= 3
