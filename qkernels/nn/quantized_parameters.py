"""QATParameters: a module of any class that reads quantized parameters, or whose input and result are quantized."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import Proxy

from .fake_quantize import FakeQuantize
from .made_classes import made_again
from .qat_layer import SUFFIX, QATLayer, Role, copied_state
from .replacing import take_hooks

VALUES = ("input", "output")


class QATParameters(QATLayer):
    """A module of any class: reading one of the named parameters as an attribute gives its quantized value.

    This serves what no layer of torch computes: fused expert weights [E, N, K], ``F.linear(x, self.w)``, a table that
    several modules read. ``named_parameters``, optimizers and state_dicts see the parameters themselves, under their
    names, as with torch's parametrizations.

    The roles "input" and "output" are the first floating tensor among the arguments of its forward, and the first in
    its result: a tensor, or an element of a tuple, list or dict.

    Further roles are tensors between the two. ``traced_forward`` then computes what the module's own forward does, with
    the quantizers of these roles in it (``qat/traced_forward.py``).
    """

    quantized_names: ClassVar[tuple[str, ...]] = ()
    between: ClassVar[tuple[str, ...]] = ()  # those of them that are tensors between the input and the result
    traced_forward: Any

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {name: cls.role_of(layer, name) for name in cls.quantized_names}

    @staticmethod
    def role_of(module: nn.Module, name: str) -> Role:
        """By default each row of the last dim has a scale: [E, N, 1] for expert weights [E, N, K]."""
        if name in VALUES:
            return Role(name, per_token=True)
        if name not in module._parameters:
            return Role("residual", per_token=True)
        parameter = module._parameters[name]
        rows = 1 if parameter is None else parameter.dim() - 1
        return Role("weight", name, tuple(range(rows)) if rows > 1 else 0)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        quantizers: Mapping[str, FakeQuantize],
        traced_forward: Callable[..., Any] | None = None,
    ) -> QATParameters:
        """The module with quantizers for some of its parameters, by their names, and for its input and output.

        It shares the parameters and hooks.

        traced_forward: called with the module, the arguments and the keyword arguments of a call; it has to be given
        with roles of tensors in between.

        Raises:
            ValueError: the module has no such parameter of its own, or torch has parametrized it.
        """
        between: tuple[str, ...] = ()
        if traced_forward is not None:
            between = tuple(name for name in quantizers if name not in VALUES and name not in module._parameters)
        for name in quantizers:
            if name not in (*VALUES, *between) and module._parameters.get(name) is None:
                raise ValueError(f"parameter: got {name!r}; accepted: one of {', '.join(module._parameters) or 'none'}")
        made = _class_of(type(module), tuple(quantizers), between)  # type: ignore[arg-type]
        layer: Any = made.__new__(made)
        layer.__dict__ = copied_state(module)
        take_hooks(layer, module)
        some = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        for name, quantizer in quantizers.items():
            like = some if name in (*VALUES, *between) else module._parameters[name]
            if like is not None:
                quantizer.to(like.device, like.dtype)
            setattr(layer, name + SUFFIX, quantizer.train(module.training))
        if between:
            layer.traced_forward = traced_forward
        return layer  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.between:
            self.traced_forward.restore(self)

    def _released(self, module: nn.Module) -> None:
        module.__dict__.pop("traced_forward", None)

    def unquantized(self, parameter: str) -> Tensor:
        value = self._parameters[parameter]
        assert value is not None
        return value


@functools.cache
def _class_of(kind: type[nn.Module], names: tuple[str, ...], between: tuple[str, ...]) -> type[QATParameters]:
    attributes: dict[str, Any] = {name: _reader(name) for name in names if name not in (*VALUES, *between)}
    forward = _replaced(kind.forward) if between else kind.forward
    if any(name in VALUES for name in names):
        attributes["forward"] = _quantizing(forward)
    elif between:
        attributes["forward"] = forward
    attributes.update(
        {
            "__module__": kind.__module__,
            "__reduce_ex__": _reduce,
            "float_type": kind,
            "quantized_names": names,
            "between": between,
        }
    )
    return type(f"QAT{kind.__name__}", (QATParameters, kind), attributes)


def _replaced(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of the same signature that is computed by ``traced_forward``."""

    @functools.wraps(forward)
    def replaced(self: QATParameters, *args: Any, **kwargs: Any) -> Any:
        return self.traced_forward(self, args, kwargs)

    return replaced


def _quantizing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of the same signature that quantizes its first floating argument and result."""

    @functools.wraps(forward)
    def quantized(self: QATParameters, *args: Any, **kwargs: Any) -> Any:
        (args, kwargs), _ = _first((args, kwargs), lambda x: self.passed("input", x))
        y, _ = _first(forward(self, *args, **kwargs), lambda x: self.passed("output", x))
        return y

    return quantized


def _first(value: Any, fn: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """The value with fn applied to the first floating tensor in it, and whether there is one."""
    if isinstance(value, Proxy):  # of a torch.fx trace, in which the quantizer has to stand too
        return fn(value), True  # type: ignore[arg-type]
    if isinstance(value, Tensor):
        return (fn(value), True) if value.is_floating_point() else (value, False)
    if isinstance(value, tuple | list):
        items = list(value)
        for i, item in enumerate(items):
            items[i], found = _first(item, fn)
            if found:
                return (type(value)(*items) if hasattr(value, "_fields") else type(value)(items)), True
    elif isinstance(value, Mapping):
        for key, item in value.items():
            new, found = _first(item, fn)
            if found:
                changed = copy.copy(value)
                changed[key] = new  # type: ignore[index]
                return changed, True
    return value, False


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor:
        value, quantizer = self._parameters[name], self._modules.get(name + SUFFIX)
        try:
            return value if quantizer is None else quantizer(value)
        except AttributeError as error:  # nn.Module would take it to mean that there is no property of that name
            raise RuntimeError(f"{name}: {error}") from error

    return property(read)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    kind = type(self)
    return made_again, (_class_of, kind.float_type, kind.quantized_names, kind.between), self.__getstate__()
