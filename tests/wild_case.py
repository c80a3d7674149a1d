"""What a test needs to know of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

import qkernels as qk

Make = TypeVar("Make", bound=Callable[[], nn.Module])


@dataclass(frozen=True)
class Wild:
    """A small model of a kind that people train.

    Attributes:
        make: the model, with new weights at each call.
        inputs: one batch: the arguments of the model's forward.
        rules: rules of the QConfig, beside its defaults.
        narrow: whether the model is also tested with weights of 4 bits.
        floats: names of the modules some of whose weights stay in float, with the reason.
        idle: names of the modules whose parameters take no part in the loss on this batch, with the reason.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    rules: Sequence[tuple[Any, Any]] = ()
    narrow: bool = False
    floats: dict[str, str] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)

    def config(self, bits: int) -> qk.QConfig:
        return qk.QConfig(weight=qk.QSpec(bits), rules=self.rules)


class Models(dict[str, Wild]):
    """Models by name."""

    def add(self, inputs: Callable[[], tuple[Any, ...]], **options: Any) -> Callable[[Make], Make]:
        """Puts the class or function below it among the models, under its own name."""

        def keep(make: Make) -> Make:
            self[make.__name__] = Wild(make, inputs, **options)
            return make

        return keep
