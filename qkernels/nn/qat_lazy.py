"""QAT layers for torch's lazy layers: the quantizers of their weights are made when the first batch shows the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .fake_quantize import FakeQuantize
from .qat import QATConv1d, QATConv2d, QATConv3d, QATLinear
from .qat_conv_transpose import QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d
from .qat_layer import SUFFIX, QATLayer, Role

Maker = Callable[[Tensor, int | tuple[int, ...]], FakeQuantize]


class QATLazy(QATLayer):
    """What the lazy layers share: each becomes an ordinary QAT layer at its first forward pass, as torch's do.

    So it does when it loads the state of a layer that knows its shape. The optimizer has to be made after either, or it
    does not know the learned scales.
    """

    later: dict[str, tuple[str, Maker]]  # role of a weight -> the name of its quantizer, and what makes it

    def _prepared(self) -> None:
        """Takes the place of the float layer's hooks, whose handles remove them from the float layer alone."""
        layer: Any = self
        self.later = {}
        _drop_hooks(layer)
        layer._initialize_hook = layer.register_forward_pre_hook(_materialize, with_kwargs=True)

    def _released(self, module: nn.Module) -> None:
        vars(module).pop("later")
        lazy_hooks(module)

    def _make_quantizers(self, start: bool) -> None:
        roles: dict[str, Role] = type(self).roles(self)
        for key, (name, make) in self.later.items():
            weight = self.unquantized(roles[key].parameter)
            try:
                quantizer = make(weight, roles[key].channel)
            except ValueError as error:
                raise ValueError(f"config, layer {name.removesuffix(f'.{key}{SUFFIX}')!r}: {error}") from None
            quantizer.name = name
            quantizer.to(weight.device, weight.dtype).train(self.training)
            if start and quantizer.quantizer != "dynamic" and not weight.is_meta:
                quantizer.start(weight)
            setattr(self, key + SUFFIX, quantizer)
        for key in roles:  # the order that the quantizers of other layers have, which an optimizer's state follows
            if self._modules.get(key + SUFFIX) is not None:
                self._modules[key + SUFFIX] = self._modules.pop(key + SUFFIX)
        self.later = {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        layer: Any = self
        for name, p in layer._parameters.items():
            given = state_dict.get(prefix + name)
            if is_lazy(p) and given is not None and not is_lazy(given):
                p.materialize(given.shape)
        known = not layer.has_uninitialized_params()
        if known:
            shape = layer.weight.shape
            if isinstance(layer, nn.Linear):
                layer.in_features = shape[1]
            else:  # torch leaves it at 0 here
                layer.in_channels = shape[0] if layer.transposed else shape[1] * layer.groups
            self._make_quantizers(start=False)  # their own state follows, or they start at the first forward pass
        super()._load_from_state_dict(state_dict, prefix, *args)
        if known:
            _become_ordinary(layer)


def _materialize(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the first forward pass: the layer gets its shape and its quantizers, and its ordinary class."""
    layer.initialize_parameters(*args, **kwargs)
    layer._make_quantizers(start=True)
    _become_ordinary(layer)


def _become_ordinary(layer: Any) -> None:
    _drop_hooks(layer)
    del layer.later
    layer.__class__ = layer.cls_to_become


def _drop_hooks(layer: Any) -> None:
    for handle, hooks in (
        ("_initialize_hook", (layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs)),
        ("_load_hook", (layer._load_state_dict_pre_hooks,)),
    ):
        if handle in vars(layer):
            key = vars(layer).pop(handle).id
            for each in hooks:
                each.pop(key, None)


def lazy_hooks(module: Any) -> None:
    """Gives a float lazy layer the hooks of torch that make it an ordinary one, under handles of its own."""
    _drop_hooks(module)
    module._load_hook = module._register_load_state_dict_pre_hook(module._lazy_load_hook)
    module._initialize_hook = module.register_forward_pre_hook(module._infer_parameters, with_kwargs=True)


def _class_of(kind: type[nn.Module], ordinary: type[QATLayer]) -> type[QATLayer]:
    attributes = {"float_class": kind, "cls_to_become": ordinary, "__module__": __name__, "__reduce_ex__": _reduce}
    return type(f"QAT{kind.__name__}", (QATLazy, kind, ordinary), attributes)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _blank, (type(self).float_type,), self.__getstate__()


def _blank(kind: type[nn.Module]) -> nn.Module:
    made = LAZY_CLASSES[kind]
    return made.__new__(made)


# By the lazy float class; a subclass of one is not taken, as nothing can try its own forward yet.
LAZY_CLASSES: dict[type[nn.Module], type[QATLayer]] = {
    kind: _class_of(kind, ordinary)
    for kind, ordinary in (
        (nn.LazyLinear, QATLinear),
        (nn.LazyConv1d, QATConv1d),
        (nn.LazyConv2d, QATConv2d),
        (nn.LazyConv3d, QATConv3d),
        (nn.LazyConvTranspose1d, QATConvTranspose1d),
        (nn.LazyConvTranspose2d, QATConvTranspose2d),
        (nn.LazyConvTranspose3d, QATConvTranspose3d),
    )
}
