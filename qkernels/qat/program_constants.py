"""The tensors of a program, by what holds them: the program reads what a module puts in a tensor's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

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


class Qparams:
    """Scales and zero points that quantizers make of what they hold. They are made anew when this has changed.

    A learned scale takes six small operations, which for the 15 sums of MobileNetV2 cost 1.5 of its 11 ms; to look at
    what each of them holds by itself cost 50 µs more than to look at all of it at once.
    """

    def __init__(self, made: Sequence[Made]) -> None:
        self._made = list(made)
        held = [place for quantizer in dict.fromkeys(m.quantizer for m in made) for place in quantizer.held_qparams()]
        self._dicts, self._names = [tensors for tensors, _ in held], [name for _, name in held]
        self._known: tuple[Tensor, list[Tensor]] | None = None

    def now(self) -> list[Tensor]:
        """Scale (fp32) or zero point, for each that a program reads."""
        if not self._made:
            return []
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # such as FakeTensorMode
            return self._values()
        held = [t for t in map(dict.get, self._dicts, self._names) if t is not None]
        numbers, known = torch.cat(held), self._known  # another thread may replace it
        if isinstance(numbers, FakeTensor):
            return self._values()
        if known is None or not torch.equal(known[0], numbers):
            self._known = known = numbers.detach(), self._values()
        return known[1]

    def _values(self) -> list[Tensor]:
        qparams = {quantizer: quantizer.qparams() for quantizer in dict.fromkeys(m.quantizer for m in self._made)}
        values: list[Tensor] = []
        for made in self._made:
            value = qparams[made.quantizer][made.part]
            assert value is not None
            values.append(value if made.part else value.detach().float())
        return values


def value_of(constant: Held | Made) -> float | int:
    """The number of a constant with one element."""
    if isinstance(constant, Held):
        number: float | int = constant.tensors[constant.name].item()
        return number
    value = constant.quantizer.qparams()[constant.part]
    assert value is not None
    return value.item()


def held_by(value: Any, root: nn.Module) -> Held | None:
    """What holds the tensor of a node that reads an attribute of the graph's root, or of a module inside."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    path, _, name = str(value.target).rpartition(".")
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return None
    tensors = next((held for held in (module._parameters, module._buffers) if held.get(name) is not None), None)
    return None if tensors is None else Held(tensors, name)
