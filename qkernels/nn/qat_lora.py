"""QATAdapted: a layer with low-rank adapters (LoRA), whose weight plus scaling·B·A is quantized as one weight.

Adapters are known by their names, whoever made them. A module that has two children or parameters ``lora_A`` and
``lora_B`` (or ``lora_a``, ``lora_b``) adapts its child ``base_layer``, or if it has none, its own ``weight``. Where the
two are dicts, they hold an adapter for each name, of which ``active_adapters`` lists those in use (all, if there is no
such attribute). ``scaling`` is a number, or a dict by name; without it the factor is alpha / rank.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .fake_quantize import FakeQuantize
from .made_classes import made_again
from .qat import QATConv1d, QATConv2d, QATConv3d, QATLinear
from .qat_layer import SUFFIX, QATLayer, Role, copied_state
from .replacing import take_hooks
from .tracing import call_as_leaf

BASES: dict[type[nn.Module], type[QATLayer]] = {
    kind.float_class: kind for kind in (QATLinear, QATConv1d, QATConv2d, QATConv3d)
}
MAGNITUDE = "lora_magnitude_vector"  # of DoRA
OFF = ("merged", "disable_adapters", "disabled")  # attributes that, if true, say that the adapters add nothing now


def adapter_names(module: nn.Module) -> list[str]:
    """The children of ``module`` that make up its adapters; none: it has none, or holds them as its own parameters."""
    return [name for name in module._modules if name.lower().startswith("lora_")] if has_adapters(module) else []


def has_adapters(module: nn.Module) -> bool:
    names = {name.lower() for name in (*module._modules, *module._parameters)}
    return {"lora_a", "lora_b"} <= names


def base_of(module: nn.Module) -> nn.Module | None:
    """What holds the weight that the adapters of ``module`` change: its child, the module itself, or nothing known."""
    if not has_adapters(module):
        return None
    return module._modules.get("base_layer") or (module if module._parameters.get("weight") is not None else None)


def base_class(module: nn.Module) -> type[QATLayer] | None:
    """The QAT layer for the sum; None: the adapted layer is of a kind of which no sum is known."""
    base = base_of(module)
    if base is not None and base is not module:
        return BASES.get(type(base))
    return QATLinear if base is not None and base._parameters["weight"].dim() == 2 else None  # type: ignore[union-attr]


def summed_weight(module: nn.Module) -> Tensor:
    """The base's weight plus scaling·B·A of every adapter in use, rounded once to the base's dtype.

    The product is not left to autocast: the weight must be the same in training and in the converted layer.
    """
    weight: Tensor = base_of(module).weight  # type: ignore[assignment, union-attr]
    total, device = weight, weight.device.type
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        for a, b, scaling in _in_use(module):
            product = _tensor(b, "weight").flatten(1) @ _tensor(a, "weight").flatten(1)
            total = total + (product * scaling).view(weight.shape)
    return total.to(weight.dtype)


def summed_bias(module: nn.Module) -> Tensor | None:
    """The base's bias with what the biases of A and B, where they have any, add to every output."""
    total: Tensor | None = getattr(base_of(module), "bias", None)
    for a, b, scaling in _in_use(module):
        bias_a, bias_b = _tensor(a, "bias"), _tensor(b, "bias")
        parts = [bias_b] if bias_b is not None else []
        if bias_a is not None:
            parts.append(_tensor(b, "weight").flatten(1) @ bias_a)
        for part in parts:
            total = part * scaling if total is None else (total + part * scaling).to(total.dtype)
    return total


def _pairs(module: nn.Module) -> Iterator[tuple[Any, Any, float]]:
    """A, B and the scaling of every adapter of the module, in use or not."""
    held = {name.lower(): value for name, value in (*module._parameters.items(), *module._modules.items())}
    a: Any = held["lora_a"]
    b: Any = held["lora_b"]
    scaling = getattr(module, "scaling", None)
    if isinstance(a, Mapping | nn.ModuleDict | nn.ParameterDict):
        active: Any = getattr(module, "active_adapters", None)
        active = list(a) if active is None else [active] if isinstance(active, str) else active
        for name in active:
            if name in a:
                yield a[name], b[name], scaling[name] if isinstance(scaling, Mapping) else _factor(module)
    else:
        yield a, b, _factor(module)


def _in_use(module: nn.Module) -> Iterator[tuple[Any, Any, float]]:
    return iter(()) if any(getattr(module, name, False) for name in OFF) else _pairs(module)


def _factor(module: Any) -> float:
    scaling = getattr(module, "scaling", None)
    return module.alpha / module.rank if scaling is None else scaling


def _tensor(part: Any, name: str) -> Any:
    """A weight or bias of A or B, which may be a layer or a plain parameter."""
    if isinstance(part, nn.Module):
        return getattr(part, name, None)
    return part if name == "weight" else None


def has_dropout(module: nn.Module) -> bool:
    """Whether a dropout of the adapters acts in training, which a weight cannot express."""
    own = [child for name, child in module._modules.items() if "dropout" in name and child is not None]
    return any(isinstance(inner, nn.Dropout) and inner.p > 0 for child in own for inner in child.modules())


def apart_reason(module: nn.Module, tried: dict[Any, str | None]) -> str | None:
    """Why base and adapters of ``module`` cannot be quantized as one weight; None: they can.

    tried: what the trials of other modules of the model gave; those of one class with equal switches need one trial.
    """
    kind, base = type(module).__name__, base_of(module)
    if base is None:
        return f"{kind} holds neither a base_layer nor a weight of its own"
    cls = base_class(module)
    if cls is None:
        return f"the class of the base is {type(base).__name__}; accepted: {', '.join(each.__name__ for each in BASES)}"
    if parametrize.is_parametrized(base) or parametrize.is_parametrized(module) or "forward" in vars(base):
        return "the base is parametrized, or its forward was replaced"
    known = [base, *(module._modules[name] for name in adapter_names(module))]
    own = {"weight", "bias", "lora_a", "lora_b"} if base is module else {"lora_a", "lora_b"}
    others = [name for name, _ in module.named_parameters(recurse=False) if name.lower() not in own]
    others += [name for name, child in module.named_children() if child not in known and list(child.parameters())]
    others += [name for name in (MAGNITUDE, "lora_embedding_A") if list(_parameters_of(module, name))]
    if others:
        return f"{kind} also holds the parameters of {others[0]!r}"
    try:
        pairs = list(_pairs(module))
    except (AttributeError, KeyError, TypeError):
        return f"{kind} has no number scaling, no dict of them, and no alpha and rank"
    weight: Tensor = base.weight  # type: ignore[assignment]
    for a, b, _ in pairs:
        shapes = [tuple(_tensor(part, "weight").shape) for part in (a, b)]
        rank, inner = shapes[0][0], [1] * (weight.dim() - 2)
        fits = shapes == [(rank, *weight.shape[1:]), (weight.shape[0], rank, *inner)]
        if not fits or not (cls is QATLinear or _same_geometry(base, a, b)):
            return f"the shapes or strides of A {list(shapes[0])} and B {list(shapes[1])} are not those of one sum"
    if weight.is_meta:
        return None
    key = type(module), type(base), *((name, _switch(value)) for name, value in vars(module).items())
    if key not in tried:
        tried[key] = _trial_reason(module)
    return tried[key]


def _switch(value: Any) -> Any:
    """What may decide which way a forward goes: a switch, a word, or the types of objects."""
    if value is None or isinstance(value, bool | str):
        return value
    return tuple(type(item) for item in value.values()) if isinstance(value, Mapping) else type(value)


def has_magnitude(module: nn.Module) -> bool:
    """Whether the adapters are those of DoRA, which read the base's weight for its norm."""
    return has_adapters(module) and bool(list(_parameters_of(module, MAGNITUDE)))


def _parameters_of(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    child = module._modules.get(name)
    return iter(()) if child is None else child.parameters()


def _same_geometry(base: Any, a: Any, b: Any) -> bool:
    """Whether A slides over its input as the base does, and B over A's result not at all."""
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "groups")
    ones = (1,) * len(base.kernel_size)
    return (
        base.groups == 1
        and all(getattr(a, name, None) == getattr(base, name) for name in names)
        and (b.kernel_size, b.stride, b.groups) == (ones, ones, 1)
        and b.padding in ((0,) * len(ones), 0, "valid", "same")
    )


@torch.no_grad()
def _trial_reason(module: nn.Module) -> str | None:
    """Compares the module's own forward with the sum, on a copy whose adapters are not zero."""
    kind = type(module).__name__
    twin: Any = copy.deepcopy(module)
    for a, b, _ in _pairs(twin):
        for p in (_tensor(part, name) for part in (a, b) for name in ("weight", "bias")):
            if p is not None:
                p.copy_(torch.arange(1.0, p.numel() + 1, device=p.device).cos().view(p.shape))
    twin.eval()
    base = base_of(twin)
    weight: Tensor = base.weight  # type: ignore[assignment, union-attr]
    shape = (2, weight.shape[1], *(8 + d * (k - 1) for d, k in zip(*_extent(base), strict=True)))
    n = torch.Size(shape).numel()
    x = torch.arange(n, device=weight.device).sin().view(shape).to(weight.dtype)
    try:
        got = type(twin).forward(twin, x)
        want = _product(base, x, summed_weight(twin), summed_bias(twin))
        plain = _product(base, x, weight, getattr(base, "bias", None))
        near = float((got - want).float().norm()) <= 0.05 * float((want - plain).float().norm())
        same = near or torch.equal(got, want)
    except Exception as error:  # a user's forward may raise anything; the reason repeats its message
        message = (str(error).splitlines() or [""])[0][:100]
        return f"the forward of {kind} could not be tried ({type(error).__name__}: {message})"
    return None if same else f"the forward of {kind} computes something else than with weight + scaling·B·A"


def _extent(base: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return getattr(base, "dilation", ()), getattr(base, "kernel_size", ())


def _product(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = base._conv_forward(x, weight, bias) if hasattr(base, "_conv_forward") else F.linear(x, weight, bias)
    return y


class QATAdapted(QATLayer):
    """A layer with adapters: weight + scaling·B·A is one weight, and passes with input and output through quantizers.

    It keeps the class of its float module as a base, the names of all parameters, and each module in it; the adapters
    in use, merged adapters and switched-off ones are those that the module's attributes say at the call. Base and
    adapters get the gradients of that weight. A dropout in front of the adapters does not act, since it drops parts of
    the adapters' input alone, which no weight can do.
    """

    float_class = nn.Module
    __call__ = call_as_leaf

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        kind = base_class(layer)
        assert kind is not None
        return kind.roles(base_of(layer))  # type: ignore[arg-type]

    @classmethod
    def class_for(cls, kind: type[nn.Module]) -> type[nn.Module]:
        return _class_of(kind)  # type: ignore[arg-type]

    @classmethod
    def float_reason(cls, kind: type[nn.Module]) -> str | None:
        return None  # ``apart_reason`` decides

    @classmethod
    def float_weight(cls, layer: nn.Module, parameter: str) -> Tensor:
        return summed_weight(layer)

    def unquantized(self, parameter: str) -> Tensor:
        return summed_weight(self)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.passed("weight", summed_weight(self))
        y = _product(base_of(self), self.passed("input", input), weight, summed_bias(self))
        return self.passed("output", y)

    @torch.no_grad()
    def as_sum(self) -> QATLayer:
        """A layer of the base's kind that has the sum as its weight, no adapters, and the same quantizers."""
        return self._with(nn.Parameter(summed_weight(self).clone()))

    def _with(self, weight: nn.Parameter) -> QATLayer:
        cls, base = base_class(self), base_of(self)
        assert cls is not None
        plain: Any = cls.float_class.__new__(cls.float_class)
        if base is self:
            base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        plain.__dict__ = copied_state(base)  # type: ignore[arg-type]
        bias = summed_bias(self)
        bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        plain._parameters = {"weight": weight, "bias": bias}
        take_hooks(plain, self)
        plain.training = self.training
        quantizers: dict[str, FakeQuantize | None] = {role: self.quantizer_of(role) for role in type(self).roles(self)}
        return cls.from_float(plain, **quantizers)

    def _baked(self) -> None:
        """The adapters are gone, as are other parts of a weight that were computed from several tensors."""
        made = self._with(self._parameters["weight"])  # type: ignore[arg-type]
        self.__class__ = type(made)  # type: ignore[assignment]
        self.__dict__ = made.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        parts = tuple(f"{prefix}{name}" for name in ("base_layer.weight", "lora_"))
        quantizer = self.quantizer_of("weight")
        loaded = any(key.startswith(parts) for key in state_dict)
        if quantizer is not None and loaded and f"{prefix}weight{SUFFIX}.scale" not in state_dict:
            quantizer.forget()


@functools.cache
def _class_of(kind: type[nn.Module]) -> type[QATAdapted]:
    attributes = {"__module__": kind.__module__, "float_type": kind, "__reduce_ex__": _reduce}
    return type(f"QAT{kind.__name__}", (QATAdapted, kind), attributes)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return made_again, (_class_of, type(self).float_type), self.__getstate__()
