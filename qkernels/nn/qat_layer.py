"""QATLayer: what all float layers that train with fake quantization have in common."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .fake_quantize import FakeQuantize
from .made_classes import made_again
from .replacing import take_hooks

Layer = TypeVar("Layer", bound="QATLayer")
# Suffixes under which the old forms of weight_norm, spectral_norm and pruning keep the parts of a tensor.
PARTS = ("_g", "_v", "_orig", "_u", "_mask")
SUFFIX = "_fake_quant"


@dataclass(frozen=True)
class Role:
    """What one quantizer of a layer is for.

    Args:
        kind: which spec of a QConfig it takes: "weight", "input", "output", "hidden", …
        parameter: of a weight: the name of the Parameter.
        channel: of a weight: the dim, or dims, of its output channels; each has a scale unless the spec says otherwise.
        feature_dims: of any other tensor: how many trailing dims make up one sample.
        per_token: whether that tensor is a list of rows, each of which may have a scale of its own.
        like: the kind whose spec it takes unless a rule gives one for its own kind; "": it takes none then.
    """

    kind: str
    parameter: str = ""
    channel: int | tuple[int, ...] = 0
    feature_dims: int = 1
    per_token: bool = False
    like: str = ""


class QATLayer(nn.Module):
    """A float layer some of whose tensors pass through quantizers.

    ``roles`` names these tensors. The quantizer of role "input" is the attribute ``input_fake_quant``, a FakeQuantize
    or None; the others are named alike. Parameters keep their names, so a float state_dict loads; that of a prepared
    model adds the quantizers' keys. ``float_class`` is the layer of torch that a class stands for.
    """

    float_class: ClassVar[type[nn.Module]]
    float_type: ClassVar[type[nn.Module]]  # of the layer itself: its class before it got quantizers
    # Attributes that each float layer sets and the class defines anew.
    redefined_names: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "float_class" in vars(cls):
            cls.float_type = cls.float_class

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        """The tensors of ``layer``, a float layer or one of this class, that may be quantized."""
        raise NotImplementedError

    @classmethod
    def from_float(cls: type[Layer], module: nn.Module, /, **quantizers: FakeQuantize | None) -> Layer:
        """Makes a QAT layer that shares the parameters, hooks and training mode of ``module``.

        quantizers: by role, such as ``weight=`` and ``input=``; None or left out: the tensor stays in float. A subclass
        of the float layer keeps its class as a base, and its own forward.

        Raises:
            TypeError: another layer, or a role that it does not have.
        """
        if not isinstance(module, cls.float_class):
            raise TypeError(
                f"{cls.__name__}.from_float: got {type(module).__name__}; accepted: {cls.float_class.__name__}"
            )
        roles = cls.roles(module)
        for role in quantizers:
            if role not in roles:
                raise TypeError(f"{cls.__name__}.from_float: got {role!r}; accepted: {', '.join(roles)}")
        layer: Any = cls.__new__(cls)
        layer.__dict__ = copied_state(module)
        layer.__class__ = _class_for(cls, module)
        take_hooks(layer, module)
        tensor = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        for role in roles:
            quantizer = quantizers.get(role)
            setattr(layer, role + SUFFIX, quantizer)
            if quantizer is not None:
                if tensor is not None:
                    quantizer.to(tensor.device, tensor.dtype)
                quantizer.train(module.training)
        layer._prepared()
        return layer

    def to_float(self) -> nn.Module:
        """The float layer again, of its former class, which shares the parameters and hooks."""
        kind = type(self).float_type
        module: Any = kind.__new__(kind)
        module.__dict__ = copied_state(self)
        for role in type(self).roles(self):
            module.__dict__.pop(role + SUFFIX, None)
            module._modules.pop(role + SUFFIX, None)
        take_hooks(module, self)
        self._released(module)
        return module

    @classmethod
    def class_for(cls, kind: type[nn.Module]) -> type[nn.Module]:
        """The class of a layer made of ``kind``, a proper subclass of ``float_class``: both classes are its bases.

        ``super().forward`` in the subclass is then the forward that quantizes.
        """
        return _joined(cls, kind)  # type: ignore[arg-type]

    @classmethod
    def float_reason(cls, kind: type[nn.Module]) -> str | None:
        """Why a layer of class ``kind``, a subclass of ``float_class``, has to stay in float; None: it need not."""
        for parent in kind.__mro__[: kind.__mro__.index(cls.float_class)]:
            if "forward" in vars(parent) and not _calls_parent(vars(parent)["forward"]):
                return f"the forward of {kind.__name__} does not call that of {cls.float_class.__name__}"
        return None

    @classmethod
    def float_weight(cls, layer: nn.Module, parameter: str) -> Tensor:
        """What the quantizer of a weight is going to get, from the float layer."""
        return effective_weight(layer, parameter)

    def _prepared(self) -> None:
        """Called when the layer has got its quantizers."""

    def _released(self, module: nn.Module) -> None:
        """Called with the float layer that has just been made of this one."""

    def _baked(self) -> None:
        """Called when plain Parameters hold what the layer computed from its weights (see ``bake_weight``)."""

    def quantizer_of(self, role: str) -> FakeQuantize | None:
        found: FakeQuantize | None = getattr(self, role + SUFFIX, None)
        return found

    def own_quantizers(self) -> Iterator[tuple[str, Role, FakeQuantize]]:
        """The roles that have a quantizer."""
        for name, role in type(self).roles(self).items():
            quantizer = self.quantizer_of(name)
            if quantizer is not None:
                yield name, role, quantizer

    def quantized_weights(self) -> Iterator[tuple[str, FakeQuantize]]:
        """Names of the parameters that are quantized, with their quantizers."""
        return ((role.parameter, quantizer) for _, role, quantizer in self.own_quantizers() if role.kind == "weight")

    def is_float(self) -> bool:
        """Whether the float layer computes the same, as no quantizer is left."""
        return not any(self.own_quantizers())

    def passed(self, role: str, x: Tensor) -> Tensor:
        """x through the quantizer of a role, if there is one."""
        quantizer = self.quantizer_of(role)
        return x if quantizer is None else quantizer(x)

    def unquantized(self, parameter: str) -> Tensor:
        """The tensor that goes to the quantizer of a weight."""
        value: Tensor = getattr(self, parameter)
        return value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # A quantizer starts anew when a state_dict is loaded that holds its weight but no scale.
        for name, role, quantizer in self.own_quantizers():
            if role.kind != "weight":
                continue
            own = f"{prefix}{name}{SUFFIX}."
            # weight_norm, pruning and the like split the weight into several tensors, whose names begin so.
            keys = {f"{prefix}{role.parameter}{part}" for part in ("", *PARTS)}
            parts = f"{prefix}parametrizations.{role.parameter}."
            loaded = any(key in keys or key.startswith(parts) for key in state_dict)
            if loaded and f"{own}scale" not in state_dict:
                quantizer.forget()


def copied_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module with copies of its dicts, so that two modules can share its tensors."""
    return {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}


def _class_for(cls: type[QATLayer], module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    if not parametrize.is_parametrized(module):
        return cls if kind is cls.float_class else cls.class_for(kind)
    # torch makes a class for each parametrized instance, which holds the properties of its parametrized tensors.
    parent = kind.__bases__[0]
    made = cls if parent is cls.float_class else cls.class_for(parent)
    attributes = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{made.__name__}", (made,), {**attributes, "float_type": kind})


@functools.cache
def _joined(cls: type[QATLayer], kind: type[nn.Module]) -> type[nn.Module]:
    attributes = {"__module__": kind.__module__, "float_type": kind, "__reduce_ex__": _reduce_joined, "joined": cls}
    return type(f"QAT{kind.__name__}", (kind, cls), attributes)


def _reduce_joined(self: Any, protocol: Any) -> tuple[Any, ...]:
    """A copy or a pickle holds the two classes that the layer's class is made of."""
    kind: Any = next(kind for kind in type(self).__mro__ if "joined" in vars(kind))
    return made_again, (_joined, kind.joined, kind.float_type), self.__getstate__()


def _calls_parent(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and "super" in code.co_names and "forward" in code.co_names


def class_without_parametrizations(layer: nn.Module) -> type[nn.Module]:
    kind = type(layer)
    return kind.__bases__[0] if parametrize.is_parametrized(layer) else kind


def _is_pruning(hook: Any) -> Any:
    prune = sys.modules.get("torch.nn.utils.prune")  # whoever prunes has imported it; nobody else needs it
    return prune is not None and isinstance(hook, prune.BasePruningMethod)


def effective_weight(layer: nn.Module, name: str = "weight") -> Tensor:
    """The weight that the next forward takes in its product.

    weight_norm, spectral_norm and pruning compute the weight anew in each forward; in their old forms ``layer.weight``
    is still that of the last forward.
    """
    hooks: dict[int, Any] = dict(layer._forward_pre_hooks)
    for hook in hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(layer)
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(layer, do_power_iteration=False)
        if _is_pruning(hook) and hook._tensor_name == name:
            return hook.apply_mask(layer)
    if isinstance(layer, QATLayer):
        return layer.unquantized(name)
    weight: Tensor = getattr(layer, name)
    return weight


def bake_weight(layer: nn.Module) -> None:
    """Replaces what weight_norm, spectral_norm, pruning and other parametrizations compute by plain Parameters.

    torch's functions for this will not do: they write into tensors that the layer may share with a copy.
    """
    made: dict[str, Tensor] = {}
    if parametrize.is_parametrized(layer):
        made = {name: getattr(layer, name) for name in layer.parametrizations}  # type: ignore[union-attr]
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]
        loading = layer._load_state_dict_pre_hooks
        for key in [key for key, hook in loading.items() if _is_of_weight_norm(hook)]:
            del loading[key]  # it cannot be pickled, and has no names left to translate
    before: dict[int, Any] = dict(layer._forward_pre_hooks)
    for key, hook in before.items():
        if isinstance(hook, WeightNorm):
            made[hook.name] = hook.compute_weight(layer)
        elif isinstance(hook, SpectralNorm):
            made[hook.name] = hook.compute_weight(layer, do_power_iteration=False)
            for hooks in (layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
                for index in [index for index, other in hooks.items() if _is_of_spectral_norm(other, hook)]:
                    del hooks[index]
        elif _is_pruning(hook):
            made[hook._tensor_name] = hook.apply_mask(layer)
        else:
            continue
        del layer._forward_pre_hooks[key]
    for name, value in made.items():
        layer.__dict__.pop(name, None)
        for part in PARTS:
            layer._parameters.pop(name + part, None)
            layer._buffers.pop(name + part, None)
        layer.register_parameter(name, nn.Parameter(value.detach().clone()))
    if isinstance(layer, QATLayer):
        for name, _ in layer.quantized_weights():
            value = layer.unquantized(name)
            if value is not layer._parameters.get(name):  # its forward computes another weight from its own
                layer._parameters[name] = nn.Parameter(value.detach().clone())
        layer._baked()


def _is_of_weight_norm(hook: Any) -> bool:
    """Whether a hook is the one by which torch's parametrization loads files of the older weight_norm."""
    hook = getattr(hook, "hook", hook)  # torch wraps the hooks that run before loading
    return getattr(hook, "__qualname__", "").startswith(f"{parametrizations.weight_norm.__qualname__}.")


def _is_of_spectral_norm(hook: Any, norm: SpectralNorm) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps the hooks that run before loading
    return getattr(hook, "fn", None) is norm
