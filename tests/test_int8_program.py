"""int8_program's steps, on every path, against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import same
from conftest import paths_of
from program_plans import Plan
from torch import Tensor

import qkernels.ops  # noqa: F401  defines the ops
from qkernels import library
from qkernels.reference import int8_program as reference

pytestmark = pytest.mark.sanitized

threads = itertools.cycle((1, 2))

SHAPES = {
    "features": (3, 37),
    "sequence": (2, 5, 19),
    "image": (3, 20, 9, 7),
    "wide image": (1, 3, 6, 37),
    "volume": (2, 18, 3, 5, 4),
}


@pytest.fixture(params=paths_of("int8_program"))
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def run(plan: Plan, *inputs: Tensor) -> list[Tensor]:
    return torch.ops.qkernels.int8_program(list(inputs), plan.constants, plan.text)


def check(plan: Plan, *inputs: Tensor, tolerance: float = 0, kernel: str | None = None) -> None:
    """On one thread and on two, in turn."""
    torch.set_num_threads(1)
    want = reference.int8_program(inputs, plan.constants, plan.text)
    torch.set_num_threads(next(threads))
    got = run(plan, *inputs)
    if kernel is not None:
        assert library.host is not None
        assert f"cpu_{library.host.last_isa()}" == kernel
    if tolerance == 0:
        same(got, want)
    else:
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def layouts_of(x: Tensor) -> Iterator[Tensor]:
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
        yield x.transpose(2, 3).contiguous().transpose(2, 3)
    if x.dim() == 5:
        yield x.contiguous(memory_format=torch.channels_last_3d)
    yield torch.cat([x, x], 1)[:, : x.shape[1]]
    yield torch.stack([x, x], -1)[..., 0]
    yield x[:1].expand(x.shape)


def both_kinds(make: Callable[[Plan, str], str]) -> Callable[[Plan, str, int], list[str]]:
    """A step that moves values, on floats and on codes."""
    return lambda plan, x, q: [make(plan, x), plan.move("dequantize", make(plan, plan.quantize(x, q)), "f")]


def kept(step: str, **values: Any) -> Callable[[Plan, str, int], list[str]]:
    """A step on floats and on codes, that gives floats, codes and both."""

    def make(plan: Plan, x: str, q: int) -> list[str]:
        results = []
        for operand in (x, plan.quantize(x, q)):
            both = plan.keep(step, q, True, x=operand, **values)
            names = [plan.floats(step, x=operand, **values), plan.codes(step, q, x=operand, **values), *both]
            results += [plan.move("dequantize", name, "f") if name[0] == "q" else name for name in names if name]
        return results

    return make


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_quantize_and_dequantize(kernel: str, shape: tuple[int, ...]) -> None:
    plan = Plan()
    x = plan.input()
    for zero_point, low, high in ((None, -128, 127), (-128, -128, 127), (7, -8, 7), (127, -128, 127)):
        for dtype in (torch.int64, torch.int8):
            q = plan.quantizer(0.05, zero_point, low, high, dtype)
            plan.output(plan.move("dequantize", plan.quantize(x, q), "f"))
    values = torch.randn(shape) * 3
    values.view(-1)[::3] = torch.tensor([0.025, 0.075, -0.125, torch.inf, -torch.inf, 1e-40, 3e38]).repeat(2000)[
        : len(values.view(-1)[::3])
    ]
    for one in layouts_of(values):
        check(plan, one, kernel=kernel)


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 4, 0), (2, 0, 4, 4), (0, 3, 4, 4)])
def test_empty_images(kernel: str, shape: tuple[int, ...]) -> None:
    plan = Plan()
    plan.output(plan.move("dequantize", plan.quantize(plan.input(), plan.quantizer(0.02, 3)), "f"))
    check(plan, torch.randn(shape))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 15, 16, 17, 33, 64])
def test_quantize_of_planes(kernel: str, channels: int) -> None:
    plan = Plan()
    plan.output(plan.move("dequantize", plan.quantize(plan.input(), plan.quantizer(0.02, 3)), "f"))
    for width in (1, 15, 16, 17, 48, 53):
        check(plan, torch.randn(2, channels, 3, width))


ACTIVATIONS = (
    "relu",
    "clamp:0.0:6.0",
    "clamp:-0.5:0.25",
    "leaky_relu:0.01",
    "hardswish",
    "hardsigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
)


@pytest.mark.parametrize("first", [*ACTIVATIONS, "sigmoid", "tanh"])
def test_activate(kernel: str, first: str) -> None:
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    for y in kept("activate", first=first)(plan, x, q):
        plan.output(y)
    check(plan, torch.randn(2, 21, 5, 3) * 4)


def test_requantize(kernel: str) -> None:
    plan = Plan()
    x = plan.quantize(plan.input(), plan.quantizer(0.03, 5))
    for zero_point in (None, -100):
        plan.output(plan.move("dequantize", plan.codes("requantize", plan.quantizer(0.07, zero_point), x=x), "f"))
    check(plan, torch.randn(2, 21, 5, 3) * 4)


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
@pytest.mark.parametrize("gate", [False, True])
def test_binary(kernel: str, kind: str, gate: bool) -> None:
    plan = Plan()
    q = plan.quantizer(0.03, 5)
    floats = plan.input(), plan.input()
    codes = [plan.quantize(x, q) for x in floats]
    for a in (floats[0], codes[0]):
        for b in (floats[1], codes[1]):
            for first in (None, "relu"):
                plan.output(plan.floats("binary", kind=kind, a=a, b=b, first=first))
                both = plan.keep("binary", q, True, kind=kind, a=b, b=a, first=first)
                plan.output(str(both[0]))
                plan.output(plan.move("dequantize", str(both[1]), "f"))
    for channels in (3, 16, 37):
        x = torch.randn(2, channels, 5, 3)
        check(plan, x, torch.randn(2, channels) if gate else torch.randn(x.shape))


@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm(kernel: str, affine: bool) -> None:
    plan = Plan()
    x, q, c = plan.input(), plan.quantizer(0.03, 5), 21
    weights = {"weight": torch.randn(c), "bias": torch.randn(c)} if affine else {}
    for y in kept("batch_norm", mean=torch.randn(c), var=torch.rand(c), eps=1e-5, first="relu", **weights)(plan, x, q):
        plan.output(y)
    check(plan, torch.randn(2, c, 5, 3))


# kernel, stride, padding, dilation
WINDOWS = [
    ((1, 2, 2), (1, 2, 2), (0, 0, 0), (1, 1, 1)),
    ((1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1)),
    ((1, 3, 2), (1, 1, 3), (0, 1, 1), (1, 2, 3)),
    ((1, 7, 5), (1, 1, 1), (0, 3, 2), (1, 1, 1)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("ceil", [0, 1])
def test_max_pool(kernel: str, window: tuple, ceil: int) -> None:
    size, stride, padding, dilation = window
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5, -7, 120)
    pool = both_kinds(
        lambda p, v: p.move("max_pool", v, kernel=size, stride=stride, padding=padding, dilation=dilation, ceil=ceil)
    )
    for y in pool(plan, x, q):
        plan.output(y)
    for channels in (1, 16, 33, 70):
        check(plan, torch.randn(2, channels, 11, 9))


@pytest.mark.parametrize("window", [w for w in WINDOWS if w[3] == (1, 1, 1)], ids=str)
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("include_pad", [0, 1])
@pytest.mark.parametrize("divisor", [None, 5])
def test_avg_pool(kernel: str, window: tuple, ceil: int, include_pad: int, divisor: int | None) -> None:
    size, stride, padding, _ = window
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    options = {"ceil": ceil, "include_pad": include_pad, "divisor": divisor}
    for y in kept("avg_pool", kernel=size, stride=stride, padding=padding, **options)(plan, x, q):
        plan.output(y)
    for channels in (3, 33):
        check(plan, torch.randn(2, channels, 11, 9))


def test_pools_of_volumes(kernel: str) -> None:
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    window = {"kernel": (3, 2, 3), "stride": (2, 1, 2), "padding": (1, 0, 1)}
    for y in kept("avg_pool", **window)(plan, x, q) + both_kinds(lambda p, v: p.move("max_pool", v, **window))(
        plan, x, q
    ):
        plan.output(y)
    check(plan, torch.randn(2, 19, 5, 6, 7))


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 2), (1, 11, 1), (1, 13, 9)])
def test_adaptive_avg_pool(kernel: str, size: tuple[int, ...]) -> None:
    plan = Plan()
    x = plan.input()
    for y in kept("adaptive_avg_pool", size=size)(plan, x, plan.quantizer(0.03, 5)):
        plan.output(y)
    # A mean over the whole image adds up in another order than torch's.
    check(plan, torch.randint(-9, 9, (2, 33, 11, 9)) / 8, tolerance=1e-6 if size == (1, 1, 1) else 0)


@pytest.mark.parametrize("keep", [0, 1])
def test_mean(kernel: str, keep: int) -> None:
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    for operand in (x, plan.quantize(x, q)):
        plan.output(plan.floats("mean", x=operand, keep=keep))
    for shape in ((2, 33, 7, 7), (1, 130, 5, 3), (2, 3, 4, 5, 6)):
        check(plan, torch.randn(shape), tolerance=1e-6)


@pytest.mark.parametrize("channels", [(3, 5), (16, 16), (1, 33, 7), (64, 40)])
def test_cat_slice_shuffle(kernel: str, channels: tuple[int, ...]) -> None:
    plan = Plan()
    xs, q = [plan.input() for _ in channels], plan.quantizer(0.03, 5)
    total = sum(channels)
    for parts in (xs, [plan.quantize(x, q) for x in xs]):
        whole = plan.name(parts[0][0])
        plan.add("cat", out=whole, xs=parts)
        again = plan.name(parts[0][0])
        plan.add("cat", out=again, xs=[parts[0], whole, parts[0]])
        groups = next(g for g in (5, 3, 2, 1) if total % g == 0)
        results = [whole, again, plan.move("slice", whole, begin=1, end=total - 1)]
        results += [plan.move("shuffle", whole, groups=g) for g in (groups, 2 if total % 2 == 0 else 1, total)]
        results.append(plan.move("slice", plan.move("slice", again, begin=2, end=total), begin=1, end=total - 2))
        for y in results:
            plan.output(plan.move("dequantize", y, "f") if y[0] == "q" else y)
    check(plan, *(torch.randn(2, c, 5, 3) for c in channels))


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 17, 4, 3), (1, 3, 2, 3, 4)])
def test_upsample_and_flatten(kernel: str, shape: tuple[int, ...]) -> None:
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    scale = [1 if dim < 5 - len(shape) else dim for dim in (2, 3, 4)]
    scale = [scale[dim] if dim >= 5 - len(shape) else 1 for dim in range(3)]
    for y in both_kinds(lambda p, v: p.move("upsample", v, scale=scale))(plan, x, q):
        plan.output(y)
    for y in both_kinds(lambda p, v: p.move("flatten", v))(plan, x, q):
        plan.output(y)
    check(plan, torch.randn(shape))
    check(plan, torch.randn(*shape[:2], *[1] * (len(shape) - 2)))


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 17, 4, 3), (1, 3, 2, 3, 4)])
def test_resize(kernel: str, shape: tuple[int, ...], align_corners: int) -> None:
    """Within rounding of torch's sums."""
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    scale = [1] * (5 - len(shape)) + [2, 3, 4][: len(shape) - 2]
    values = {"scale": scale, "mode": "linear", "align_corners": align_corners}
    floats = [plan.floats("resize", x=operand, **values) for operand in (x, plan.quantize(x, q))]
    floats += [y for y in plan.keep("resize", q, True, x=x, **values) if y]
    for y in floats:
        plan.output(plan.move("dequantize", y, "f") if y[0] == "q" else y)
    check(plan, torch.randn(shape), tolerance=1e-6)


@pytest.mark.parametrize("step", ["upsample", "resize"])
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 17, 4, 3), (1, 3, 2, 3, 4)])
def test_sizes_of_any_ratio(kernel: str, shape: tuple[int, ...], step: str) -> None:
    """Larger and smaller ones, given or those of another value, floats and codes."""
    plan, rank = Plan(), len(shape) - 2
    x, other, q = plan.input(), plan.input(), plan.quantizer(0.03, 5)
    sizes: list[dict[str, Any]] = [
        {"size": [1] * (3 - rank) + size[:rank]} for size in ([7, 2, 5], [1, 1, 1], [4, 9, 3])
    ]
    for values in ({"like": other}, {"like": plan.quantize(other, q)}, *sizes):
        if step == "upsample":
            found = both_kinds(lambda p, v, like=values: p.move(step, v, **like))(plan, x, q)
        else:
            found = [plan.floats(step, x=v, mode="linear", **values) for v in (x, plan.quantize(x, q))]
        for y in found:
            plan.output(y)
    check(plan, torch.randn(shape), torch.randn(2 if rank < 3 else 1, 3, *(5, 6, 2)[:rank]), tolerance=1e-6)


def test_pixel_shuffles_of_no_channels(kernel: str) -> None:
    plan = Plan()
    x = plan.input()
    for step in ("pixel_unshuffle", "pixel_shuffle"):
        plan.output(plan.move(step, x, factor=2))
    assert [y.shape for y in run(plan, torch.randn(2, 0, 4, 6))] == [(2, 0, 2, 3), (2, 0, 8, 12)]


@pytest.mark.parametrize("step", ["upsample", "resize"])
def test_no_pixels_have_no_other_size(kernel: str, step: str) -> None:
    """As in torch; an empty result there may be."""
    for size in ((1, 4, 4), (1, 1, 1)):
        plan = Plan()
        plan.output(plan.move(step, plan.input(), size=size, mode="linear" if step == "resize" else None))
        with pytest.raises(RuntimeError, match=r"x: got \[N, 3, 0, 5\]; accepted: at least one pixel"):
            run(plan, torch.randn(2, 3, 0, 5))
    plan = Plan()
    plan.output(plan.move("upsample", plan.input(), scale=(1, 2, 3)))
    check(plan, torch.randn(2, 3, 0, 5))


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 16, 33])
def test_pixel_shuffles(kernel: str, factor: int, channels: int) -> None:
    plan, square = Plan(), factor**2
    fine, coarse, q = plan.input(), plan.input(), plan.quantizer(0.03, 5)
    for step, x in (("pixel_unshuffle", fine), ("pixel_shuffle", coarse)):
        for y in both_kinds(lambda p, v, step=step: p.move(step, v, factor=factor))(plan, x, q):
            plan.output(y)
    fine_image = torch.randn(2, channels, 4 * factor, 3 * factor)
    check(plan, fine_image, torch.randn(2, channels * square, 3, 5))
    unshuffled, _, shuffled, _ = run(plan, fine_image, torch.nn.functional.pixel_unshuffle(fine_image, factor))
    assert torch.equal(unshuffled, torch.nn.functional.pixel_unshuffle(fine_image, factor))
    assert torch.equal(shuffled, fine_image)


@pytest.mark.parametrize("kind", ["floats", "codes", "both"])
@pytest.mark.parametrize("residual", [None, "floats", "codes"])
def test_conv(kernel: str, kind: str, residual: str | None) -> None:
    plan = Plan()
    x, q, other = plan.input(), plan.quantizer(0.03, 5), plan.quantizer(0.05, -9)
    added = plan.input()
    for geometry in ({}, {"kernel": (1, 3, 3), "padding": (0, 1, 1)}, {"kernel": (1, 3, 1), "padding": (0, 1, 0)}):
        conv = plan.conv(plan.quantize(x, q), 8, 33, **geometry)
        added_to = {None: None, "floats": added}.get(residual) or (residual and plan.quantize(added, other))
        names = plan.keep("conv", other if kind != "floats" else None, kind != "codes", **conv, residual=added_to,
                          first="clamp:0.0:6.0", second="relu" if residual else None)  # fmt: skip
        for y in names:
            if y is not None:
                plan.output(plan.move("dequantize", y, "f") if y[0] == "q" else y)
    for shape in ((2, 8, 7, 9), (3, 8, 1, 17)):
        for one in layouts_of(torch.randn(shape)):
            check(plan, one, torch.randn(shape[0], 33, *shape[2:]), kernel=kernel)


# C_in, C_out, shape of the image, geometry
GEOMETRIES = {
    "stem 7x7": (3, 16, (2, 3, 23, 20), {"kernel": (1, 7, 7), "stride": (1, 2, 2), "padding": (0, 3, 3)}),
    "stem 3x3": (3, 8, (1, 3, 14, 15), {"kernel": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}),
    "odd channels": (5, 7, (2, 5, 6, 9), {"kernel": (1, 3, 2), "padding": (0, 1, 0), "after": (0, 0, 3)}),
    "depthwise": (37, 37, (2, 37, 9, 8), {"kernel": (1, 3, 3), "padding": (0, 1, 1), "groups": 37}),
    "depthwise 5x5": (
        64,
        64,
        (1, 64, 9, 8),
        {"kernel": (1, 5, 5), "stride": (1, 2, 2), "padding": (0, 2, 2), "groups": 64},
    ),
    "grouped": (24, 36, (2, 24, 7, 8), {"kernel": (1, 3, 3), "padding": (0, 1, 1), "groups": 6}),
    "wide groups": (128, 96, (1, 128, 5, 4), {"kernel": (1, 3, 3), "padding": (0, 1, 1), "groups": 2}),
    "multiplied": (6, 12, (2, 6, 7, 8), {"kernel": (1, 3, 3), "padding": (0, 1, 1), "groups": 6}),
    "dilated": (8, 9, (2, 8, 11, 12), {"kernel": (1, 3, 3), "padding": (0, 2, 3), "dilation": (1, 2, 3)}),
    "sequence": (6, 9, (2, 6, 31), {"kernel": (1, 1, 5), "stride": (1, 1, 2), "padding": (0, 0, 2)}),
    "volume": (4, 9, (2, 4, 5, 6, 7), {"kernel": (3, 2, 3), "stride": (2, 1, 1), "padding": (1, 0, 1)}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(kernel: str, name: str) -> None:
    c_in, c_out, shape, geometry = GEOMETRIES[name]
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    floats, codes = plan.keep("conv", q, True, **plan.conv(plan.quantize(x, q), c_in, c_out, **geometry), first="relu")
    plan.output(str(floats))
    plan.output(plan.move("dequantize", str(codes), "f"))
    check(plan, torch.randn(shape), kernel=kernel)


TRANSPOSED = {
    "unet": (6, 10, (2, 6, 5, 4), {"kernel": (1, 2, 2), "stride": (1, 2, 2)}),
    "overlapping": (
        5,
        33,
        (1, 5, 6, 7),
        {"kernel": (1, 3, 4), "stride": (1, 2, 2), "padding": (0, 1, 1), "output_padding": (0, 1, 0)},
    ),
    "gaps": (4, 5, (2, 4, 5, 4), {"kernel": (1, 2, 1), "stride": (1, 3, 2)}),
    "dilated": (
        4,
        5,
        (2, 4, 5, 4),
        {"kernel": (1, 3, 3), "stride": (1, 2, 3), "dilation": (1, 2, 2), "padding": (0, 2, 1)},
    ),
    "grouped": (12, 18, (1, 12, 5, 4), {"kernel": (1, 3, 3), "stride": (1, 2, 1), "groups": 3}),
    "depthwise": (
        20,
        20,
        (1, 20, 5, 4),
        {"kernel": (1, 4, 4), "stride": (1, 2, 2), "padding": (0, 1, 1), "groups": 20},
    ),
    "sequence": (6, 9, (2, 6, 11), {"kernel": (1, 1, 5), "stride": (1, 1, 2), "padding": (0, 0, 2)}),
    "volume": (4, 9, (1, 4, 3, 4, 5), {"kernel": (3, 2, 3), "stride": (2, 1, 2), "padding": (1, 0, 1)}),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(kernel: str, name: str) -> None:
    c_in, c_out, shape, geometry = TRANSPOSED[name]
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    values = plan.conv_transpose(plan.quantize(x, q), c_in, c_out, **geometry)
    floats, codes = plan.keep("conv_transpose", q, True, **values, first="relu")
    plan.output(str(floats))
    plan.output(plan.move("dequantize", plan.codes("conv_transpose", q, **values, residual=codes, second="relu"), "f"))
    check(plan, torch.randn(shape), kernel=kernel)


def test_linear(kernel: str) -> None:
    plan = Plan()
    x, q = plan.input(), plan.quantizer(0.03, 5)
    hidden = plan.codes("linear", q, **plan.conv(plan.quantize(x, q), 37, 70, step="linear"), first="gelu")
    plan.output(plan.floats("linear", **plan.conv(hidden, 70, 10, step="linear", bias=False)))
    for batch in (0, 1, 3, 17):
        check(plan, torch.randn(batch, 37))


def test_a_border_serves_every_reader(kernel: str) -> None:
    """One value is read by convolutions with borders of different widths, by a pool and by a slice's reader."""
    plan = Plan()
    q = plan.quantizer(0.03, 5)
    x = plan.quantize(plan.input(), q)
    geometries = (
        {"kernel": (1, 1, 1)},
        {"kernel": (1, 3, 5), "padding": (0, 1, 2)},
        {"kernel": (1, 5, 3), "padding": (0, 2, 0), "after": (0, 3, 1), "stride": (1, 2, 3)},
        {"kernel": (1, 2, 2), "padding": (0, 2, 0), "after": (0, 0, 4), "dilation": (1, 3, 2)},
    )
    for geometry in geometries:
        plan.output(plan.floats("conv", **plan.conv(x, 8, 5, **geometry)))
    part = plan.move("slice", x, begin=3, end=7)
    plan.output(plan.floats("conv", **plan.conv(part, 4, 5, (1, 3, 3), padding=(0, 3, 3))))
    plan.output(plan.floats("conv", **plan.conv(x, 8, 8, (1, 3, 3), padding=(0, 1, 4), groups=8)))
    plan.output(
        plan.move("dequantize", plan.move("max_pool", x, kernel=(1, 2, 2), stride=(1, 2, 2), padding=(0, 0, 0)), "f")
    )
    check(plan, torch.randn(2, 8, 9, 7))
