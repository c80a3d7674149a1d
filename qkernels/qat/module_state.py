"""What programs take for granted of a converted module: whether a module is still as it was."""

from __future__ import annotations

import operator
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.int8 import Int8Convolution
from ..nn.quantized import QuantizedLayer

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # those of the backward pass run there
_OF_ANY_MODULE = vars(nn.Module())


class ModuleState:
    """What programs take for granted of a module, besides what tensors hold.

    That is its tree, the dtypes of its integer layers, whether a module trains, which have a forward of their own, and
    the numbers, texts and switches in the attributes of modules, of integer layers and quantizers those that their
    users may change. It is compared at each call, so it holds the dicts of the modules, which live as long as they.

    Attributes:
        hooks: the dicts of the hooks of modules inside.
        trains: whether a module was in training mode, as dropout is for Monte Carlo estimates.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._children = [m._modules for m in modules if m._modules]
        self._parameters = [m._parameters for m in modules if m._parameters]
        self._integers: list[dict[str, Any]] = [m._parameters for m in modules if isinstance(m, QuantizedLayer)]
        self.hooks = [vars(m)[name] for m in modules if m is not module for name in _HOOKS]
        self._all = [vars(m) for m in modules]
        read = [(vars(m), "forward") for m in modules if m is not module]
        read += [(vars(m), name) for m in modules for name in _changeable(m)]
        # Two lists, as hundreds of attributes are read, which takes 25 ns each in this way.
        self._held, self._names = [held for held, _ in read], [name for _, name in read]
        self._form = self._present()
        self.trains: bool = self._form[0]

    def _present(self) -> tuple[Any, ...]:
        return (
            any(map(operator.getitem, self._all, repeat("training"))),
            list(chain.from_iterable(map(dict.values, self._children))),
            [held["weight_dtype"].dtype for held in self._integers],
            list(map(dict.get, self._held, self._names)),
        )

    def holds(self) -> bool:
        """Whether the module still is as it was."""
        try:
            return self._present() == self._form
        except (RuntimeError, ValueError):  # arrays where a number was, which have no truth value
            return False

    def wants_gradient(self) -> bool:
        held = chain.from_iterable(map(dict.values, self._parameters))
        return any(p is not None and p.requires_grad for p in held)


def _changeable(module: nn.Module) -> list[str]:
    """The names of a module's attributes by which its forward decides."""
    if isinstance(module, FakeQuantize):
        return ["_quantizes", "quantizer", "symmetric", "quant_min", "quant_max"]
    if isinstance(module, Int8Convolution):
        return ["stride", "padding", "dilation", "padding_mode", *(["output_padding"] if module.transposed else [])]
    return [] if isinstance(module, QuantizedLayer) else switches(module)


def switches(module: nn.Module) -> list[str]:
    """The names of attributes by which a forward may decide; an attribute of the class may get a value here later."""
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    of_kinds = (name for kind in kinds for name, value in vars(kind).items() if name[:2] != "__" and is_switch(value))
    own = (name for name, value in vars(module).items() if is_switch(value))
    return [name for name in dict.fromkeys((*own, *of_kinds)) if name not in _OF_ANY_MODULE]


def is_switch(value: Any) -> bool:
    plain = value is None or isinstance(value, bool | int | float | str)
    return plain or (isinstance(value, tuple | torch.Size) and all(map(is_switch, value)))
