"""The tensors of a program, by what holds them: the program reads what a module puts in a tensor's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..nn.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Held:
    """A tensor that a module holds, by the dict that holds it."""

    tensors: dict[str, Any]
    name: str

    def __hash__(self) -> int:
        return hash((id(self.tensors), self.name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.tensors is other.tensors and self.name == other.name


@dataclass(frozen=True)
class Made:
    """The scale (part 0) or zero point (part 1) that a quantizer makes of what it holds."""

    quantizer: FakeQuantize
    part: int


def value_of(constant: Held | Made) -> float | int:
    """The number of a constant with one element."""
    if isinstance(constant, Held):
        number: float | int = constant.tensors[constant.name].item()
        return number
    value = constant.quantizer.qparams()[constant.part]
    assert value is not None
    return value.item()
