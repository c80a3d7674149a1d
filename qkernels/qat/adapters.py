"""Which modules of a model are low-rank adapters, and which layers with adapters are quantized as one weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.qat_lora import QATAdapted, adapter_names, apart_reason, base_of, has_adapters, has_dropout
from .config import QConfig


@dataclass
class Adapters:
    """The adapters of a model, by the names of modules.

    Attributes:
        parts: each module in an adapter -> the module that it adapts.
        own_weight: modules that hold the adapted weight themselves, and are no layer of torch.
        sums: modules quantized as one weight -> the module whose weight it is.
        apart: modules that the config asks to quantize as one weight -> why they are not.
        left: modules whose weight a rule leaves in float, where it would be quantized as a sum.
        without_dropout: modules in ``sums`` whose adapters have a dropout.
    """

    parts: dict[str, str] = field(default_factory=dict)
    own_weight: set[str] = field(default_factory=set)
    sums: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    without_dropout: list[str] = field(default_factory=list)


def find_adapters(model: nn.Module, config: QConfig | None = None) -> Adapters:
    """config: says which layers are quantized as one weight; None: those of a prepared model."""
    found = Adapters()
    tried: dict[Any, str | None] = {}
    for name, module in model.named_modules():
        if not has_adapters(module):
            continue
        prefix = f"{name}." if name else ""
        for child in adapter_names(module):
            inside = module.get_submodule(child).named_modules(prefix=f"{prefix}{child}")
            found.parts.update((inner, name) for inner, _ in inside)
        base = base_of(module)
        if base is module and not isinstance(module, nn.Linear | QATAdapted):
            found.own_weight.add(name)
        base_name = name if base is module or base is None else f"{prefix}base_layer"
        if config is None:
            if isinstance(module, QATAdapted):
                found.sums[name] = base_name
        elif config.adapters == "sum":
            known_as = deciding(config, model, name, base_name)
            rule = config.rule_of(*known_as)
            if rule is not None and rule[1] is None:
                found.left.add(base_name)
            elif config.specs(*known_as)["weight"] is None:
                continue  # there is no weight to sum for
            elif (reason := apart_reason(module, tried)) is not None:
                found.apart[name] = reason
            else:
                found.sums[name] = base_name
                if has_dropout(module):
                    found.without_dropout.append(name)
    return found


def deciding(config: QConfig, model: nn.Module, name: str, base_name: str) -> tuple[str, nn.Module]:
    """As what the last rule that matches an adapted layer knows it: as the module with the adapters, or as the base."""

    def place(each: tuple[str, nn.Module]) -> int:
        rule = config.rule_of(*each)
        return -1 if rule is None else max(i for i, other in enumerate(config.rules) if other is rule)

    module, base = model.get_submodule(name), model.get_submodule(base_name)
    return max(((base_name, base), (name, base), (name, module)), key=place)
