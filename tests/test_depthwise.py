"""Convolutions with one filter per channel: every kernel size, block of channels and kind of output, on every path."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from compare import same
from conftest import paths_of
from program_plans import Plan

import qkernels.ops  # noqa: F401  defines the ops
from qkernels import library
from qkernels.reference import int8_program as reference

pytestmark = pytest.mark.sanitized

Triple = tuple[int, int, int]
ONE: Triple = (1, 1, 1)

# kernel, stride, dilation, size of the image
GEOMETRIES: list[tuple[Triple, Triple, Triple, tuple[int, ...]]] = [
    ((1, 3, 3), ONE, ONE, (5, 9)),
    ((1, 3, 3), (1, 2, 2), ONE, (9, 14)),
    ((1, 3, 3), ONE, (1, 2, 2), (7, 11)),
    ((1, 3, 3), ONE, ONE, (3, 1)),
    ((1, 3, 3), ONE, ONE, (2, 71)),
    ((1, 5, 5), ONE, ONE, (7, 19)),
    ((1, 5, 5), (1, 2, 2), ONE, (9, 13)),
    ((1, 7, 7), ONE, ONE, (5, 10)),
    ((1, 7, 7), (1, 3, 2), ONE, (9, 17)),
    ((1, 4, 2), (1, 1, 3), ONE, (7, 20)),
    ((1, 2, 6), ONE, (1, 1, 5), (4, 40)),
    ((1, 1, 1), (1, 2, 2), ONE, (5, 7)),
    ((1, 9, 11), ONE, ONE, (9, 13)),
    ((1, 1, 3), ONE, ONE, (23,)),
    ((1, 1, 9), (1, 1, 2), (1, 1, 3), (45,)),
    ((1, 1, 4), (1, 1, 7), ONE, (60,)),
    ((3, 3, 3), ONE, ONE, (4, 5, 9)),
    ((2, 4, 3), (2, 1, 2), (1, 2, 1), (5, 9, 8)),
    ((3, 1, 5), ONE, ONE, (4, 2, 11)),
    ((5, 1, 5), ONE, ONE, (6, 2, 11)),
]
# first, second, residual
EPILOGUES = [
    ("clamp:0.0:6.0", None, None),
    ("clamp:0.5:1.0", "relu", None),
    (None, None, None),
    ("hardswish", None, None),
    ("leaky_relu:0.1", "relu", "floats"),
    (None, "clamp:-1.0:2.0", "codes"),
]


@pytest.fixture(params=paths_of("int8_program"))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def check(
    kernel: str,
    channels: int,
    geometry: tuple[Triple, Triple, Triple, Sequence[int]],
    epilogue: tuple[str | None, str | None, str | None],
    out: tuple[float, int, int, int] = (0.04, -7, -128, 127),
) -> None:
    """Codes alone, floats alone and both, of images in both memory orders."""
    size, stride, dilation, image = geometry
    first, second, residual = epilogue
    padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, size, strict=True))
    after = tuple(d * (k - 1) - p for d, k, p in zip(dilation, size, padding, strict=True))
    plan = Plan()
    x, q, to = plan.input(), plan.quantizer(0.03, random.choice((-128, 3, 127))), plan.quantizer(*out)
    conv = plan.conv(
        plan.quantize(x, q), channels, channels, size,
        stride=stride, padding=padding, after=after, dilation=dilation, groups=channels, bias=random.random() < 0.8,
    )  # fmt: skip
    added = plan.input() if residual else None
    added_to = plan.quantize(added, q) if added and residual == "codes" else added
    for quantizer, floats in ((to, False), (None, True), (to, True)):
        names = plan.keep("conv", quantizer, floats, **conv, first=first, second=second, residual=added_to)
        for name in filter(None, names):
            plan.output(plan.move("dequantize", name, "f") if name[0] == "q" else name)
    outs = [-(-n // s) for n, s in zip(image, stride[3 - len(image) :], strict=True)]
    ones = [torch.randn(2, channels, *image), *([torch.randn(2, channels, *outs)] if residual else [])]
    for memory_format in (torch.contiguous_format, *([torch.channels_last] if len(image) == 2 else [])):
        inputs = [one.contiguous(memory_format=memory_format) for one in ones]
        torch.set_num_threads(1)
        want = reference.int8_program(inputs, plan.constants, plan.text)
        torch.set_num_threads(random.choice((1, 2)))
        same(torch.ops.qkernels.int8_program(inputs, plan.constants, plan.text), want)
        assert library.host is not None
        assert f"cpu_{library.host.last_isa()}" == kernel


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(kernel: str, geometry: tuple) -> None:
    for channels, epilogue in ((19, EPILOGUES[0]), (130, EPILOGUES[3])):
        check(kernel, channels, geometry, epilogue)


@pytest.mark.parametrize("channels", [2, 15, 16, 17, 24, 32, 33, 48, 63, 64, 65, 96, 144])
def test_blocks_of_channels(kernel: str, channels: int) -> None:
    for geometry in (GEOMETRIES[0], GEOMETRIES[1], GEOMETRIES[5]):
        check(kernel, channels, geometry, random.choice(EPILOGUES))


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_outputs(kernel: str, epilogue: tuple) -> None:
    for out in ((0.04, -7, -128, 127), (0.01, 100, -5, 101), (0.1, -128, -128, -100), (1e-30, 0, -7, 120)):
        for geometry in (GEOMETRIES[0], GEOMETRIES[13]):
            check(kernel, 40, geometry, epilogue, out)


@pytest.mark.nightly
def test_every_combination(kernel: str) -> None:
    for channels, geometry, epilogue in itertools.product((3, 20, 40, 70), GEOMETRIES, EPILOGUES):
        check(kernel, channels, geometry, epilogue)
