"""What modules of a model get and return when it runs on an example."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import call_on
from .prepare import FUSED_PATHS


class Record:
    """The calls of the modules in one call of the model on the example.

    Args:
        modules: name in the record -> name of a module.

    Attributes:
        inputs, outputs: the first floating tensors that a module's first call got and returned.
        called: of each module that was called the largest magnitude in the input of each call (NaN: there is none).
    """

    def __init__(self, model: nn.Module, example: Any, modules: Mapping[str, str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.called: dict[str, list[float]] = {}
        handles = []
        for name, target in modules.items():
            module = submodule(model, target)
            if module is not None:
                handles.append(module.register_forward_hook(self._hook_of(name), with_kwargs=True))
        try:
            with torch.no_grad():
                call_on(model, example, "example")
        finally:
            for handle in handles:
                handle.remove()

    def factor(self, name: str) -> float:
        """By how much the magnitudes of a module's inputs differ from call to call."""
        magnitudes = [x for x in self.called[name] if 0 < x < float("inf")]
        return max(magnitudes) / min(magnitudes) if magnitudes else 1.0

    def _hook_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = _first_tensor((args, kwargs))
            if name not in self.called:
                y = _first_tensor(output)
                self.inputs.update({} if x is None else {name: x.detach()})
                self.outputs.update({} if y is None else {name: y.detach()})
            known = x is not None and x.numel() and not x.is_meta
            magnitude = float(x.abs().amax()) if known else float("nan")  # type: ignore[union-attr]
            self.called.setdefault(name, []).append(magnitude)

        return hook


def _first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    return next((tensor for item in value if (tensor := _first_tensor(item)) is not None), None)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(name)


@contextlib.contextmanager
def off_fused_paths(model: nn.Module) -> Iterator[None]:
    """Keeps torch's Transformer modules off their fused paths, where layers get nested tensors, or are not called."""
    fused = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for kind, name in FUSED_PATHS.items()
        if isinstance(module, kind)
    ]
    try:
        for module, name, value in fused:
            setattr(module, name, type(value)(0))
        yield
    finally:
        for module, name, value in fused:
            setattr(module, name, value)
