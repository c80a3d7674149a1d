"""Compares every kernel that can run here with the reference, on small inputs, for `info` and `selfcheck`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import library, registry
from .layouts import ALIGNMENT
from .registry import Kernel
from .samples import trials

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
QUICK_DTYPES = (torch.float32, torch.bfloat16)
SHAPES: tuple[tuple[int, ...], ...] = ((3, 40), (1,), (2, 8, 5, 3), (37, 129), (0, 4), (), (70, 1030))

# Tolerance of sums over many elements, which the reference adds in another order; where large terms cancel, their
# rounding errors stay, hence the part of the outputs' mean magnitude. All other outputs must be equal.
SUM_TOLERANCE = 1e-4
SUM_TOLERANCE_OF_MEAN = 1e-5


@dataclass(frozen=True)
class Outcome:
    """The result of one kernel on all its cases; fault: its first difference from the reference, or its first error."""

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
            if at == 0:  # its address does not allow accesses of 16 bytes
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


def device_of(kernel: Kernel) -> str:
    """The device to check a kernel on: the GPU, if there is one, for CUDA and Triton kernels."""
    return "cuda" if kernel.name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def on(device: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments on ``device``, with the same strides and misalignment."""

    def copied(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            skip = arg.storage_offset() % (ALIGNMENT // arg.element_size())
            held = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True)) + 1
            storage = torch.empty(skip + max(held, 0), dtype=arg.dtype, device=device)
            return storage.as_strided(arg.shape, arg.stride(), skip).copy_(arg)
        return [copied(part) for part in arg] if isinstance(arg, list) else arg

    return tuple(copied(arg) for arg in args)


def held_on(device: str, op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with packed weights in the layout of the device's kernels."""
    on_gpu = trials[op].on_gpu
    return args if on_gpu is None or device == "cpu" else on_gpu(*args)


def tensors_in(values: Any) -> tuple[Tensor, ...]:
    """All tensors in values, which may be None, a tensor, or nested lists and tuples."""
    if isinstance(values, Tensor):
        return (values,)
    return tuple(t for value in values or () if isinstance(value, Tensor | list | tuple) for t in tensors_in(value))


def outputs_of(kernel: Kernel, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of a kernel, then its tensor arguments, which the op may have changed; all on the CPU."""
    device = device_of(kernel)
    if device != "cpu" or trials[kernel.op].mutates:
        args = on(device, args)
    with warnings.catch_warnings():
        # Unusual layouts are here on purpose.
        warnings.filterwarnings("ignore", message="qkernels: int[48]_.* at every call")
        outputs = tensors_in(kernel.fn(*args)) + tensors_in(args)
    return outputs if device == "cpu" else on("cpu", outputs)


def layout(t: Tensor) -> list[int]:
    """The strides of dims with more than one element; no others matter."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel() > 0]


def disagreement(kernel: Kernel, expected: tuple[Tensor, ...], args: tuple[Any, ...]) -> str | None:
    host = library.host
    if host is not None:
        host.clear_last_isa()
    outputs = outputs_of(kernel, args)
    trial = trials[kernel.op]
    if trial.given is not None:
        first = trial.given(args, outputs)
        expected = (*first, *expected[len(first) :])
    # An op on lists returns lists, which ``outputs`` holds one after the other.
    length = len(args[0]) if isinstance(args[0], list) else 1
    sums = [part * length + at for part in trial.sums for at in range(length)]
    for at, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        tolerance = max(SUM_TOLERANCE, torch.finfo(want.dtype).eps) if at in sums else 0.0
        if got.dtype != want.dtype or got.shape != want.shape or layout(got) != layout(want):
            return f"output {at} is {got.dtype} {list(got.shape)} with strides {got.stride()}, not as the reference's"
        magnitude = want[want.isfinite()].abs().double().mean().nan_to_num().item() if at in sums else 0.0
        absolute = max(tolerance, SUM_TOLERANCE_OF_MEAN * magnitude)
        if not torch.allclose(got, want, rtol=tolerance, atol=absolute, equal_nan=True):
            return f"output {at} differs from the reference's"
    work = expected[0].numel() > 0 and all(t.numel() > 0 for t in tensors_in(args))  # no path runs on empty tensors
    if host is not None and work and kernel.name.startswith("cpu_") and f"cpu_{host.last_isa()}" != kernel.name:
        return f"the path that ran is {host.last_isa()}"
    return None


def describe(args: tuple[Any, ...]) -> str:
    return ", ".join(f"{a.dtype}{list(a.shape)}" if isinstance(a, Tensor) else str(a) for a in registry.flat(args))


def check_op(
    op: str, kernels: list[Kernel], quick: bool, dtypes: Sequence[torch.dtype] = DTYPES, most: int | None = None
) -> Iterator[Outcome]:
    """Runs every kernel on the inputs x of these dtypes, or on the first ``most``; each x gives several calls.

    A kernel that raises has a fault; the other kernels go on.
    """
    counts = dict.fromkeys((kernel.name for kernel in kernels), 0)
    faults: dict[str, str] = {}
    reference = registry.kernels(op)[-1]
    for x in itertools.islice(inputs(quick, dtypes), most):
        for args in trials[op].samples(x):
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
                except Exception as error:  # a compiler's errors may have any class
                    fault = f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                if fault is not None:
                    faults.setdefault(kernel.name, f"{fault}, on ({describe(given)})")
    for name, count in counts.items():
        yield Outcome(op, name, count, faults.get(name))


def run(quick: bool) -> Iterator[Outcome]:
    """Checks all kernels that can run, on many inputs; quick: only each op's preferred kernel, on a few inputs.

    With quick Triton gets one input, because it compiles each kind of call first. Triton kernels are left out where
    only the interpreter could run them, which would take half an hour.
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
