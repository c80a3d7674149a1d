"""QSpec and QConfig: which layers are quantized, and how."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.fake_quantize import QUANTIZERS, FakeQuantize
from ..nn.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken

QUANTIZABLE = (nn.Linear, nn.Conv2d)
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized; the fields are those of ``FakeQuantize``.

    granularity None: per output channel for a weight, per tensor for an input.
    """

    bits: int = 8
    granularity: Granularity | None = None
    symmetric: bool = True
    quantizer: str = "lsq"
    straight_through: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits: got {self.bits!r}; accepted: 2 to 8")
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer: got {self.quantizer!r}; accepted: {', '.join(QUANTIZERS)}")
        if self.granularity is not None and not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"granularity: got {self.granularity!r}; accepted: PerTensor(), PerChannel(axis), PerGroup(size), "
                "PerToken()"
            )

    def for_weight(self, layer: nn.Module) -> FakeQuantize:
        granularity = PerChannel() if self.granularity is None else self.granularity
        if not (granularity in (PerTensor(), PerChannel(0)) or isinstance(granularity, PerGroup)):
            raise ValueError(
                f"weight granularity: got {granularity}; accepted: PerTensor(), PerChannel(0), PerGroup(size)"
            )
        shape: Any = layer.weight.shape
        return FakeQuantize(
            bits=self.bits,
            granularity=granularity,
            symmetric=self.symmetric,
            quantizer=self.quantizer,
            shape=shape,
            straight_through=self.straight_through,
        )

    def for_input(self, layer: nn.Module) -> FakeQuantize:
        granularity = PerTensor() if self.granularity is None else self.granularity
        if granularity != PerTensor():
            if granularity != PerToken() or not isinstance(layer, nn.Linear):
                accepted = "PerTensor(), PerToken()" if isinstance(layer, nn.Linear) else "PerTensor()"
                raise ValueError(
                    f"input granularity of {type(layer).__name__}: got {granularity}; accepted: {accepted}"
                )
            if self.quantizer != "dynamic" or not self.symmetric:
                raise ValueError(
                    f'input: got PerToken() with quantizer="{self.quantizer}", symmetric={self.symmetric}; accepted: '
                    'PerToken() with quantizer="dynamic", symmetric=True'
                )
        return FakeQuantize(
            bits=self.bits,
            granularity=granularity,
            symmetric=self.symmetric,
            quantizer=self.quantizer,
            feature_dims=1 if isinstance(layer, nn.Linear) else 3,
            straight_through=self.straight_through,
        )


@dataclass(frozen=True)
class QConfig:
    """What ``prepare`` does to the Linear and Conv2d layers of a model.

    Args:
        weight, input: specs of every layer; None leaves that tensor in float.
        rules: pairs (pattern, overrides), the last one that matches a layer decides. A pattern is a glob on the module
            name ("layer1.*") or a module type. Overrides are None (leave the layer in float) or a dict with "weight"
            and/or "input": a QSpec, None, or a dict of the fields to change: ``("fc", {"weight": {"bits": 4}})``.
    """

    weight: QSpec | None = field(default_factory=QSpec)
    input: QSpec | None = field(default_factory=lambda: QSpec(symmetric=False))
    rules: Sequence[tuple[str | type[nn.Module], Overrides | None]] = ()

    def __post_init__(self) -> None:
        for index, rule in enumerate(self.rules):
            if not (
                isinstance(rule, tuple)
                and len(rule) == 2
                and isinstance(rule[0], str | type)
                and (rule[1] is None or (isinstance(rule[1], Mapping) and set(rule[1]) <= {"weight", "input"}))
            ):
                raise ValueError(
                    f"rules[{index}]: got {rule!r}; accepted: (name glob or module type, None or a dict with 'weight' "
                    "and/or 'input')"
                )

    def specs(self, name: str, module: nn.Module) -> tuple[QSpec | None, QSpec | None]:
        """Specs of weight and input of the layer called ``name``."""
        weight, input = self.weight, self.input
        for pattern, overrides in reversed(self.rules):
            if _matches(pattern, name, module):
                if overrides is None:
                    return None, None
                return _override(weight, overrides, "weight"), _override(input, overrides, "input")
        return weight, input

    def warn_of_idle_rules(self, layers: Mapping[str, nn.Module]) -> None:
        for pattern, _ in self.rules:
            if not any(_matches(pattern, name, module) for name, module in layers.items()):
                warnings.warn(f"rules: {pattern!r} matches no Linear or Conv2d layer of the model", stacklevel=3)


def _matches(pattern: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(module, pattern)


def _override(spec: QSpec | None, overrides: Overrides, key: str) -> QSpec | None:
    change = overrides.get(key, spec)
    if change is None or isinstance(change, QSpec):
        return change
    known = [f.name for f in dataclasses.fields(QSpec)]
    if not isinstance(change, Mapping) or not set(change) <= set(known):
        raise ValueError(f"rules, {key}: got {change!r}; accepted: a QSpec, None, or a dict of {', '.join(known)}")
    return dataclasses.replace(QSpec() if spec is None else spec, **change)
