"""Sends every Triton op's calls through Triton's own launch, over a driver that does nothing.

    python tests/launch_triton.py calls | loop | choices

calls: every op in every dtype, sizes of 1, odd strides and misaligned storage included; a run makes a sample of them.
Each call is made three times: by the long way, watched, and as it was remembered; both ways must start the same kernels
on the same arguments.
loop: a model's ops over batches of changing size, as a training loop or a server makes them.
choices: what is remembered never outlives a change of what it was remembered for.
Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import compile_triton
import stub_gpu
import torch
from sampling import drawn
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor

import qkernels as qk
from qkernels import layouts, library, registry, samples, selfcheck
from qkernels.registry import Kernel
from qkernels.samples import trials
from qkernels.triton.common import replay
from qkernels.triton.common.replay import Descriptor, Remembered, Replay, kind_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
quick: Counter[str] = Counter()  # compilations of the quick self-check
started: list[tuple[Any, ...]] = []  # launcher and arguments of every launch, while it is listened to


def edges() -> Iterator[Tensor]:
    """What the quick self-check leaves out."""
    for dtype in FLOATS[2:]:
        yield selfcheck.misaligned(torch.randn(3, 40).to(dtype))
    for shape in ((1, 1), (40, 1), (1, 40), (37, 129)):
        yield torch.randn(shape)
    yield torch.randn(3, 80)[:, ::2]
    yield torch.randn(40, 3).t()


def self_check(inputs: list[Tensor]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(op, arguments) of whatever Triton does not refuse."""
    for op in sorted({kernel.op for kernel in registry.kernels() if kernel.name == "triton"}):
        refuse = getattr(module_of(op), "unsupported", lambda op, *args: None)
        for x in inputs:
            for args in trials[op].samples(x):
                given = selfcheck.held_on("cuda", op, args)
                if refuse(op, *given) is None:
                    yield op, given


def calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """All calls of the quick self-check, and of the others those of this run's sample."""
    first, *others = selfcheck.inputs(quick=True)
    yield from self_check([first])
    quick.update(stub_gpu.compilations)
    # The self-check's products are padded to K = 48 and so never remembered: some that are not.
    yield from products(70, 33, 96)
    yield from drawn(more_calls([*others, *edges()]), 0.05, "launch_triton")


def more_calls(inputs: list[Tensor]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield from self_check(inputs)
    compile_triton.meta = lambda shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype)
    yield from compile_triton.gemm_calls(90, False)
    yield from compile_triton.int4_calls(90, False)
    yield from small_products()


def small_products() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """M, N and K of 1 in all combinations, and one of each alone beside sizes that take every kind of tile."""
    for m, n, k in (*((m, n, k) for m in (1, 70) for n in (1, 33) for k in (1, 96)), (1, 4096, 4096), (300, 1, 4096)):
        yield from products(m, n, k)


def products(m: int, n: int, k: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    a, w = samples.codes(m, k), samples.codes(n, k)
    yield "int8_mm", (a, w.t())
    plain = "none", torch.bfloat16, None, None
    yield "int8_scaled_mm", (a, w.t(), torch.rand(m, 1), torch.rand(n), None, None, None, *plain)
    padded = torch.nn.functional.pad(w, (0, -k % 16))
    layer = padded, w.sum(1, dtype=torch.int32), torch.rand(n), torch.rand(n)
    yield "int8_linear", (torch.rand(m, k), *layer, None, None, -128, 127, *plain)
    packed = layouts.int4_to_halves(w.clamp(-8, 7), k)
    for act_bits, dtype in ((8, torch.float32), (16, torch.bfloat16)):
        of = packed, torch.rand(1, n), None, None, torch.rand(n), None, k, act_bits
        yield "int4_linear", (torch.rand(m, k).to(dtype), *of, None, None, -128, 127, dtype)


def module_of(op: str) -> Any:
    stem = registry.kernels(op)[-1].fn.__module__.rpartition(".")[2]
    return importlib.import_module(f"qkernels.triton.{stem}")


def listen() -> None:
    launch = CudaLauncher.__call__

    def heard(self: Any, *args: Any) -> None:
        started.append((self, *args[:3], *args[9:]))
        launch(self, *args)

    CudaLauncher.__call__ = heard


def place_of(arg: Any, pointer: bool, known: dict[int, str]) -> Any:
    """An argument as it can be compared between two calls: addresses by what lies there."""
    if isinstance(arg, TensorDescriptor | Descriptor):
        return place_of(arg.base.data_ptr(), True, known), list(arg.shape), list(arg.strides)
    if isinstance(arg, Tensor):
        arg, pointer = arg.data_ptr(), True
    if pointer:
        return known.setdefault(arg, f"own {len(known)}")
    return arg


def described(launches: list[tuple[Any, ...]], like: list[tuple[Any, ...]], args: Any, results: Any) -> list[Any]:
    """The launches of one call; an argument is an address where that of ``like`` is a tensor."""
    known = {t.data_ptr(): f"argument {at}" for at, t in enumerate(selfcheck.tensors_in(args))}
    known |= {t.data_ptr(): f"result {at}" for at, t in enumerate(selfcheck.tensors_in(results)) if t.numel()}

    def one(arg: Any, as_in: Any) -> Any:
        if isinstance(as_in, tuple):
            return [one(*pair) for pair in zip(arg, as_in, strict=True)]
        return place_of(arg, isinstance(as_in, Tensor), known)

    return [[id(own[0]), *map(one, own[1:], other[1:])] for own, other in zip(launches, like, strict=True)]


def check_calls() -> dict[str, Any]:
    listen()
    functions: dict[str, Remembered] = {}
    faults: Counter[str] = Counter()
    ways: dict[str, Counter[str]] = {}
    for op, args in calls():
        function = functions.setdefault(op, Remembered(getattr(module_of(op), op.replace(".", "_"))))
        way = ways.setdefault(op, Counter())
        kind, seen = kind_of(args)[0], []
        if kind in function.memory:
            continue
        try:
            for _ in range(3):
                started.clear()
                result = function(*args)
                seen.append((list(started), result))
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[-1][:160]
            if "out of bounds for dimension" not in text:  # nothing was computed: an index read from a result is noise
                faults[f"{op}: {type(error).__name__}: {text} on ({selfcheck.describe(args)})"] += 1
            continue
        (plain, first), _, (last, third) = seen
        way["replayed" if isinstance(function.memory.get(kind), Replay) else "not"] += 1
        shapes = [[(t.shape, t.stride(), t.dtype) for t in selfcheck.tensors_in(r)] for r in (first, third)]
        if shapes[0] != shapes[1]:
            faults[f"{op}: returns {shapes[1]} when replayed, not {shapes[0]}"] += 1
        elif described(plain, plain, args, first) != described(last, plain, args, third):
            faults[f"{op}: starts something else when replayed, on ({selfcheck.describe(args)})"] += 1
    return {"faults": dict(faults), "ways": ways, "quick": dict(quick)}


def layers(dtype: torch.dtype = torch.bfloat16, width: int = 768) -> list[Callable[[int], Any]]:
    """What the layers of a model call, as functions of the number of rows in a batch."""
    scale, zero_point, row_scale = torch.ones(1), torch.zeros(1), torch.ones(width, 1)
    w, colsum = torch.zeros(width, width, dtype=torch.int8), torch.zeros(width, dtype=torch.int32)
    halves, groups = torch.zeros(width, width // 2, dtype=torch.uint8), torch.ones(width // 128, width)

    def x(rows: int) -> Tensor:
        return torch.empty(rows, width, dtype=dtype)

    def op(name: str, *args: Any) -> Any:
        return getattr(module_of(name), name.replace(".", "_"))(*args)

    int8, plain = (-128, 127), ("none", dtype, None, None)
    weight = torch.empty(width, width, dtype=dtype)
    stats = -torch.ones(1), torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    on = [torch.ones(1, dtype=torch.int64) for _ in range(2)]
    per_column, no_static = torch.ones(width), (None, None)
    return [
        lambda rows: op("fake_quantize_forward", x(rows), scale, zero_point, *int8),
        lambda rows: op("fake_quantize_forward_mask", x(rows), scale, None, *int8),
        lambda rows: op("fake_quantize_backward_mask", x(rows), torch.empty(rows * width // 8, dtype=torch.uint8)),
        lambda rows: op("fake_quantize_learnable_backward", x(rows), x(rows), scale, None, *int8, 1.0, True),
        lambda rows: op("fake_quantize_learnable_backward", weight, weight, row_scale, None, *int8, 1.0, True),
        lambda rows: op("fake_quantize_dynamic_forward", x(rows), -1, *int8, True),
        lambda rows: op("quantize_dynamic", x(rows), -1, *int8, True),
        lambda rows: op("observe_fake_quantize", x(rows), *on, *stats, 0.01, *int8, 127.0, 0),
        lambda rows: op("rms_norm_quantize_dynamic", x(rows), per_column, 1e-6, -1, *int8, True),
        lambda rows: op("silu_mul_quantize_dynamic", x(rows), x(rows), -1, *int8, True),
        lambda rows: op("int8_linear", x(rows), w, colsum, per_column, None, *no_static, *int8, *plain),
        lambda rows: op(
            "int4_linear", x(rows), halves, groups, *no_static, per_column, None, 128, 16, *no_static, *int8, dtype
        ),
    ]


def check_loop() -> dict[str, Any]:
    """Compilations by kernel in the first batches of a loop, and in all that follow."""
    every = layers()
    for rows in (1, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4500, 8192):
        for call in every:
            call(rows)
    first = Counter(stub_gpu.compilations)
    for rows in (
        2,
        3,
        5,
        7,
        8,
        17,
        31,
        33,
        48,
        63,
        65,
        100,
        127,
        129,
        200,
        333,
        513,
        777,
        1000,
        1023,
        1025,
        2048,
        3000,
        5000,
    ):
        for call in every:
            call(rows)
    later = Counter(stub_gpu.compilations) - first
    return {"first": dict(first), "later": dict(later)}


def check_choices() -> dict[str, Any]:
    served = stub_gpu.serve()
    listen()
    x, grad, scale = torch.randn(8, 64), torch.randn(8, 64), torch.ones(1)

    def started_by(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
        started.clear()
        call()
        return list(started)

    def quantize() -> Tensor:
        return qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)

    def moved(t: Tensor) -> list[tuple[Any, ...]]:
        return started_by(lambda: qk.fake_quantize(t, scale, quant_min=-8, quant_max=7))

    for _ in range(3):
        assert len(started_by(quantize)) == 1
    assert "torch._dynamo" not in sys.modules
    remembered = started_by(quantize)
    product_operands = torch.zeros(8, 64, dtype=torch.int8), torch.zeros(64, 16, dtype=torch.int8)
    for _ in range(3):
        qk.int8_mm(*product_operands)
    assert all(isinstance(arg, int) for arg in remembered[0][4:6]), "addresses, not tensors"
    with qk.use_kernel("reference"):
        assert started_by(quantize) == []
        assert torch.equal(quantize(), qk.reference.fake_quantize.fake_quantize_forward(x, scale, None, -8, 7))
    with qk.use_kernel("triton"):
        assert len(started_by(quantize)) == 1
    # A forced kernel is never another one, and not the choice of the calls after it.
    cuda, counted = next(k for k in registry.kernels("fake_quantize_forward") if k.name == "cuda"), []
    own = Kernel(cuda.op, "cuda", lambda *args: counted.append(args) or args[0], lambda *args: None)
    registry._kernels[cuda.op][registry._kernels[cuda.op].index(cuda)] = own
    usable, library.cuda_unusable = library.cuda_unusable, lambda: None
    with qk.use_kernel("cuda"):
        assert started_by(quantize) == []
        assert len(counted) == 1
    with qk.use_kernel("triton"):
        assert [
            len(started_by(lambda: qk.fake_quantize(x[:2], scale, quant_min=-8, quant_max=7))) for _ in range(3)
        ] == [1] * 3
    assert started_by(lambda: qk.fake_quantize(x[:2], scale, quant_min=-8, quant_max=7)) == []
    assert len(counted) == 2
    with qk.use_kernel("cuda"), contextlib.suppress(RuntimeError):
        qk.int8_mm(*product_operands)
        raise AssertionError("Triton ran where cuda was asked for, which has no such kernel")
    registry._kernels[cuda.op][registry._kernels[cuda.op].index(own)] = cuda
    library.cuda_unusable = usable
    assert started_by(quantize)[0][0] is remembered[0][0]
    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True)
    assert [len(started_by(compiled)) for _ in range(3)] == [1, 1, 1]

    # What is remembered keeps no tensor; the second call of a process does not import a compiler.
    a, w = torch.zeros(1024, 4096, dtype=torch.int8), torch.zeros(4096, 4096, dtype=torch.int8)
    held = weakref.ref(w.untyped_storage())
    for _ in range(3):
        (launch,) = started_by(functools.partial(qk.int8_mm, a, w.t()))
    assert any(isinstance(arg, Descriptor) for arg in launch)
    del w, launch
    started.clear()
    gc.collect()
    assert held() is None
    # Numbers that are equal and not the same; a memory that is full of what never came again; tiles changed meanwhile.
    assert kind_of((x, 0.0)) != kind_of((x, -0.0))
    memory = Remembered(lambda t, number: t)
    memory.memory |= dict.fromkeys(range(replay.MOST - 1), "once") | {"kept": "never"}
    memory(x, 0.5)
    assert len(memory.memory) == 2
    changed = Remembered(lambda t: replay.forget() if changed.memory else None)
    changed.memory[kind_of((x,))[0]] = "once"
    changed(x)
    assert changed.memory == {}

    # A copy that is not seen is not an allocation.
    blind, spread = Remembered(module_of("fake_quantize_forward").fake_quantize_forward), torch.randn(8, 128)[:, ::2]
    with torch._C._DisableTorchDispatch():
        for _ in range(3):
            blind(spread, scale, None, -8, 7)
    assert list(blind.memory.values()) == ["never"]

    # Another kind of tensor is another kernel, or the same one on other numbers.
    assert moved(selfcheck.misaligned(x))[0][0] is not remembered[0][0]
    assert moved(x.bfloat16())[0][0] is not remembered[0][0]
    assert 16 * 64 in [arg for arg in moved(torch.randn(16, 64))[0] if isinstance(arg, int)]
    assert len(moved(torch.randn(64, 8).t())) == 1
    assert qk.fake_quantize(torch.randn(64, 8).t(), scale, quant_min=-8, quant_max=7).stride() == (1, 8)

    # Tensors that share memory say nothing of those that do not.
    backward = torch.ops.qkernels.fake_quantize_backward.default
    for _ in range(3):
        started_by(lambda: backward(x, x, scale, None, -8, 7))
    for _ in range(3):
        (launch,) = started_by(lambda: backward(grad, x, scale, None, -8, 7))
    assert launch[4:6] == (grad.data_ptr(), x.data_ptr())
    (launch,) = started_by(lambda: backward(x, x, scale, None, -8, 7))
    assert launch[4] is x or launch[4] == x.data_ptr()

    # A profiler hears of every launch; measured tiles are taken from the next call on; the device is looked at.
    heard: list[Any] = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    quantize()
    knobs.runtime.launch_enter_hook.remove(heard.append)
    assert len(heard) == 1
    replay.forget()
    assert isinstance(started_by(quantize)[0][4], Tensor)
    elsewhere = replay.Replay(torch.device("cuda", 1), [], [], 0)
    torch.cuda.current_device = lambda: 0
    assert not elsewhere.is_here()
    torch.cuda.current_device = lambda: 1
    assert elsewhere.is_here()
    # At the key of a device: all ops but those that have a kernel there already.
    library.GPU_KEY = "MTIA"
    ops = {kernel.op for kernel in registry.kernels() if kernel.name == "triton"}
    own = torch.library.Library("qkernels", "IMPL")
    own.impl("fake_quantize_forward", lambda x, *_: x, "MTIA")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is overridden
        library.serve_triton()
    for op in ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", "MTIA"), op
    del served, own
    return {}


def main() -> None:
    warnings.simplefilter("ignore")
    driver = stub_gpu.install(parsed_only=True)
    result = {"calls": check_calls, "loop": check_loop, "choices": check_choices}[sys.argv[1]]()
    print(json.dumps({**result, "launches": stub_gpu.launches(driver), "compilations": dict(stub_gpu.compilations)}))


if __name__ == "__main__":
    main()
