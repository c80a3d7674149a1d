from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from compare import same
from conftest import paths_of, untouched
from torch import Tensor
from torch.nn.functional import conv2d

import qkernels.ops  # noqa: F401  defines the ops
from qkernels import layouts as layouts_of_ops
from qkernels import library, registry
from qkernels.ops.int8_conv2d import PackedInt8Conv2d, int8_conv2d
from qkernels.reference import int8_conv2d as reference

pytestmark = pytest.mark.sanitized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, C, H, W, C_out, kernel, stride, padding, dilation, groups
CASES = [
    (0, 3, 9, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 1, 6, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 3, 9, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 3, 11, 12, 70, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (1, 8, 10, 11, 40, (3, 2), (2, 1), (2, 0), (1, 2), 1),
    (2, 6, 8, 9, 12, (3, 3), (1, 2), (0, 1), (2, 1), 3),
    (2, 6, 8, 8, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (2, 40, 6, 7, 40, (3, 3), (2, 1), (1, 2), (1, 1), 40),
    (1, 33, 7, 7, 33, (5, 3), (1, 1), (2, 1), (1, 2), 33),
    (2, 5, 6, 6, 10, (3, 3), (1, 1), (1, 1), (1, 1), 5),
    (3, 16, 5, 5, 64, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (3, 15, 5, 6, 33, (1, 1), (1, 1), (0, 0), (1, 1), 3),
    (1, 4, 6, 6, 4, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (1, 4, 6, 6, 4, (1, 1), (1, 1), (1, 1), (1, 1), 1),
    (1, 4, 3, 3, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (1, 64, 17, 19, 33, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 7, 12, 11, 11, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 37, 9, 29, 34, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 600, 10, 10, 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


@pytest.fixture(params=[*paths_of("int8_conv2d"), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_kernel(request.param):
        yield request.param


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat([x, x], 1)[:, : x.shape[1]],
        "expanded": x[:, :1].expand(x.shape),
        "strided": torch.stack([x, x], 4)[..., 0],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_bit_for_bit(kernel: str, case: tuple, dtype: torch.dtype) -> None:
    batch, channels, h, w, out_channels, size, stride, padding, dilation, groups = case
    packed = PackedInt8Conv2d.from_quantized(
        codes(out_channels, channels // groups, *size), torch.rand(out_channels), groups
    )
    arguments = {"stride": stride, "padding": padding, "dilation": dilation}
    for zero_point, bias in (
        (None, None),
        (torch.tensor(-128), torch.randn(out_channels)),
        (torch.tensor([127]), None),
    ):
        for x in layouts(torch.randn(batch, channels, h, w).to(dtype)).values():
            got = int8_conv2d(x, packed, bias, input_scale=torch.tensor(0.02), input_zero_point=zero_point, **arguments)
            want = reference.int8_conv2d(
                *(x, packed.data, packed.colsum, packed.scale, bias, torch.tensor(0.02), zero_point, -128, 127),
                *(size, stride, padding, dilation, groups),
            )
            same(got, want)
            assert got.is_contiguous(memory_format=torch.channels_last)
            ordinary = int8_conv2d(
                *(x, packed, bias),
                input_scale=torch.tensor(0.02),
                input_zero_point=zero_point,
                channels_last=False,
                **arguments,
            )
            assert torch.equal(ordinary, got)
            assert ordinary.stride() == torch.empty(got.shape).stride()
            assert kernel == "reference" or batch == 0 or f"cpu_{library.host.last_isa()}" == kernel


@pytest.mark.parametrize("lowest", [-3, -64, -65, -127, -128])
@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[11], CASES[15]], ids=str)
def test_the_largest_products_of_weights_of_any_range(kernel: str, case: tuple, lowest: int) -> None:
    """Some paths multiply pairs of bytes in int16, in another way for each range; here all reach its end."""
    batch, channels, h, w, out_channels, size, stride, padding, dilation, groups = case
    ends = torch.tensor([lowest, min(-lowest, 127)], dtype=torch.int8)
    q = ends[torch.randint(2, (out_channels, channels // groups, *size))]
    q[: out_channels // 2] = lowest
    packed = PackedInt8Conv2d.from_quantized(q, torch.rand(out_channels), groups)
    for x in (torch.randn(batch, channels, h, w).sign() * 9, torch.full((batch, channels, h, w), -9.0)):
        for zero_point in (None, torch.tensor(127)):
            got = int8_conv2d(
                *(x, packed),
                input_scale=torch.tensor(0.02),
                input_zero_point=zero_point,
                stride=stride,
                padding=padding,
                dilation=dilation,
            )
            want = reference.int8_conv2d(
                *(x, packed.data, packed.colsum, packed.scale, None, torch.tensor(0.02), zero_point, -128, 127),
                *(size, stride, padding, dilation, groups),
            )
            same(got, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_float_convolution_of_dequantized_values(kernel: str, case: tuple) -> None:
    """Against torch's conv2d in fp64, with powers of two for scales so that every step is exact."""
    batch, channels, h, w, out_channels, size, stride, padding, dilation, groups = case
    q, scale = codes(out_channels, channels // groups, *size), 2.0 ** torch.randint(-6, 0, (out_channels,))
    step, zero_point = torch.tensor(0.0625), torch.tensor(-37)
    x = torch.randn(batch, channels, h, w)
    packed = PackedInt8Conv2d.from_quantized(q, scale.view(-1, 1, 1, 1), groups)
    bias = torch.randint(-9, 9, (out_channels,)).float()
    got = int8_conv2d(
        x,
        packed,
        bias,
        input_scale=step,
        input_zero_point=zero_point,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    values = (torch.clamp(torch.round(x * 16) - 37, -128, 127) + 37) * step
    weight = q.double() * scale.double().view(-1, 1, 1, 1)
    same(got.contiguous(), conv2d(values.double(), weight, bias.double(), stride, padding, dilation, groups).float())


@pytest.mark.parametrize("case", [c for c in CASES if c[0]], ids=str)
def test_nan_reaches_the_outputs_that_see_it(kernel: str, case: tuple) -> None:
    batch, channels, h, w, out_channels, size, stride, padding, dilation, groups = case
    q = codes(out_channels, channels // groups, *size)
    packed = PackedInt8Conv2d.from_quantized(q, torch.rand(out_channels), groups)
    arguments = {"stride": stride, "padding": padding, "dilation": dilation}
    x = torch.randn(batch, channels, h, w)
    clean = int8_conv2d(x, packed, input_scale=torch.tensor(0.02), **arguments)
    x[-1, channels // 2, h // 2, 0] = torch.nan
    want_nan = conv2d(x, torch.ones(q.shape), None, stride, padding, dilation, groups).isnan()
    for dtype in DTYPES:
        x_dtype = x.to(dtype)
        got = int8_conv2d(x_dtype, packed, input_scale=torch.tensor(0.02), **arguments)
        assert torch.equal(got.isnan(), want_nan)
        if dtype == torch.float32:
            assert torch.equal(got[~want_nan], clean[~want_nan])


def test_infinity_saturates_and_halves_round_to_even(kernel: str) -> None:
    packed = PackedInt8Conv2d.from_quantized(torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.ones(1))
    x = torch.tensor([torch.inf, -torch.inf, 0.5, 1.5, -2.5]).view(1, 1, 1, 5)
    got = int8_conv2d(x, packed, input_scale=torch.ones(1), quant_min=-8, quant_max=7)
    assert got.flatten().tolist() == [7, -8, 0, 2, -2]


@pytest.mark.parametrize(("scale", "nan"), [(0.0, False), (-1.0, True), (float("nan"), True)])
def test_odd_input_scales(kernel: str, scale: float, nan: bool) -> None:
    packed = PackedInt8Conv2d.from_quantized(codes(3, 2, 3, 3), torch.ones(3))
    out = int8_conv2d(torch.randn(1, 2, 5, 5), packed, input_scale=torch.tensor(scale), padding=1)
    assert out.isnan().all() if nan else out.isfinite().all()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_pack_round_trip(kernel: str, groups: int) -> None:
    q = codes(66, 5, 3, 2)
    packed = PackedInt8Conv2d.from_quantized(q, torch.rand(66), groups)
    assert torch.equal(packed.data, layouts_of_ops.conv_pack(q, groups))
    assert torch.equal(packed.unpack()[0], q)
    assert torch.equal(packed.colsum, q.sum((1, 2, 3), dtype=torch.int32))
    for layout in (q.contiguous(memory_format=torch.channels_last), q.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(PackedInt8Conv2d.from_quantized(layout, torch.rand(66), groups).data, packed.data)


def test_beyond_2_31_elements(kernel: str) -> None:
    if kernel == "reference":
        pytest.skip("its fp64 copies of the strided input are dense: nothing to learn about offsets")
    far = 2**29 + 16  # elements of 4 bytes: offsets beyond 2^31 bytes
    memory = untouched(2 * far)
    x = memory.as_strided((2, 2, 3, 3), (far, 9, 3, 1))
    x.copy_(torch.randn(2, 2, 3, 3))
    packed = PackedInt8Conv2d.from_quantized(codes(4, 2, 3, 3), torch.rand(4))
    same(*(int8_conv2d(v, packed, input_scale=torch.tensor(0.1), padding=1) for v in (x, x.contiguous())))


def test_threads_do_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    packed = PackedInt8Conv2d.from_quantized(codes(70, 24, 3, 3), torch.rand(70))
    x = torch.randn(3, 24, 25, 23)
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(int8_conv2d(x, packed, input_scale=torch.tensor(0.02), padding=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def sample() -> tuple:
    packed = PackedInt8Conv2d.from_quantized(codes(6, 2, 3, 3), torch.rand(6), groups=2)
    tensors = (torch.randn(2, 4, 7, 9), packed.data, packed.colsum, packed.scale, torch.randn(6))
    return (*tensors, torch.tensor(0.02), torch.tensor(3), -128, 127, [3, 3], [1, 2], [1, 0], [1, 1], 2)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.qkernels.int8_conv2d.default, sample())


def test_kernels_are_listed() -> None:
    assert [kernel.name for kernel in registry.kernels("int8_conv2d")] == [
        "cpu_amx",
        "cpu_avx512vnni",
        "cpu_avx2",
        "cpu_scalar",
        "reference",
    ]


def test_compile_does_not_recompile_when_the_batch_changes() -> None:
    packed = PackedInt8Conv2d.from_quantized(codes(6, 4, 3, 3), torch.rand(6))
    step = torch.tensor(0.02)

    def f(x: Tensor) -> Tensor:
        return int8_conv2d(x, packed, input_scale=step, padding=1).relu()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, side in itertools.product((5, 2, 8), (11, 13)):
            x = torch.randn(batch, 4, side, side)
            assert torch.equal(compiled(x), f(x))


def test_export() -> None:
    class Conv(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            packed = PackedInt8Conv2d.from_quantized(codes(6, 4, 3, 3), torch.rand(6))
            self.shape, self.groups = packed.shape, packed.groups
            for name in ("data", "colsum", "scale"):
                self.register_buffer(name, getattr(packed, name))
            self.register_buffer("input_scale", torch.tensor(0.02))

        def forward(self, x: Tensor) -> Tensor:
            packed = PackedInt8Conv2d(self.data, self.colsum, self.scale, self.shape, self.groups)
            return int8_conv2d(x, packed, input_scale=self.input_scale, padding=1)

    module = Conv()
    exported = torch.export.export(module, (torch.randn(3, 4, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any(node.target is torch.ops.qkernels.int8_conv2d.default for node in exported.graph.nodes)
    x = torch.randn(11, 4, 8, 8)
    assert torch.equal(exported.module()(x), module(x))


ERRORS = [
    (0, torch.randn(2, 4, 7), r"x: got shape \[2, 4, 7\]; accepted: \[N, C, H, W\]"),
    (0, torch.randn(2, 4, 7, 9).double(), "x: got torch.float64; accepted: torch.float32, torch.bfloat16"),
    (0, torch.randn(2, 5, 7, 9), "groups: got 2; accepted: a divisor of the input channels 5"),
    (
        0,
        torch.randn(2, 8, 7, 9),
        r"data: got torch.int8 of shape \[1152\]; accepted: what int8_conv_pack gives for this weight",
    ),
    (0, torch.randn(2, 4, 0, 9), "x: got padded height 2; accepted: at least the dilated kernel's, 3"),
    (0, torch.randn(2, 4, 7, 2), "x: got padded width 2; accepted: at least the dilated kernel's, 3"),
    (1, torch.zeros(2, 1, 5, 32, 4), "data: got torch.float32"),
    (2, torch.zeros(6), "colsum: got torch.float32; accepted: contiguous torch.int32"),
    (3, torch.ones(5), r"scale: got shape \[5\]; accepted: \[C_out\] with 6"),
    (4, torch.ones(5), r"bias: got shape \[5\]; accepted: \[C_out\] with 6"),
    (5, torch.ones(2), r"input_scale: got shape \[2\]; accepted: one element"),
    (6, torch.tensor(-129), "input_zero_point: got -129; accepted: quant_min to quant_max, -128 to 127"),
    (7, -129, "quant_min, quant_max: got -129, 127"),
    (9, [3, 0], "kernel_size: got .*; accepted: 2 integers, height and width, at least 1"),
    (10, [0, 1], "stride: got .*; accepted: 2 integers, height and width, at least 1"),
    (11, [1, -1], "padding: got .*; accepted: 2 integers, height and width, at least 0"),
    (11, [1, 2**31 + 1], r"padding: got .*; accepted: .* at most 2\^31"),
    (12, [1, 1, 1], "dilation: got .*; accepted: 2 integers, height and width, at least 1"),
    (13, 0, "groups: got 0; accepted: a divisor"),
    (13, 4, "groups: got 4; accepted: a divisor"),
]


@pytest.mark.parametrize(("position", "value", "message"), ERRORS)
def test_errors(kernel: str, position: int, value: object, message: str) -> None:
    args = list(sample())
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qkernels.int8_conv2d(*args)


def test_padded_images_that_no_memory_holds(kernel: str) -> None:
    """The result has 3 x 3 pixels: only the codes are too many."""
    if kernel == "reference":
        pytest.skip("it pads by torch, which says so in its own words")
    args = list(sample())
    args[10] = args[11] = [2**31, 2**31]
    with pytest.raises(RuntimeError, match=r"padding: got 2147483648 and .*; accepted: up to 2\^40 elements"):
        torch.ops.qkernels.int8_conv2d(*args)


def test_packing_errors() -> None:
    with pytest.raises(ValueError, match=r"q: got torch.float32 of shape \[2, 3, 1, 1\]; accepted: torch.int8"):
        PackedInt8Conv2d.from_quantized(torch.zeros(2, 3, 1, 1), torch.ones(2))
    with pytest.raises(ValueError, match=r"groups: got 4; accepted: a divisor of the output channels 6"):
        PackedInt8Conv2d.from_quantized(codes(6, 3, 1, 1), torch.ones(6), groups=4)
    with pytest.raises(ValueError, match=r"scale: got shape \[3\]; accepted: one element, \[6\] or \[6, 1, 1, 1\]"):
        PackedInt8Conv2d.from_quantized(codes(6, 3, 1, 1), torch.ones(3))
    packed = PackedInt8Conv2d.from_quantized(codes(6, 3, 1, 1), torch.ones(6))
    with pytest.raises(RuntimeError, match=r"x: got shape \[1, 4, 5, 5\]; accepted: \[N, 3, H, W\]"):
        int8_conv2d(torch.randn(1, 4, 5, 5), packed, input_scale=torch.ones(1))
