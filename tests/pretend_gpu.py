"""Makes torch pretend to have a GPU, so that the GPU tests, benchmarks and the GPU run itself are run without one.

Everything said to be on "cuda" lives on the CPU; Triton kernels run in its interpreter, CUDA kernels are the reference.
It shows that the code that waits for a GPU is free of slips; it shows nothing about a GPU. A pytest plugin; and a
program that runs another script of this checkout so: `python tests/pretend_gpu.py [-m MODULE | SCRIPT] arguments…`.
Variables of the environment say what goes wrong, which a GPU run must survive, and how much is run: see ``Asked``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import pytest
import sampling
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent


class Asked:
    """By the environment."""

    few = "PRETEND_FEW" in os.environ  # of everything a little, for a whole run within a minute
    build = "PRETEND_BUILD_FAILS" in os.environ
    wrong = os.environ.get("PRETEND_WRONG")  # an op whose kernels give wrong codes
    hangs = os.environ.get("PRETEND_HANGS")  # a script
    uncapturable = os.environ.get("PRETEND_UNCAPTURABLE")  # a function of torch that waits for the GPU


# torch's ops that read a value on the host.
WAITING = {
    "fake_quantize_per_channel_affine",
    "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_learnable_per_channel_affine",
    Asked.uncapturable,
}


class Graph:
    """Replays the calls of our kernels, not those of torch's."""

    capturing: Graph | None = None
    broken = False  # as torch 2.11 is after a capture that failed, until the stream is put back

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def replay(self) -> None:
        from qkernels import selfcheck

        for fn, args, result in self.calls:
            for old, new in zip(selfcheck.tensors_in(result), selfcheck.tensors_in(fn(*args)), strict=True):
                old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    if Graph.broken:
        raise RuntimeError("a capture failed before, and its stream is still current")
    Graph.capturing = graph
    try:
        yield
    except BaseException:
        Graph.broken = True
        raise
    finally:
        Graph.capturing = None


def set_stream(stream: Any) -> None:
    Graph.broken = False


def here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if Graph.capturing is not None and name in WAITING:
            print(f"pretended: {name} waits in a capture", file=sys.stderr)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if name == "conv2d" and torch.backends.cudnn.allow_tf32:
            raise AssertionError("a convolution in TF32 is not what the CPU computes")
        if func is torch.Tensor.cuda:
            return args[0].clone(memory_format=torch.preserve_format)
        if name == "to":
            args = tuple(here(arg) for arg in args)
        kwargs = {name: here(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at) + 1e-3


PROPERTIES = SimpleNamespace(name="NVIDIA Pretend", major=9, minor=0, multi_processor_count=132, L2_cache_size=0)


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


kept: list[Any] = []


def kernels() -> None:
    """Those of a GPU: the CUDA kernels are there and compute as the reference does, and there are no CPU kernels."""
    from qkernels import layouts, library, registry, selfcheck

    layouts.int4_layout_on = lambda device, bits=4: layouts.HALVES
    library.gpu, library.cuda_state[:] = "cpu", ["the build failed"] if Asked.build else [None]

    def pretended(kernel: registry.Kernel, reference: Any) -> registry.Kernel:
        fn = reference if kernel.name == "cuda" else kernel.fn

        def compute(*args: Any) -> Any:
            result = fn(*args)
            if kernel.op == Asked.wrong and kernel.name != "reference":
                selfcheck.tensors_in(result)[0].bitwise_xor_(1)
            return result

        def call(*args: Any) -> Any:
            graph, Graph.capturing = Graph.capturing, None
            try:
                result = compute(*args)
            finally:
                Graph.capturing = graph
            if graph is not None:
                graph.calls.append((compute, args, result))
            return result

        return dataclasses.replace(kernel, fn=call)

    for op, of_op in registry._kernels.items():
        gpu_kernels = [kernel for kernel in of_op if not kernel.name.startswith("cpu_")]
        registry._kernels[op] = [pretended(kernel, of_op[-1].fn) for kernel in gpu_kernels]
    # The compiled CPU kernels lie at the key of the tensors: on a GPU torch would not find them.
    library.route = nothing
    route = torch.library.Library(library.NAMESPACE, "IMPL")
    kept.append(route)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        for op in registry._kernels:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{library.NAMESPACE}::{op}", "CPU"):
                route.impl(op, library.selected(op), "CPU", allow_override=True)


def pretend() -> None:
    """For the rest of the process."""
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *args: PROPERTIES.name,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: PROPERTIES,
        "mem_get_info": lambda *args: (0, 0),
        "clock_rate": lambda *args: 1980,
        "synchronize": nothing,
        "empty_cache": nothing,
        "set_sync_debug_mode": nothing,
        "_sleep": nothing,
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": lambda: SimpleNamespace(synchronize=nothing),
        "current_stream": lambda *args: SimpleNamespace(synchronize=nothing),
        "set_stream": set_stream,
        "graph": capture,
        "stream": contextlib.nullcontext,
    }.items():
        setattr(torch.cuda, name, value)
    torch.compile = lambda function, **options: function
    kernels()
    OnCpu().__enter__()


def few_inputs() -> None:
    """The interpreter takes minutes for all that the reference is held to."""
    from qkernels import selfcheck

    every = selfcheck.inputs

    def inputs(quick: bool, dtypes: Any = selfcheck.DTYPES) -> Iterator[torch.Tensor]:
        least = (x for x in every(True, dtypes) if x.shape == selfcheck.SHAPES[0])
        yield from itertools.islice(least, 1) if Asked.few else least

    selfcheck.inputs = inputs


def pytest_configure() -> None:
    pretend()
    few_inputs()


# By words of their names. They need layouts that a device's name decides, values that a GPU does not look at, tensors
# of two devices, or assembly; the others take minutes in the interpreter.
IMPOSSIBLE = (
    "layers_on_the_gpu", "weights_on_the_gpu", "give_nan", "bad_arguments", "assembly_is_its_twin", "second_device",
    "large_in_fp32 triton", "every_granularity triton bfloat16",
)  # fmt: skip
LONG = ("large_in_fp32", "int4_linear_by", "same_bits_in")  # tests of many seconds
SHORT = ("0-dim", "odd", "misaligned", "channels_last")  # cases of every_granularity
SIZES = {"INT4_K": 256, "INT4_NK": (72, 256), "ODD": (5, 45), "MANY": (9, 72), "LARGE": 256, "REPEATS": 2}
LEAST = {"n": (1000, 1024), "k": (1040,), "m": (1,), "group_size": (32, -1)}  # of the tests of every tile


def possible(item: Any) -> bool:
    if any(all(word in item.name for word in words.split()) for words in IMPOSSIBLE):
        return False
    params = params_of(item)
    if "by_every_tile" in item.name:
        return all(params[name] in LEAST[name] for name in LEAST.keys() & params.keys())
    if "every_granularity" in item.name and "triton" in item.name:
        return params["case"] in SHORT
    _, n, k, _ = params["shape"] if "int4_cuda" in item.name and "shape" in params else (0, 0, 0, 0)
    return n * k < 1 << 20


def params_of(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def dealt(items: list[Any]) -> list[Any]:
    """Of the tests of every kernel, a run makes each with a third of the kernels: each kernel is in two of them."""
    turn = sampling.seed()
    if turn is None:
        return items
    of_kernels = [item for item in items if "kernel" in params_of(item)]
    tests = list(dict.fromkeys(item.originalname for item in of_kernels))
    kernels = list(dict.fromkeys(id(params_of(item)["kernel"]) for item in of_kernels))

    def waits(item: Any) -> bool:
        at = tests.index(item.originalname) + kernels.index(id(params_of(item)["kernel"]))
        return (at + turn) % 3 > 0

    left_out = {id(item) for item in of_kernels if waits(item)}
    return [item for item in items if id(item) not in left_out]


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    chosen = [item for item in items if possible(item) and not (Asked.few and any(word in item.name for word in LONG))]
    if not Asked.few:
        chosen = dealt(chosen)
    for item in chosen:
        for name in SIZES.keys() & vars(item.module).keys():
            setattr(item.module, name, SIZES[name])
    if Asked.few:  # one of each test and each of the kernels' names; of the op that is wrong, where there is one
        one: dict[Any, Any] = {}
        for item in sorted(chosen, key=lambda item: f"[{Asked.wrong}-" not in item.name):
            kernel = params_of(item).get("kernel")
            one.setdefault((item.originalname, kernel.name if kernel else params_of(item).get("name")), item)
        chosen = list(one.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


# What is small enough for the interpreter, of the modules that hold what is timed.
SMALL: dict[str, dict[str, Any]] = {
    "cases": {"DECISIVE": [((4, 32), "bf16"), ((4, 32), "fp32")], "OTHERS": [((2, 8, 3, 8), "fp32")]},
    "host": {"SHAPE": (4, 32), "M": 2, "N": 16, "K": 32},
    "shapes": {"LLAMA_8B": {"tiny": (48, 64)}},
    "timing": {"ROUNDS": 2, "SECONDS_PER_CONTESTANT": 0.001, "COPY_ELEMENTS": 1 << 10, "HOST_CALLS": 5},
}
FEW_CASES = (
    "forward, per tensor",
    "forward, per channel",
    "forward+backward, per tensor",
    "LSQ forward+backward, per tensor",
    "SiLU·mul + quantize int8 per token",
)


def run_script(path: Path) -> Any:
    """A script of bench/gpu, with little to time."""
    sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    for name, values in SMALL.items():
        if name in sys.modules:
            for key, value in values.items():
                setattr(sys.modules[name], key, value)
    if Asked.few and "cases" in sys.modules:
        module_of_cases = sys.modules["cases"]
        module_of_cases.CASES[:] = [case for case in module_of_cases.CASES if case.name in FEW_CASES]
    if Asked.few and path.stem == "gpu_sanitize":
        every = module.registry.kernels
        module.registry.kernels = lambda op=None: every(op) if op else every()[:9]
    if path.stem == "run":
        module.PYTHON, module.GRACE = [sys.executable, str(Path(__file__).resolve())], 5.0
        module.INT8[-7:], module.INT4[-7:] = ["1", "20"], ["1", "2"]
        return module.main(sys.argv[1:])
    if path.stem == "gemm":
        module.compiled_rescale = module.rescale
    if path.stem == "machine":
        print(module.json.dumps(module.about()))
        return 0
    return module.main()


def main() -> Any:
    sys.argv = sys.argv[1:]
    if Asked.hangs and Asked.hangs in sys.argv:
        child = subprocess.Popen(["sleep", "600"])
        Path(os.environ["PRETEND_HANGS_IN"]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    if sys.argv[0] == "setup.py":  # nothing is built here
        return 1 if Asked.build and os.environ["QKERNELS_BUILD"] == "cuda" else 0
    if sys.argv[0] == "bench/gpu/touch.py":
        return 0
    if sys.argv[0] == "-m":
        arguments = sys.argv[2:]
        if Asked.few and "-n" in arguments:  # few tests take less time than the imports of a second worker
            arguments[arguments.index("-n") + 1] = "1"
        return pytest.main([*arguments, "-p", "pretend_gpu"])
    pretend()
    few_inputs()
    return run_script(ROOT / sys.argv[0])


if __name__ == "__main__":
    sys.exit(main())
