"""The convolution kernels behind int8_program on random geometries, transposed ones too, and the packing of weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import same
from conftest import paths_of
from program_plans import Plan

import qkernels.ops  # noqa: F401  defines the ops
from qkernels import layouts, library
from qkernels.ops.int8_conv2d import (
    int8_conv_pack,
    int8_conv_transpose_pack,
    int8_conv_transpose_unpack,
    int8_conv_unpack,
)
from qkernels.ops.int8_gemm import int8_pack
from qkernels.reference import int8_program as reference

pytestmark = pytest.mark.sanitized

ACTIVATIONS = (
    *(None, "relu", "clamp:0.0:6.0", "clamp:-1.0:0.5", "leaky_relu:0.1", "leaky_relu:-2.0", "hardswish", "hardsigmoid"),
    *("silu", "gelu", "sigmoid", "tanh"),
)
SEEDS = [*range(24), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(24, 240))]


@pytest.fixture(params=paths_of("int8_program"))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def check(plan: Plan, *inputs: torch.Tensor, kernel: str, threads: int = 1) -> None:
    torch.set_num_threads(1)
    want = reference.int8_program(inputs, plan.constants, plan.text)
    torch.set_num_threads(threads)
    got = torch.ops.qkernels.int8_program(list(inputs), plan.constants, plan.text)
    assert library.host is not None
    assert f"cpu_{library.host.last_isa()}" == kernel
    same(got, want)


def random_epilogue(draw: random.Random, plan: Plan, q: int, residual: str | None) -> dict[str, Any]:
    kind = draw.choice(("none", "floats", "codes")) if residual else "none"
    added = {"none": None, "floats": residual, "codes": residual and plan.quantize(residual, q)}[kind]
    return {"first": draw.choice(ACTIVATIONS), "second": draw.choice(ACTIVATIONS[:5]), "residual": added}


def outputs_of(plan: Plan, names: tuple[str | None, str | None]) -> None:
    for name in names:
        if name is not None:
            plan.output(plan.move("dequantize", name, "f") if name[0] == "q" else name)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_convolutions(kernel: str, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    groups = draw.choice((1, 1, 1, 2, 3, 8, 16, 33))
    of_group = (1, 1) if groups == 33 else (draw.choice((1, 2, 3, 4, 8, 17, 32)), draw.choice((1, 2, 4, 7, 16, 33)))
    c_in, c_out = groups * of_group[0], groups * of_group[1]
    size = draw.choice((1, 2)), draw.randint(1, 9), draw.choice((1, 7, 8, 9, 14, 15, 17, 22, 29))
    window = draw.choice(((1, 1, 1), (1, 3, 3), (1, 1, 3), (1, 5, 2), (2, 3, 3), (1, 7, 7)))
    dilation = draw.choice(((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 1, 3)))
    reach = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    padding = [max(draw.randint(0, 1 + r // 2), (1 + r - s + 1) // 2) for r, s in zip(reach, size, strict=True)]
    stride = draw.choice(((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 1, 3)))
    plan, batch = Plan(), draw.choice((1, 3))
    x, other = plan.input(), plan.input()
    q = plan.quantizer(0.03, draw.choice((None, -128, 127, 5)))
    low, high = draw.choice(((-128, 127), (0, 127), (-8, 7)))
    out = plan.quantizer(0.05, draw.choice((low, high)), low, high)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    conv = plan.conv(plan.quantize(x, q), c_in, c_out, window, **geometry, bias=draw.random() < 0.7)
    conv |= random_epilogue(draw, plan, out, other)
    outputs_of(plan, plan.keep("conv", draw.choice((None, out, out)), draw.choice((None, True)), **conv))
    shape = [(s + 2 * p - r - 1) // t + 1 for s, p, r, t in zip(size, padding, reach, stride, strict=True)]
    check(
        plan,
        torch.randn(batch, c_in, *size),
        torch.randn(batch, c_out, *shape),
        kernel=kernel,
        threads=draw.choice((1, 2)),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_random_transposed_convolutions(kernel: str, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    groups = draw.choice((1, 1, 2, 3, 33))
    of_group = (1, 1) if groups == 33 else (draw.choice((1, 3, 4, 16)), draw.choice((1, 2, 8, 33)))
    c_in, c_out = groups * of_group[0], groups * of_group[1]
    size = draw.choice((1, 2)), draw.randint(1, 6), draw.choice((1, 5, 7, 8, 14))
    window = draw.choice(((1, 1, 1), (1, 2, 2), (1, 3, 3), (1, 4, 4), (2, 2, 2), (1, 1, 5)))
    stride = draw.choice(((1, 2, 2), (1, 1, 1), (2, 2, 2), (1, 3, 2)))
    dilation = draw.choice(((1, 1, 1), (1, 1, 1), (1, 2, 2), (1, 3, 2)))
    padding = [draw.randint(0, d * (k - 1)) for d, k in zip(dilation, window, strict=True)]
    added = [draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
    each = zip(size, stride, padding, dilation, window, added, strict=True)
    shape = [(s - 1) * t - 2 * p + d * (k - 1) + a + 1 for s, t, p, d, k, a in each]
    if min(shape) < 1:
        padding, added = [0, 0, 0], [0, 0, 0]
        each = zip(size, stride, dilation, window, strict=True)
        shape = [(s - 1) * t + d * (k - 1) + 1 for s, t, d, k in each]
    data, colsum = int8_conv_transpose_pack(codes(c_in, c_out // groups, *window), groups, stride, dilation)
    plan = Plan()
    x, other = plan.input(), plan.input()
    q, out = plan.quantizer(0.03, draw.choice((None, -128, 5))), plan.quantizer(0.5, -9)
    values: dict[str, Any] = {"x": plan.quantize(x, q), "data": data, "colsum": colsum, "scale": torch.rand(c_out) / 99}
    values |= {"bias": torch.randn(c_out), "in": c_in, "out_channels": c_out, "kernel": window, "stride": stride}
    values |= {"padding": padding, "output_padding": added, "dilation": dilation, "groups": groups}
    values |= random_epilogue(draw, plan, out, other)
    outputs_of(plan, plan.keep("conv_transpose", draw.choice((None, out)), draw.choice((None, True)), **values))
    inputs = torch.randn(2, c_in, *size), torch.randn(2, c_out, *shape)
    check(plan, *inputs, kernel=kernel, threads=draw.choice((1, 2)))


# Channels, the image, and the geometry: what fills matrix tiles of 16 pixels with 64 codes each, and what does not.
TILES: dict[str, tuple[int, int, tuple[int, int], dict[str, Any]]] = {
    "rows of 7, two to a tile": (64, 70, (9, 7), {"padding": (0, 1, 1)}),
    "rows of 15 and 16 pixels": (32, 16, (5, 31), {"padding": (0, 1, 1)}),
    "a last tile that ends early": (64, 33, (3, 23), {"padding": (0, 1, 1)}),
    "runs that no tile divides": (68, 33, (7, 16), {"padding": (0, 1, 1), "stride": (1, 2, 2)}),
    "one run for each tap": (36, 48, (9, 20), {"padding": (0, 2, 2), "dilation": (1, 2, 2)}),
    "groups in halves of a panel": (64, 64, (6, 14), {"padding": (0, 1, 1), "groups": 16}),
    "groups of many channels": (96, 80, (6, 14), {"padding": (0, 1, 1), "groups": 2}),
    "one long row": (264, 40, (5, 5), {"kernel": (1, 1, 1)}),
    "strided pixels": (129, 40, (9, 9), {"kernel": (1, 1, 1), "stride": (1, 2, 2)}),
}


@pytest.mark.parametrize("epilogue", ["codes", "residual"])
@pytest.mark.parametrize("case", TILES)
def test_whole_tiles(kernel: str, case: str, epilogue: str) -> None:
    c_in, c_out, size, geometry = TILES[case]
    plan = Plan()
    x, q, out = plan.input(), plan.quantizer(0.03, 3), plan.quantizer(0.05, -7)
    conv = plan.conv(
        plan.quantize(x, q),
        c_in,
        c_out,
        geometry.get("kernel", (1, 3, 3)),
        **{key: value for key, value in geometry.items() if key != "kernel"},
    )
    inputs = [torch.randn(2, c_in, 1, *size)]
    if epilogue == "codes":
        plan.output(plan.move("dequantize", plan.codes("conv", out, first="relu", **conv), "f"))
    else:
        plain = plan.floats("conv", **conv)
        plan.output(plan.floats("conv", first="hardswish", residual=plain, **conv))
    check(plan, *inputs, kernel=kernel)


@pytest.mark.parametrize("zero_point", [-128, 127])
def test_sums_beyond_int32(kernel: str, zero_point: int) -> None:
    """Of a K so large that the codes' sum fits int32, but not what the zero point adds to it."""
    k, plan = 131071, Plan()
    x, q = plan.input(), plan.quantizer(1.0, zero_point)
    linear = plan.conv(plan.quantize(x, q), k, 3, step="linear")
    weight = torch.full((3, k, 1), -128, dtype=torch.int8)
    weight[1] = 127
    linear["data"], linear["colsum"] = int8_conv_pack(weight, 1)
    plan.output(plan.floats("linear", **linear))
    ends = torch.stack([torch.full((k,), float(value - zero_point)) for value in (-128, 127)])
    check(plan, ends, kernel=kernel)


# Shape and groups.
WEIGHTS = [
    ((6, 2, 3, 3), 2),
    ((66, 5, 3, 2), 1),
    ((66, 5, 3, 2), 6),
    ((36, 4, 2, 3, 3), 3),
    ((8, 3, 7), 2),
    ((128, 4, 3, 3), 32),
    ((33, 1, 3, 3), 33),
    ((130, 1, 7, 7), 130),
    ((20, 1, 2, 3, 3), 20),
    ((97, 1, 1, 9), 97),
    ((3, 1, 1, 1), 3),
    ((0, 3, 3, 3), 1),
    ((4, 0, 3, 3), 1),
]


@pytest.mark.parametrize(("shape", "groups"), WEIGHTS)
def test_packing_follows_its_drawing_and_returns(shape: tuple[int, ...], groups: int) -> None:
    q = codes(*shape)
    for weight in (q, q.transpose(0, -1).contiguous().transpose(0, -1)):
        data, colsum = int8_conv_pack(weight, groups)
        assert torch.equal(data, layouts.conv_pack(q, groups))
        assert torch.equal(colsum, q.flatten(1).sum(1, dtype=torch.int32))
    assert torch.equal(int8_conv_unpack(data, shape, groups), q)
    assert torch.equal(layouts.conv_unpack(data, shape, groups), q)


@pytest.mark.parametrize(("shape", "groups"), WEIGHTS[:-2])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 2), (2, 2)])
def test_packing_of_transposed_weights(shape: tuple[int, ...], groups: int, stride: int, dilation: int) -> None:
    q, rank = codes(*shape), len(shape) - 2
    geometry = groups, [stride] * rank, [dilation] * rank
    data, colsum = int8_conv_transpose_pack(q, *geometry)
    want, sums = layouts.conv_transpose_pack(q, *geometry)
    assert torch.equal(data, want)
    assert torch.equal(colsum, sums)
    assert colsum.shape == (stride**rank * shape[1] * groups,)
    by_group = q.flatten(2).sum(2).view(groups, -1, shape[1]).sum(1, dtype=torch.int32).flatten()
    assert torch.equal(colsum.view(stride**rank, -1).sum(0, dtype=torch.int32), by_group)
    assert torch.equal(int8_conv_transpose_unpack(data, shape, *geometry), q)
    assert torch.equal(layouts.conv_transpose_unpack(data, shape, *geometry), q)


def test_a_kernel_of_one_pixel_is_packed_as_a_linear_layer() -> None:
    q = codes(70, 37)
    data, colsum = int8_pack(q)
    assert torch.equal(int8_conv_pack(q[:, :, None], 1)[0], data.flatten())
    assert torch.equal(int8_conv_pack(q[:, :, None, None], 1)[1], colsum)


@pytest.mark.parametrize("reference_too", [False, True])
def test_errors_of_packing(reference_too: bool) -> None:
    q, data = codes(6, 4, 3, 3), torch.zeros(9, dtype=torch.int8)
    calls = {
        "q: got torch.float32; accepted: torch.int8": lambda: int8_conv_pack(q.float(), 1),
        r"q: got shape \[6, 4\]; accepted: \[C_out, C_in/groups, kernel\]": lambda: int8_conv_pack(q[..., 0, 0], 1),
        "groups: got 4; accepted: a divisor of the output channels 6": lambda: int8_conv_pack(q, 4),
        "q: got K = 131072; accepted: K <= 131071": lambda: int8_conv_pack(codes(1, 131072, 1), 1),
        r"data: got torch.int8 of shape \[9\]; accepted: what int8_conv_pack gives .*\[1152\]": lambda: (
            int8_conv_unpack(data, q.shape, 1)
        ),
        "groups: got 0; accepted: a divisor of the input": lambda: int8_conv_transpose_pack(q, 0, [1, 1], [1, 1]),
        r"stride: got \[2\]; accepted: 2 integers, at least 1": lambda: int8_conv_transpose_pack(q, 1, [2], [1, 1]),
        r"dilation: got \[1, 0\]; accepted: 2": lambda: int8_conv_transpose_pack(q, 1, [2, 2], [1, 0]),
        "data: got .* what int8_conv_transpose_pack gives": lambda: int8_conv_transpose_unpack(
            data, q.shape, 1, [1, 1], [1, 1]
        ),
    }
    with library.use_kernel("reference" if reference_too else "cpu_scalar"):
        for message, call in calls.items():
            with pytest.raises(RuntimeError, match=message):
                call()


def test_opcheck_of_packing() -> None:
    q = codes(6, 2, 3, 3)
    torch.library.opcheck(torch.ops.qkernels.int8_conv_pack.default, (q, 2))
    torch.library.opcheck(torch.ops.qkernels.int8_conv_transpose_pack.default, (q, 2, [2, 2], [1, 1]))
    unpack = (int8_conv_pack(q, 2)[0], [6, 2, 3, 3], 2)
    torch.library.opcheck(torch.ops.qkernels.int8_conv_unpack.default, unpack)
