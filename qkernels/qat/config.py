"""QSpec and QConfig: which layers are quantized, and how."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from ..nn.quantizer_state import QUANTIZERS

QUANTIZABLE = (nn.Linear, nn.Conv2d)
Overrides = Mapping[str, Any]
GRANULARITIES = "PerTensor(), PerChannel(axis), PerGroup(size), PerToken()"


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized; the fields are those of ``FakeQuantize``.

    Args:
        bits: 2 to 8.
        granularity: which elements share a scale. None: an output channel of a weight, the whole of an input.
        symmetric: True: codes without a zero point. False: codes with one.
        quantizer: where the scale comes from: "lsq" (learned), "minmax", "ema" or "dynamic".
        straight_through: how the gradient passes. None: "lsq" if the scale is learned, else "clip".

    Raises:
        TypeError: a field has another type.
        ValueError: a field has another value, or fields do not go together.
    """

    bits: int = 8
    granularity: Granularity | None = None
    symmetric: bool = True
    quantizer: str = "lsq"
    straight_through: str | None = None

    def __post_init__(self) -> None:
        _check_type("bits", self.bits, int, "2 to 8")
        _check_type("symmetric", self.symmetric, bool, "True, False")
        _check_type("quantizer", self.quantizer, str, f"one of {', '.join(QUANTIZERS)}")
        if self.straight_through is not None:
            _check_type("straight_through", self.straight_through, str, "a name as in fake_quantize, None")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: got {self.bits!r}; accepted: 2 to 8")
        if self.quantizer not in QUANTIZERS:
            raise ValueError(
                f"quantizer: got {self.quantizer!r}; accepted: {', '.join(QUANTIZERS)}"
                + _nearest(self.quantizer, QUANTIZERS)
            )
        if self.granularity is not None and not isinstance(self.granularity, Granularity):
            hint = ""
            if inspect.isclass(self.granularity) and issubclass(self.granularity, Granularity):
                hint = " (an instance, not the class)"
            raise TypeError(f"granularity: got {self.granularity!r}; accepted: {GRANULARITIES}{hint}")
        # The quantizer's constructor checks which fields go together.
        FakeQuantize(
            bits=self.bits,
            symmetric=self.symmetric,
            quantizer=self.quantizer,
            straight_through=self.straight_through,
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
        weight, input: the spec of that tensor in every layer; None leaves the tensor in float.
        rules: pairs (pattern, overrides), of which the last that matches a layer decides. A pattern is a glob on the
            module name ("layer1.*") or a module type. Overrides are None (leave the layer in float) or a dict with
            "weight" and/or "input": a QSpec, None, or a dict of the fields to change:
            ``("fc", {"weight": {"bits": 4}})``. A rule that names a subclass of Linear or Conv2d by its type also takes
            layers that ``prepare`` would leave in float because it cannot tell what their own forward computes.

    Raises:
        TypeError: a field has another type.
        ValueError: an unknown name or key, or a value out of range.
    """

    weight: QSpec | None = field(default_factory=QSpec)
    input: QSpec | None = field(default_factory=lambda: QSpec(symmetric=False))
    rules: Sequence[tuple[str | type[nn.Module], Overrides | None]] = ()

    def __post_init__(self) -> None:
        for key in ("weight", "input"):
            spec = getattr(self, key)
            if spec is not None and not isinstance(spec, QSpec):
                raise TypeError(f"{key}: got {spec!r}; accepted: {_spec_like(spec)}, None")
        if isinstance(self.rules, str | Mapping) or not isinstance(self.rules, Sequence):
            raise TypeError(f"rules: got {self.rules!r}; accepted: a list of (name glob or module type, overrides)")
        for index, rule in enumerate(self.rules):
            where = f"rules[{index}]"
            if not (isinstance(rule, tuple | list) and len(rule) == 2):
                raise TypeError(f"{where}: got {rule!r}; accepted: a pair (name glob or module type, overrides)")
            pattern, overrides = rule
            if not (isinstance(pattern, str) or (inspect.isclass(pattern) and issubclass(pattern, nn.Module))):
                raise TypeError(f"{where}: got {pattern!r} as its pattern; accepted: a name glob, a subclass of Module")
            if overrides is None:
                continue
            if not isinstance(overrides, Mapping):
                raise TypeError(
                    f"{where}: got {overrides!r} as its overrides; accepted: None, a dict with 'weight' and/or 'input'"
                )
            _check_keys(where, overrides, ("weight", "input"))
            for key in overrides:
                try:
                    _override(getattr(self, key), overrides, key)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}, {error}") from None

    def specs(self, name: str, module: nn.Module) -> tuple[QSpec | None, QSpec | None]:
        """Specs of weight and input of the layer called ``name``."""
        weight, input = self.weight, self.input
        rule = self._rule_of(name, module)
        if rule is not None:
            if rule[1] is None:
                return None, None
            return _override(weight, rule[1], "weight"), _override(input, rule[1], "input")
        return weight, input

    def names_type_of(self, name: str, module: nn.Module) -> bool:
        """Whether the rule that decides names this subclass of Linear or Conv2d by its type."""
        rule = self._rule_of(name, module)
        return (
            rule is not None
            and rule[1] is not None
            and isinstance(rule[0], type)
            and issubclass(rule[0], QUANTIZABLE)
            and rule[0] not in QUANTIZABLE
        )

    def _rule_of(self, name: str, module: nn.Module) -> tuple[str | type[nn.Module], Overrides | None] | None:
        return next((rule for rule in reversed(self.rules) if _matches(rule[0], name, module)), None)

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
    if not isinstance(change, Mapping):
        raise TypeError(f"{key}: got {change!r}; accepted: {_spec_like(change)}, None, a dict of QSpec's fields")
    _check_keys(key, change, [f.name for f in dataclasses.fields(QSpec)])
    return dataclasses.replace(QSpec() if spec is None else spec, **change)


def _spec_like(value: Any) -> str:
    """How to write the spec that a bare value was meant for."""
    if isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 8:
        return f"a QSpec such as QSpec(bits={value})"
    return "a QSpec such as QSpec(bits=8)"


def _check_type(name: str, value: Any, kind: type, accepted: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name}: got {value!r}, a {type(value).__name__}; accepted: {accepted}")


def _check_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: got the key {key!r}; accepted: {', '.join(known)}{_nearest(key, known)}")


def _nearest(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
