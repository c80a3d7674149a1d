"""Copies of a model, and the replacing of modules in it."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_layer import copied_state
from ..nn.replacing import take_hooks


def copy_of(model: nn.Module, memo: dict[int, Tensor] | None = None) -> nn.Module:
    """A deep copy; it copies tensors that a forward pass left on a module without their graph.

    The copy holds whole tensors where ``fully_shard`` has sharded the model's, and gathers nothing at a call. Every
    process that holds a shard has to take part.

    ``memo``: id of a tensor -> the tensor that replaces it.
    """
    copies: dict[int, Any] = {} if memo is None else memo  # type: ignore[assignment]
    sharded = [module for module in model.modules() if _is_sharded(module)]
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (OrderedDict, dict, set) and not value:  # of hooks and the like: copy.deepcopy takes long
                copies[id(value)] = type(value)()
            for t in value if isinstance(value, list) else (value,):  # torch's recurrent layers keep a list of weights
                if isinstance(t, Tensor) and not t.is_leaf:
                    copies.setdefault(id(t), t.detach().clone())
        for t in module._parameters.values():
            if t is not None and hasattr(t, "full_tensor"):
                copies[id(t)] = nn.Parameter(t.detach().full_tensor().clone(), t.requires_grad)  # type: ignore[attr-defined]
    for module in sharded:
        kind: Any = type(module).__bases__[1]
        copies[id(module)] = kind.__new__(kind)
    for module in sharded:
        state = {k: _without_gathering(k, v) for k, v in vars(module).items() if not k.startswith("__composable_api")}
        copies[id(module)].__dict__.update(copy.deepcopy(state, copies))
    return copy.deepcopy(model, copies)


def whole(model: nn.Module) -> nn.Module:
    """The model, or if parts of it are sharded, a copy that is not (see ``copy_of``)."""
    return copy_of(model) if is_sharded_model(model) else model


def is_sharded_model(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has sharded the model or parts of it."""
    return any(hasattr(t, "full_tensor") for t in model.parameters()) or any(map(_is_sharded, model.modules()))


def _is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` gave the module a new class, whose second base is the original one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it; nobody else needs it
    return fsdp is not None and hasattr(fsdp, "FSDPModule") and isinstance(module, fsdp.FSDPModule)


def _without_gathering(name: str, value: Any) -> Any:
    """An attribute of a sharded module, without the hooks that torch.distributed has set."""
    if "hook" not in name or not isinstance(value, dict):
        return value
    makers = {key: getattr(getattr(hook, "hook", hook), "__module__", None) or "" for key, hook in value.items()}
    kept = [(key, hook) for key, hook in value.items() if not makers[key].startswith("torch.distributed")]
    return type(value)(kept)


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the tensors, except those of quantizers, which may start a scale."""
    modules = [module for module in model.modules() if not isinstance(module, FakeQuantize)]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return copy_of(model, {id(t): t for t in tensors})


def become(module: nn.Module, new: nn.Module) -> None:
    """Gives ``module`` the class and the state of ``new``, which was made of it: references to it stay valid."""
    module.__class__ = new.__class__
    module.__dict__ = copied_state(new)
    take_hooks(module, new)


def replace_modules(model: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replaces each module, under all its names, by ``substitute(module)`` unless that is None; returns the root."""
    # A replacement may hold children of the module that it replaces.
    parents = list(model.modules())
    parents += [new for module in parents if (new := substitute(module)) is not None]
    for parent in parents:
        for name, child in parent._modules.items():
            new = None if child is None else substitute(child)
            if new is not None:
                parent._modules[name] = new
    root = substitute(model)
    return model if root is None else root
