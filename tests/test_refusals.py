"""Every kernel of an op refuses the same calls in the same words: the reference's, which are those of ``checks``.

Of each op's sample calls every argument in turn is made wrong in every way that its type allows, and what each kernel
says of the call is compared with what the reference says.
"""

from __future__ import annotations

import importlib.util
import math
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import kernels_of
from torch import Tensor

import qkernels as qk
from qkernels import library
from qkernels.samples import trials

OPS = sorted(trials)


def wrong_tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """t in other dtypes, shapes and strides, with other values, and on another device."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64):
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    if t.dtype.is_floating_point:
        yield "complex", t.to(torch.complex64)
    yield "bool", torch.ones(t.shape, dtype=torch.bool)
    yield "a dim more", t[None]
    yield "a dim more at the end", t[..., None]
    yield "flat", t.reshape(-1)
    yield "empty", t.reshape(-1)[:0]
    yield "one element", t.reshape(-1)[:1].clone() if t.numel() else t.new_ones(1)
    if t.dim():
        for dim in range(t.dim()):
            yield f"one more along {dim}", torch.cat((t, t.narrow(dim, 0, min(1, t.shape[dim]))), dim)
            if t.shape[dim] > 1:
                yield f"one less along {dim}", t.narrow(dim, 0, t.shape[dim] - 1).clone()
        yield "strided", torch.stack((t, t), -1)[..., 0]
        yield "transposed", t.transpose(0, -1).contiguous()
    yield "on another device", t.to("meta")
    if not t.dtype.is_floating_point and t.dtype != torch.bool:
        info = torch.iinfo(t.dtype)
        yield "lowest", torch.full_like(t, max(info.min, -(1 << 20)))  # what fp32 holds, in which C++ reads zero points
        yield "largest", torch.full_like(t, min(info.max, 1 << 20))


def wrong(value: Any, annotation: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from wrong_tensors(value)
        if "?" in annotation:
            yield "None", None
    elif value is None and "Tensor" in annotation:
        yield "a number", torch.ones(1)
        yield "an integer", torch.ones(1, dtype=torch.int32)
        yield "a matrix", torch.ones(3, 5)
    elif isinstance(value, bool):
        yield "not", not value
    elif isinstance(value, int) and "ScalarType" not in annotation:
        for other in (0, 1, -1, 2, 3, 7, -129, 128, 1 << 25, -(1 << 25)):
            if other != value:
                yield str(other), other
    elif isinstance(value, float):
        for other in (0.0, -1.0, math.nan, math.inf):
            yield str(other), other
    elif isinstance(value, str):
        yield "unknown", "unknown"
        yield "empty", ""
    elif isinstance(value, torch.dtype):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool):
            yield str(dtype), dtype
    elif isinstance(value, list) and value:
        yield "one less", value[:-1]
        yield "one more", [*value, value[-1]]
        firsts = wrong(value[0], annotation.replace("[]", ""))
        if "int" in annotation.lower() and "Tensor" not in annotation:  # sizes: a huge one would be computed
            firsts = iter((str(size), size) for size in (0, -1, -129, 3))
        for name, other in firsts:
            yield f"its first {name}", [other, *value[1:]]


def inputs() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 40), (2, 8, 5, 3), (4,)):
        yield torch.randn(shape, generator=generator)


def outcome(fn: Any, args: tuple[Any, ...]) -> str | None:
    """What a kernel says of a call, or None where it takes it."""
    copies = tuple(
        [t.clone() if isinstance(t, Tensor) else t for t in arg] if isinstance(arg, list) else
        arg.clone() if isinstance(arg, Tensor) and not arg.is_meta and arg.is_contiguous() else arg
        for arg in args
    )  # fmt: skip
    try:
        fn(*copies)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
    return None


def cases(op: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    arguments = library.dispatched(op)._schema.arguments
    torch.manual_seed(0)
    for x in inputs():
        for number, args in enumerate(trials[op].samples(x)):
            if number > 2:
                break
            args = (*args, *(argument.default_value for argument in arguments[len(args) :]))
            for at, (argument, value) in enumerate(zip(arguments, args, strict=True)):
                for name, other in wrong(value, str(argument.type)):
                    yield f"{list(x.shape)} {number}: {argument.name} {name}", (*args[:at], other, *args[at + 1 :])


def compare(op: str, kernel: str) -> list[str]:
    kernels = {k.name: k for k in qk.kernels(op)}
    found = []
    for name, args in cases(op):
        if kernels[kernel].unsupported(*args) is not None:
            continue
        want = outcome(kernels["reference"].fn, args)
        got = outcome(kernels[kernel].fn, args)
        looked = got is None and want is not None and "accepted: quant_min to quant_max" in want
        if got != want and not (looked and not kernel.startswith("cpu_")):  # a GPU's kernel does not look at values
            found.append(f"{name}\n      {kernel}: {got}\n      reference: {want}")
    return found


def kernels_to_compare(op: str) -> list[str]:
    """One of csrc/cpu, as its paths share their checks, Triton's, and on the emulator that of csrc/cuda."""
    able = kernels_of(op)
    return [name for name in able if name.startswith("cpu_")][:1] + [
        name for name in able if name in ("triton", "cuda")
    ]


def write_zeros(*args: Any, **kwargs: Any) -> None:
    """In the place of a kernel: indices must be ones."""
    for t in args:
        if isinstance(t, Tensor) and not t.is_floating_point():
            t.zero_()


@pytest.fixture
def started_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's functions check their arguments and start no kernel: the interpreter takes long, and checks nothing."""
    if importlib.util.find_spec("triton") is not None:
        import qkernels.triton

        for found in pkgutil.iter_modules(qkernels.triton.__path__):  # one imported later would keep what is put here
            importlib.import_module(f"qkernels.triton.{found.name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("qkernels.triton") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", write_zeros)


@pytest.mark.usefixtures("started_by_none")
@pytest.mark.parametrize(("op", "kernel"), [(op, kernel) for op in OPS for kernel in kernels_to_compare(op)])
def test_refuses_what_the_reference_refuses(op: str, kernel: str) -> None:
    found = compare(op, kernel)
    assert not found, f"{len(found)} calls:\n" + "\n".join(found[:20])
