"""A pytest plugin that makes torch pretend to have a GPU, so that the GPU tests and benchmarks themselves are run.

Everything said to be on "cuda" lives on the CPU; Triton kernels run in its interpreter. It shows that the code that
waits for a GPU is free of slips; it shows nothing about a GPU. Graphs replay nothing here.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import torch
from torch.overrides import TorchFunctionMode


def here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].clone(memory_format=torch.preserve_format)
        if getattr(func, "__name__", "") == "to":
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
        "synchronize": nothing,
        "empty_cache": nothing,
        "set_sync_debug_mode": nothing,
        "_sleep": nothing,
        "Event": Event,
        "CUDAGraph": lambda: SimpleNamespace(replay=nothing),
        "Stream": lambda: SimpleNamespace(synchronize=nothing),
        "graph": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
    }.items():
        setattr(torch.cuda, name, value)
    OnCpu().__enter__()


def pytest_configure() -> None:
    pretend()
    from qkernels import selfcheck

    few = list(selfcheck.inputs(quick=True))[:2]  # the interpreter takes minutes for all that the reference is held to
    selfcheck.inputs = lambda quick: iter(few)
