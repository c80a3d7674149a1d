"""QATParameters: any module, some of whose parameters are quantized wherever they are read."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor, nn

from .fake_quantize import FakeQuantize
from .qat_layer import SUFFIX, QATLayer, Role, copied_state
from .replacing import take_hooks


class QATParameters(QATLayer):
    """A module of any class: reading one of the named parameters as an attribute gives its quantized value.

    This serves what no layer of torch computes: fused expert weights [E, N, K], ``F.linear(x, self.w)``, a table that
    several modules read. ``named_parameters``, optimizers and state_dicts see the parameters themselves, under their
    names, as with torch's parametrizations.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {name: cls.role_of(layer, name) for name in cls.parameter_names}

    @staticmethod
    def role_of(module: nn.Module, name: str) -> Role:
        """By default each row of the last dim has a scale: [E, N, 1] for expert weights [E, N, K]."""
        parameter = module._parameters[name]
        rows = 1 if parameter is None else parameter.dim() - 1
        return Role("weight", name, tuple(range(rows)) if rows > 1 else 0)

    @classmethod
    def of(cls, module: nn.Module, quantizers: dict[str, FakeQuantize]) -> QATParameters:
        """The module with quantizers for some of its parameters, by their names; it shares the parameters and hooks.

        Raises:
            ValueError: the module has no such parameter of its own, or torch has parametrized it.
        """
        for name in quantizers:
            if module._parameters.get(name) is None:
                raise ValueError(f"parameter: got {name!r}; accepted: one of {', '.join(module._parameters) or 'none'}")
        made = _class_of(type(module), tuple(quantizers))  # type: ignore[arg-type]
        layer: Any = made.__new__(made)
        layer.__dict__ = copied_state(module)
        take_hooks(layer, module)
        for name, quantizer in quantizers.items():
            parameter = module._parameters[name]
            assert parameter is not None
            setattr(layer, name + SUFFIX, quantizer.to(parameter.device, parameter.dtype).train(module.training))
        return layer  # type: ignore[no-any-return]

    def unquantized(self, parameter: str) -> Tensor:
        value = self._parameters[parameter]
        assert value is not None
        return value


@functools.cache
def _class_of(kind: type[nn.Module], names: tuple[str, ...]) -> type[QATParameters]:
    attributes: dict[str, Any] = {name: _reader(name) for name in names}
    attributes.update(
        {
            "__module__": kind.__module__,
            "__reduce_ex__": _reduce,
            "float_type": kind,
            "parameter_names": names,
        }
    )
    return type(f"QAT{kind.__name__}", (QATParameters, kind), attributes)


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor:
        value, quantizer = self._parameters[name], self._modules.get(name + SUFFIX)
        try:
            return value if quantizer is None else quantizer(value)
        except AttributeError as error:  # nn.Module would take it to mean that there is no property of that name
            raise RuntimeError(f"{name}: {error}") from error

    return property(read)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _blank, (type(self).float_type, type(self).parameter_names), self.__getstate__()


def _blank(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _class_of(kind, names)  # type: ignore[arg-type]
    return made.__new__(made)
