"""What a layer takes over from the layer that it replaces."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TypeVar

from torch import nn
from torch.nn.modules.module import _WrappedHook

Layer = TypeVar("Layer", bound=nn.Module)
_MODULE_STATE = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in _MODULE_STATE if "hook" in name)


def take_hooks(layer: nn.Module, source: nn.Module) -> None:
    """Gives ``layer`` the hooks of ``source``; a hook that receives its module then receives ``layer``."""
    for name in _HOOKS:
        value = vars(source)[name]
        if isinstance(value, dict):
            value = value.copy()
            for key, hook in value.items():
                if isinstance(hook, _WrappedHook) and hook.with_module:
                    value[key] = _WrappedHook(hook.hook, layer)
        layer.__dict__[name] = value


def take_over(layer: Layer, source: nn.Module, without: Collection[str] = ()) -> Layer:
    """Gives ``layer`` the hooks of ``source``, which it replaces, and whatever a user has set on ``source``.

    The layer gets every attribute, buffer, parameter and submodule of ``source`` whose name it does not use itself; if
    it does, a warning says that the source's is dropped. ``without``: names that the class of ``source`` itself sets.
    """
    take_hooks(layer, source)
    kinds = {
        "": {name: value for name, value in vars(source).items() if name not in _MODULE_STATE},
        "parameter": source._parameters,
        "buffer": source._buffers,
        "module": source._modules,
    }
    for kind, values in kinds.items():
        for name, value in values.items():
            if name in without or name in vars(layer) or (value is None and kind):
                continue
            if hasattr(layer, name):
                warnings.warn(
                    f"{type(source).__name__}: its attribute {name!r} is not kept, as {type(layer).__name__} has one "
                    "of that name itself",
                    stacklevel=2,
                )
            elif kind == "buffer":
                layer.register_buffer(name, value, persistent=name not in source._non_persistent_buffers_set)
            elif kind:
                getattr(layer, f"register_{kind}")(name, value)
            else:
                layer.__dict__[name] = value
    return layer
