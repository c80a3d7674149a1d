"""QATLinear and QATConv2d: float layers that fake-quantize their weight and input."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .fake_quantize import FakeQuantize
from .own_forward import QATForward, own_forward_class, product_weight
from .replacing import take_hooks
from .tracing import call_as_leaf

Layer = TypeVar("Layer", bound=nn.Module)
# Suffixes under which the old forms of weight_norm, spectral_norm and pruning keep the parts of a tensor.
PARTS = ("_g", "_v", "_orig", "_u", "_mask")


class _StartsAnew(nn.Module):
    """A layer whose weight quantizer starts anew when a state_dict is loaded that holds the weight but no scale."""

    weight_fake_quant: FakeQuantize | None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        quantizer, own = self.weight_fake_quant, f"{prefix}weight_fake_quant."
        # weight_norm, pruning and the like split the weight into several tensors, whose names begin so.
        weight = (f"{prefix}weight", f"{prefix}parametrizations.weight.")
        loaded = any(key.startswith(weight) and not key.startswith(own) for key in state_dict)
        if quantizer is not None and loaded and f"{own}scale" not in state_dict:
            quantizer.forget()


class QATLinear(_StartsAnew, nn.Linear):
    """nn.Linear whose weight and input pass through ``weight_fake_quant`` and ``input_fake_quant``; either may be None.

    Parameters keep their names, so a float state_dict loads; that of a prepared model adds the quantizers' keys.
    Arguments are as in ``nn.Linear``; ``from_float`` sets the quantizers.
    """

    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    __call__ = call_as_leaf

    @classmethod
    def from_float(
        cls, linear: nn.Linear, *, weight: FakeQuantize | None = None, input: FakeQuantize | None = None
    ) -> QATLinear:
        """Makes a QAT layer that shares the parameters, hooks and training mode of ``linear``.

        A subclass of nn.Linear keeps its class as a base and its own forward, whose product is then quantized.
        """
        return _with_quantizers(cls, linear, weight, input)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input)
        weight = self.weight if self.weight_fake_quant is None else self.weight_fake_quant(self.weight)
        return F.linear(input, weight, self.bias)


class QATConv2d(_StartsAnew, nn.Conv2d):
    """nn.Conv2d with fake quantization, as ``QATLinear``.

    A BatchNorm2d behind it stays an ordinary layer during training. Other libraries fold it into the weight before they
    quantize, which needs the folded weight at every step and, for batch statistics, a second convolution or a division
    of the output. With one scale per output channel that work is not needed, because quantization commutes with a
    factor per channel: clamp(round(f·w / (|f|·s))) = sign(f)·clamp(round(w/s)). To quantize w with scale s and then
    multiply by f, as the BatchNorm does, *is* to quantize the folded weight with scale |f|·s. ``convert`` folds
    exactly: codes keep their magnitude and change their sign where f = gamma/sqrt(var + eps) is negative, which a
    symmetric code range allows; scale becomes |f|·s, bias becomes beta + (bias − mean)·f.
    """

    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    __call__ = call_as_leaf

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, *, weight: FakeQuantize | None = None, input: FakeQuantize | None = None
    ) -> QATConv2d:
        """Makes a QAT layer that shares the parameters, hooks and training mode of ``conv``."""
        return _with_quantizers(cls, conv, weight, input)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input)
        weight = self.weight if self.weight_fake_quant is None else self.weight_fake_quant(self.weight)
        return self._conv_forward(input, weight, self.bias)


def _with_quantizers(
    cls: type[Layer], module: nn.Module, weight: FakeQuantize | None, input: FakeQuantize | None
) -> Layer:
    float_class = _float_class(cls)
    if not isinstance(module, float_class):
        raise TypeError(f"{cls.__name__}.from_float: got {type(module).__name__}; accepted: {float_class.__name__}")
    layer: Any = cls.__new__(cls)
    layer.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
    layer.__class__ = _qat_class(cls, module)
    take_hooks(layer, module)
    layer.weight_fake_quant = weight
    layer.input_fake_quant = input
    for child in (weight, input):
        if child is not None:
            child.to(layer.weight.device, layer.weight.dtype).train(module.training)
    return layer


def _qat_class(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    if not parametrize.is_parametrized(module):
        return _qat_class_of(cls, kind)
    # torch makes a class for each parametrized instance, which holds the properties of its parametrized tensors.
    made = _qat_class_of(cls, kind.__bases__[0])
    properties = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{made.__name__}", (made,), properties)


def _qat_class_of(cls: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return cls if kind is _float_class(cls) else own_forward_class(QATForward, kind, cls)


def _float_class(cls: type[nn.Module]) -> type[nn.Linear] | type[nn.Conv2d]:
    return nn.Linear if issubclass(cls, nn.Linear) else nn.Conv2d


def _is_pruning(hook: Any) -> Any:
    prune = sys.modules.get("torch.nn.utils.prune")  # whoever prunes has imported it; nobody else needs it
    return prune is not None and isinstance(hook, prune.BasePruningMethod)


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that the next forward takes in its product.

    weight_norm, spectral_norm and pruning compute the weight anew in each forward; in their old forms ``layer.weight``
    is still that of the last forward.
    """
    hooks: dict[int, Any] = dict(layer._forward_pre_hooks)
    for hook in hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(layer)
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(layer, do_power_iteration=False)
        if _is_pruning(hook) and hook._tensor_name == "weight":
            return hook.apply_mask(layer)
    if isinstance(layer, QATForward) and layer.trial.derives_weight:
        return product_weight(layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
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
    if isinstance(layer, QATForward) and layer.trial.derives_weight:
        layer.weight = nn.Parameter(product_weight(layer).detach().clone())


def _is_of_spectral_norm(hook: Any, norm: SpectralNorm) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps the hooks that run before loading
    return getattr(hook, "fn", None) is norm
