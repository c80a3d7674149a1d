"""QSpec: how one tensor is quantized."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..nn.fake_quantize import FakeQuantize
from ..nn.granularity import Granularity, PerChannel, PerTensor, PerToken
from ..nn.qat_layer import Role
from ..nn.quantizer_rules import QUANTIZERS, nearest, resolve

GRANULARITIES = "PerTensor(), PerChannel(axis), PerGroup(size), PerToken()"


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized; the fields are those of ``FakeQuantize``.

    Args:
        bits: 2 to 8.
        granularity: which elements share a scale. None: an output channel of a weight, the whole of an input.
        symmetric: True: codes without a zero point. False: codes with one. None: False for "lsq+" and "pact", True for
            all others.
        quantizer: where the scale comes from, and the levels: a name that ``FakeQuantize`` describes.
        straight_through: how the gradient passes. None: as the quantizer's paper says, "clip" if there is none.

    Raises:
        TypeError: a field has another type.
        ValueError: a field has another value, or fields do not go together.
    """

    bits: int = 8
    granularity: Granularity | None = None
    symmetric: bool | None = None
    quantizer: str = "lsq"
    straight_through: str | None = None

    def __post_init__(self) -> None:
        check_type("bits", self.bits, int, "2 to 8")
        if self.symmetric is not None:
            check_type("symmetric", self.symmetric, bool, "True, False, None")
        check_type("quantizer", self.quantizer, str, f"one of {', '.join(QUANTIZERS)}")
        if self.straight_through is not None:
            check_type("straight_through", self.straight_through, str, "a name as in fake_quantize, None")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: got {self.bits!r}; accepted: 2 to 8")
        if self.granularity is not None and not isinstance(self.granularity, Granularity):
            hint = ""
            if inspect.isclass(self.granularity) and issubclass(self.granularity, Granularity):
                hint = " (an instance, not the class)"
            raise TypeError(f"granularity: got {self.granularity!r}; accepted: {GRANULARITIES}{hint}")
        symmetric, _ = resolve(self.quantizer, self.bits, self.symmetric, self.straight_through)
        object.__setattr__(self, "symmetric", symmetric)

    def for_weight(self, weight: Tensor, channel: int | tuple[int, ...] = 0) -> FakeQuantize:
        """A quantizer for a parameter, by default with one scale per index of the dims ``channel``."""
        granularity = self.granularity
        if granularity is None:
            granularity = PerChannel(channel) if weight.dim() > 1 else PerTensor()
        if isinstance(granularity, PerToken):
            raise ValueError(
                f"weight granularity: got {granularity}; accepted: PerTensor(), PerChannel(axis), PerGroup(size)"
            )
        return self._quantizer(granularity, shape=weight.shape)

    def for_values(self, role: Role) -> FakeQuantize:
        """A quantizer for a tensor that varies: an input, an output, a state."""
        granularity = PerTensor() if self.granularity is None else self.granularity
        if granularity != PerTensor():
            if granularity != PerToken() or not role.per_token:
                accepted = "PerTensor(), PerToken()" if role.per_token else "PerTensor()"
                raise ValueError(f"{role.kind} granularity: got {granularity}; accepted: {accepted}")
            if self.quantizer != "dynamic" or not self.symmetric:
                raise ValueError(
                    f'{role.kind}: got PerToken() with quantizer="{self.quantizer}", symmetric={self.symmetric}; '
                    'accepted: PerToken() with quantizer="dynamic", symmetric=True'
                )
        return self._quantizer(granularity, feature_dims=role.feature_dims)

    def _quantizer(self, granularity: Granularity, **options: Any) -> FakeQuantize:
        return FakeQuantize(
            bits=self.bits,
            granularity=granularity,
            symmetric=self.symmetric,
            quantizer=self.quantizer,
            straight_through=self.straight_through,
            **options,
        )


def check_type(name: str, value: Any, kind: type, accepted: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name}: got {value!r}, a {type(value).__name__}; accepted: {accepted}")


def check_frozen(frozen: Any) -> None:
    check_type("frozen", frozen, bool, "True or False (names, or globs on them, go to where=)")


def check_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: got the key {key!r}; accepted: {', '.join(known)}{nearest(key, known)}")


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first three, and how many more there are: a model may have thousands. Its own name is empty."""
    every = [name or "(model)" for name in names]
    more = [f"and {len(every) - 3} more"] if len(every) > 3 else []
    return separator.join(every[:3] + more)
