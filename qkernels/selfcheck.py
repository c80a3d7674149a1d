"""Every kernel that can run here against the reference, on small inputs: what `info` and `selfcheck` report."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks, layouts, library, registry
from .reference import int4_gemm, int8_gemm, packing, rms_norm_quantize, silu_mul_quantize
from .registry import Kernel

INT4 = (-8, 7)
INT8 = (-128, 127)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
QUICK_DTYPES = (torch.float32, torch.bfloat16)
SHAPES: tuple[tuple[int, ...], ...] = ((3, 40), (1,), (2, 8, 5, 3), (37, 129), (0, 4), (), (70, 1030))

ALIGNMENT = 16  # bytes: the widest access of a kernel

# Sums over many elements: the reference adds them in another order. All other outputs must be equal bit by bit.
SUM_TOLERANCE = 1e-4
SUMS = {
    "fake_quantize_codebook_learnable_backward": (1, 2),
    "fake_quantize_learnable_backward": (1, 2),
    "fake_quantize_stochastic_backward": (1, 2),
    "fake_quantize_straight_through_backward": (1, 2),
    "foreach_fake_quantize_learnable_backward": (1, 2),
    "int4_linear": (0,),
    "quantization_errors": (0,),
    "relu_fake_quantize_learnable_backward": (1, 2),
    "rms_norm_fake_quantize_dynamic_backward": (0, 1),
    "rms_norm_fake_quantize_dynamic_forward": (3,),
    "rms_norm_quantize_dynamic": (3,),
}
# Where the first outputs follow exactly from the last, which is such a sum: the reference's, from the kernel's own sum.
GIVEN = {
    "rms_norm_fake_quantize_dynamic_forward": rms_norm_quantize.given_rstd,
    "rms_norm_quantize_dynamic": rms_norm_quantize.given_rstd_quantized,
}
CHANGES_ARGUMENTS = {"follow_range", "observe_fake_quantize"}


@dataclass(frozen=True)
class Outcome:
    """What one kernel did on all its cases; fault is the first disagreement with the reference, or what it raised."""

    op: str
    kernel: str
    cases: int
    fault: str | None


def misaligned(x: Tensor) -> Tensor:
    """A copy of a contiguous x that begins one element into its storage."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def inputs(quick: bool, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for at, shape in enumerate(SHAPES[:3] if quick else SHAPES):
        for dtype in (dtype for dtype in (QUICK_DTYPES if quick else DTYPES) if dtype in dtypes):
            x = torch.randn(shape, generator=generator).to(dtype)
            yield x
            if at == 0:  # an address that allows no access of 16 bytes
                yield misaligned(x)
            if not quick and x.dim() >= 2:
                yield x.transpose(0, 1)
                yield x[..., ::2]
            if not quick and x.dim() == 4:
                yield x.to(memory_format=torch.channels_last)
            if not quick and x.numel() > 4:
                edges = x.clone()
                edges.view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
                yield edges


def qparams(x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and zero points per tensor, per row and per channel."""
    yield torch.tensor([0.3]), None
    yield torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
    if x.dim() >= 2:
        for dim in (0, 1):
            shape = [size if at == dim else 1 for at, size in enumerate(x.shape)]
            yield 0.01 + torch.rand(shape), torch.randint(-8, 8, shape, dtype=torch.int32)


def fake_quantize_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for scale, zero_point in qparams(x):
        yield x, scale, zero_point, *INT4


def fake_quantize_scalar_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    yield x, 0.3, 0, *INT4
    yield x, 0.05, -3, *INT8


def backward(forward_args: Callable[[Tensor], Iterator[tuple[Any, ...]]]) -> Callable[[Tensor], Any]:
    def args(x: Tensor) -> Iterator[tuple[Any, ...]]:
        for case in forward_args(x):
            yield torch.randn(x.shape).to(x.dtype), *case

    return args


def learnable_backward_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():  # sums of NaN are NaN in any order, but infinities can cancel
        for case in backward(fake_quantize_args)(x):
            yield *case, 0.5


def with_lsq(args: Callable[[Tensor], Iterator[tuple[Any, ...]]]) -> Callable[[Tensor], Any]:
    """Every case of an op with its default convention, and with LSQ's own."""

    def both(x: Tensor) -> Iterator[tuple[Any, ...]]:
        for case in args(x):
            yield case
            yield *case, True

    return both


def straight_through_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for *case, factor in learnable_backward_args(x):
        for variant in checks.WITH_TERMS:
            yield *case, variant, 0.2, factor


def stochastic_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in fake_quantize_args(x):
        yield *case, 3, 4, None
        yield *case, -5, 0, torch.tensor([2**40])


def stochastic_backward_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for case in backward(stochastic_args)(x):
            yield *case, 0.5


def quantize_stochastic_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in stochastic_args(x):
        yield *case, torch.int8


def channel_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for axis, channels in enumerate(x.shape):
        zero_point = torch.randint(-8, 8, (channels,), dtype=torch.int32)
        yield x, 0.01 + torch.rand(channels), zero_point, axis, *INT4


def backward_bytes_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    yield x, torch.empty_like(x, dtype=torch.bool).bernoulli_()


def backward_mask_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    yield x, torch.randint(0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8)


def dynamic_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for symmetric in (True, False):
        yield x, 0, *INT8, symmetric
        if x.dtype in (torch.float32, torch.bfloat16) and x.dim() > 0 and x.isfinite().all():
            yield x.clamp(-1, 1) * 3e38, -1, *INT4, symmetric  # a range beyond fp32
        if x.dim() > 0:
            yield x, -1, *INT4, symmetric
        if x.dim() > 0 and x.shape[-1] % 8 == 0 and x.shape[-1] > 0:
            yield x, 8, *INT4, symmetric


def transposed_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        yield x, 127, None, 0, None
        yield x, 7, -5, 3, torch.tensor([2**40])


def observe_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    on = torch.ones(1, dtype=torch.int64)
    for shape in {(1,), (x.shape[0], *[1] * (x.dim() - 1)) if x.dim() else (1,)}:
        for symmetric in ((127.0, 1), (0.0, 0)):
            low, high = -torch.rand(shape), torch.rand(shape)
            zero_point = torch.zeros(shape, dtype=torch.int32)
            yield x, on, on, low, high, torch.ones(shape), zero_point, 0.1, *INT8, *symmetric


def follow_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for shape in {(1,), (x.shape[0], *[1] * (x.dim() - 1)) if x.dim() else (1,)}:
        yield x, torch.rand(shape), None, *INT8, True, 0.1, 0.0
        yield x, torch.rand(shape), torch.rand(shape).bfloat16(), *INT4, False, 0.5, 0.25
        yield x, torch.rand(shape), torch.zeros(shape, dtype=torch.int32), *INT8, False, 1.0, 1.0


def codebook_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for (scale, _), levels in zip(qparams(x), (16, 256, 5, 33), strict=False):
        yield x, scale * 9, torch.randn(levels)


def codebook_learnable_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for case in backward(codebook_args)(x):
            yield *case, 0.5, True


def dequantize_codebook_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for _, scale, codebook in codebook_args(x):
        yield torch.randint(0, 256, x.shape, dtype=torch.uint8), scale, codebook, x.dtype


def foreach_args(*wrapped: Callable[[Tensor], Iterator[tuple[Any, ...]]]) -> Callable[[Tensor], Any]:
    """The cases of an op of one tensor as one call of its op of many, a transposed copy of x in between."""

    def args(x: Tensor) -> Iterator[tuple[Any, ...]]:
        calls = [case for make in wrapped for y in (x, x.t().contiguous() if x.dim() == 2 else x) for case in make(y)]
        if calls:
            yield tuple(list(values) for values in zip(*calls, strict=True))

    return args


def quantize_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in fake_quantize_args(x):
        yield *case, torch.int8


def dequantize_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for scale, zero_point in qparams(x):
        yield torch.randint(-128, 128, x.shape, dtype=torch.int8), scale, zero_point, x.dtype


def granularities(x: Tensor) -> Iterator[tuple[int, ...]]:
    yield (1,)
    for dim in range(x.dim() if x.dim() >= 2 else 0):
        yield tuple(size if at == dim else 1 for at, size in enumerate(x.shape))


def histogram_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for shape in granularities(x):
        yield x, -2 * torch.rand(shape), torch.rand(shape), 37
    yield x, torch.tensor([-2.0]), torch.tensor([2.0]), 2048


def errors_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for shape in granularities(x):
            scale = 0.01 + torch.rand(3, *shape)
            yield x, scale, None, *INT4
            yield x, scale, torch.randint(-8, 8, scale.shape, dtype=torch.int32), *INT4


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def int8_mm_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        m, k = x.shape
        yield codes(m, k), codes(33, k).t()
        yield codes(k, m).t(), codes(k, 5)


def int8_scaled_mm_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for a, b in int8_mm_args(x):
        m, n = a.shape[0], b.shape[1]
        yield a, b, torch.rand(1), torch.rand(n), None, None, None, "none", torch.float32, None, None
        zero_point = torch.randint(-8, 8, (m, 1), dtype=torch.int32)
        rest = torch.rand(m, 1), torch.rand(n), zero_point, None, torch.randn(n)
        yield a, b, *rest, "gelu", torch.bfloat16, None, None
        yield a, b, *rest, "silu", torch.int8, torch.tensor(2.0), torch.tensor(-100)


def int8_pack_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        yield (codes(*x.shape),)


def int8_unpack_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for (w,) in int8_pack_args(x):
        yield int8_gemm.int8_pack(w)[0], *w.shape


def int8_linear_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2 and x.dtype != torch.float64:
        data, colsum = int8_gemm.int8_pack(codes(33, x.shape[1]))
        plain = "none", x.dtype, None, None
        yield x, data, colsum, torch.rand(33), torch.randn(33), None, None, *INT8, *plain
        zero_point = torch.tensor([5], dtype=torch.int32)
        yield x, data, colsum, torch.rand(33), None, torch.tensor([0.02]), zero_point, *INT8, *plain
        q, m = codes(*x.shape), x.shape[0]
        given = torch.rand(m), torch.randint(-8, 8, (m,)), *INT8
        yield q, data, colsum, torch.rand(33), None, *given, "relu", torch.int8, torch.tensor(2.0), zero_point


def pack_bits_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() > 0:
        for bits in layouts.BITS:
            low, high = layouts.code_range(bits)
            yield torch.randint(low, high + 1, x.shape, dtype=torch.int8), bits


def unpack_bits_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for q, bits in pack_bits_args(x):
        yield packing.pack_bits(q, bits), bits, q.shape[-1]


def int4_pack_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        yield (torch.randint(-8, 8, x.shape, dtype=torch.int8),)


def int4_unpack_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for (q,) in int4_pack_args(x):
        yield int4_gemm.int4_pack(q), *q.shape


def int4_linear_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    """Outputs in fp32, where another order of sums shows by its own size."""
    if x.dim() == 2 and x.dtype != torch.float64:
        grouped = x.shape[1] > 64  # groups of 32, else one for each row
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)) if grouped else x
        k = x.shape[1]
        size = 32 if grouped else k
        groups = layouts.groups_of(k, size)
        data = int4_gemm.int4_pack(torch.randint(-8, 8, (33, k), dtype=torch.int8))
        scale, zero_point, minimum = (
            layouts.to_panels(t)
            for t in (
                torch.rand(33, groups),
                torch.randint(-8, 8, (33, groups), dtype=torch.int8),
                torch.randn(33, groups),
            )
        )
        total, bias = torch.randn(33), torch.randn(33)
        dynamic = None, None, *INT8, torch.float32
        yield x, data, scale, None, None, total, bias, size, 8, *dynamic
        yield x, data, scale, zero_point, None, total, None, size, 8, *dynamic
        static = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32), *INT8, torch.float32
        yield x, data, scale, None, minimum, total, bias, size, 8, *static
        if x.isfinite().all():
            yield x, data, scale, None, None, total, bias, size, 16, *dynamic
            yield x, data, scale, zero_point, None, total, bias, size, 16, *dynamic


def int8_conv2d_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 4 and x.dtype != torch.float64:
        data, colsum = int8_gemm.int8_pack(codes(6, 4 * x.shape[1]))
        weight = data[None], colsum, torch.rand(6), torch.randn(6)
        zero_point = torch.tensor([5], dtype=torch.int32)
        yield x, *weight, torch.tensor([0.02]), zero_point, *INT8, [2, 2], [1, 2], [1, 0], [1, 1], 1


def rms_norm_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for _, *rest in dynamic_args(x):
        if x.dim() > 0:
            yield x, None, 1e-6, *rest
            yield x, torch.rand(x.shape[-1]) + 0.5, 1e-6, *rest


def rms_norm_backward_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.isfinite().all():
        for case in rms_norm_args(x):
            _, weight, _, _, low, high, symmetric = case
            _, scale, zero_point, rstd = rms_norm_quantize.rms_norm_fake_quantize_dynamic_forward(*case)
            clipped = (None, None) if symmetric else (scale, zero_point)
            yield torch.randn(x.shape).to(x.dtype), x, weight, rstd, *clipped, low, high, weight is not None


def silu_mul_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for _, *rest in dynamic_args(x):
        yield x, torch.randn(x.shape).to(x.dtype), *rest


def silu_mul_backward_args(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for case in silu_mul_args(x):
        gate, up, _, low, high, symmetric = case
        _, *clipped = silu_mul_quantize.silu_mul_fake_quantize_dynamic_forward(*case)
        yield torch.randn(x.shape).to(x.dtype), gate, up, *((None, None) if symmetric else clipped), low, high


# Arguments for each op, made from one input x (none where the op cannot take such an x).
ARGS: dict[str, Callable[[Tensor], Iterator[tuple[Any, ...]]]] = {
    "dequantize": dequantize_args,
    "dequantize_codebook": dequantize_codebook_args,
    "fake_quantize_backward": with_lsq(backward(fake_quantize_args)),
    "fake_quantize_backward.channel": backward(channel_args),
    "fake_quantize_backward.scalar": backward(fake_quantize_scalar_args),
    "fake_quantize_backward_bytes": backward_bytes_args,
    "fake_quantize_backward_mask": backward_mask_args,
    "fake_quantize_codebook_backward": backward(codebook_args),
    "fake_quantize_codebook_forward": codebook_args,
    "fake_quantize_codebook_forward_mask": codebook_args,
    "fake_quantize_codebook_learnable_backward": codebook_learnable_args,
    "fake_quantize_dynamic_forward": dynamic_args,
    "fake_quantize_forward": fake_quantize_args,
    "fake_quantize_forward.channel": channel_args,
    "fake_quantize_forward.scalar": fake_quantize_scalar_args,
    "fake_quantize_forward_mask": with_lsq(fake_quantize_args),
    "fake_quantize_forward_mask.channel": channel_args,
    "fake_quantize_forward_mask.scalar": fake_quantize_scalar_args,
    "fake_quantize_learnable_backward": with_lsq(learnable_backward_args),
    "fake_quantize_stochastic_backward": stochastic_backward_args,
    "fake_quantize_stochastic_forward": stochastic_args,
    "fake_quantize_straight_through_backward": straight_through_args,
    "follow_range": follow_args,
    "foreach_fake_quantize_backward": with_lsq(foreach_args(backward(fake_quantize_args))),
    "foreach_fake_quantize_forward": foreach_args(fake_quantize_args),
    "foreach_fake_quantize_learnable_backward": with_lsq(foreach_args(learnable_backward_args)),
    "histogram": histogram_args,
    "int4_linear": int4_linear_args,
    "int4_pack": int4_pack_args,
    "int4_unpack": int4_unpack_args,
    "int8_conv2d": int8_conv2d_args,
    "int8_linear": int8_linear_args,
    "int8_mm": int8_mm_args,
    "int8_pack": int8_pack_args,
    "int8_scaled_mm": int8_scaled_mm_args,
    "int8_unpack": int8_unpack_args,
    "observe_fake_quantize": observe_args,
    "pack_bits": pack_bits_args,
    "quantization_errors": errors_args,
    "quantize": quantize_args,
    "quantize_codebook": codebook_args,
    "quantize_dynamic": dynamic_args,
    "quantize_dynamic_transposed": transposed_args,
    "quantize_stochastic": quantize_stochastic_args,
    "relu_fake_quantize_backward": with_lsq(backward(fake_quantize_args)),
    "relu_fake_quantize_forward": fake_quantize_args,
    "relu_fake_quantize_forward_mask": with_lsq(fake_quantize_args),
    "relu_fake_quantize_learnable_backward": with_lsq(learnable_backward_args),
    "rms_norm_fake_quantize_dynamic_backward": rms_norm_backward_args,
    "rms_norm_fake_quantize_dynamic_forward": rms_norm_args,
    "rms_norm_quantize_dynamic": rms_norm_args,
    "silu_mul_fake_quantize_dynamic_backward": silu_mul_backward_args,
    "silu_mul_fake_quantize_dynamic_forward": silu_mul_args,
    "silu_mul_quantize_dynamic": silu_mul_args,
    "unpack_bits": unpack_bits_args,
}


def device_of(kernel: Kernel) -> str:
    """Where a kernel is checked: the GPU for those that only run there."""
    return "cuda" if kernel.name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def on(device: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments on ``device``, strides and misalignment as they were."""

    def copied(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            skip = arg.storage_offset() % (ALIGNMENT // arg.element_size())
            held = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True)) + 1
            storage = torch.empty(skip + max(held, 0), dtype=arg.dtype, device=device)
            return storage.as_strided(arg.shape, arg.stride(), skip).copy_(arg)
        return [copied(part) for part in arg] if isinstance(arg, list) else arg

    return tuple(copied(arg) for arg in args)


def held_on(device: str, op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with packed weights in the layout that the device's kernels read."""
    if op != "int4_linear" or device == "cpu":
        return args
    x, data, scale, zero_point, minimum, total, bias, size, *rest = args
    n, k = total.numel(), x.shape[-1]
    halves = layouts.int4_to_halves(layouts.int4_unpack(data, n, k, size), size)
    groups = (None if t is None else layouts.by_group(t, n).t().contiguous() for t in (scale, zero_point, minimum))
    return x, halves, *groups, total, bias, size, *rest


def tensors_in(values: Any) -> tuple[Tensor, ...]:
    """All tensors among values, which may be one tensor, None, or hold lists of them."""
    if isinstance(values, Tensor):
        return (values,)
    return tuple(t for value in values or () if isinstance(value, Tensor | list | tuple) for t in tensors_in(value))


def outputs_of(kernel: Kernel, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What a kernel returned, then all tensors it was given, as an op may change them; on the CPU."""
    device = device_of(kernel)
    if device != "cpu" or kernel.op in CHANGES_ARGUMENTS:
        args = on(device, args)
    with warnings.catch_warnings():
        # Odd layouts are the point here.
        warnings.filterwarnings("ignore", message="qkernels: int[48]_.* at every call")
        outputs = tensors_in(kernel.fn(*args)) + tensors_in(args)
    return outputs if device == "cpu" else on("cpu", outputs)


def layout(t: Tensor) -> list[int]:
    """The strides that matter: of dims with more than one element."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel() > 0]


def disagreement(kernel: Kernel, expected: tuple[Tensor, ...], args: tuple[Any, ...]) -> str | None:
    host = library.host
    if host is not None:
        host.clear_last_isa()
    outputs = outputs_of(kernel, args)
    if given := GIVEN.get(kernel.op):
        x, weight, _, *rest = args
        expected = (*given(x, weight, outputs[3], *rest), *expected[3:])
    # An op of many tensors returns lists: its second and third are the second and third part of all outputs.
    length = len(args[0]) if isinstance(args[0], list) else 1
    sums = [part * length + at for part in SUMS.get(kernel.op, ()) for at in range(length)]
    for at, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        tolerance = max(SUM_TOLERANCE, torch.finfo(want.dtype).eps) if at in sums else 0.0
        if got.dtype != want.dtype or got.shape != want.shape or layout(got) != layout(want):
            return f"output {at} is {got.dtype} {list(got.shape)} with strides {got.stride()}, not as the reference's"
        if not torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"output {at} differs from the reference's"
    work = expected[0].numel() > 0 and all(t.numel() > 0 for t in tensors_in(args))  # nothing runs on empty tensors
    if host is not None and work and kernel.name.startswith("cpu_") and f"cpu_{host.last_isa()}" != kernel.name:
        return f"the path that ran is {host.last_isa()}"
    return None


def describe(args: tuple[Any, ...]) -> str:
    return ", ".join(f"{a.dtype}{list(a.shape)}" if isinstance(a, Tensor) else str(a) for a in registry.flat(args))


def check_op(
    op: str, kernels: list[Kernel], quick: bool, dtypes: Sequence[torch.dtype] = DTYPES, most: int | None = None
) -> Iterator[Outcome]:
    """Every kernel on every input of these dtypes, ``most`` of them; one that raises is at fault, and the others go on.

    An input is one x, of which many calls are made.
    """
    counts = dict.fromkeys((kernel.name for kernel in kernels), 0)
    faults: dict[str, str] = {}
    reference = registry.kernels(op)[-1]
    for x in itertools.islice(inputs(quick, dtypes), most):
        for args in ARGS[op](x):
            expected: dict[str, tuple[Tensor, ...]] = {}
            for kernel in kernels:
                device = device_of(kernel)
                given = held_on(device, op, args)
                if kernel.unsupported(*(given if device == "cpu" else on(device, given))) is not None:
                    continue
                if device not in expected:
                    expected[device] = outputs_of(reference, given)
                counts[kernel.name] += 1
                try:
                    fault = disagreement(kernel, expected[device], given)
                except Exception as error:  # a compiler's own errors too: they are of any class
                    fault = f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                if fault is not None:
                    faults.setdefault(kernel.name, f"{fault}, on ({describe(given)})")
    for name, count in counts.items():
        yield Outcome(op, name, count, faults.get(name))


def run(quick: bool) -> Iterator[Outcome]:
    """quick: the kernel of each op that this machine selects, on a few inputs; else all that can run, on many.

    Quick for Triton is one input, as each kind of call is compiled first. Not what only Triton's interpreter runs: it
    would take half an hour.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for op in sorted({kernel.op for kernel in registry.kernels()}):
            able = [kernel for kernel in registry.kernels(op) if kernel.unsupported() is None]
            able = [kernel for kernel in able if kernel.name != "triton" or device_of(kernel) != "cpu"]
            best = {device_of(kernel): kernel for kernel in reversed(able)}
            if not quick:
                yield from check_op(op, able, quick)
                continue
            for kernel in best.values():
                yield from check_op(op, [kernel], quick, most=1 if kernel.name == "triton" else None)
