"""BitSchedule: widths of weights, activations and gradients that follow the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.int8_training import Int8TrainingLinear
from .calibrate import check_module, check_shapes, unwrapped
from .quant_loss import steps_of
from .schedules import ByStep, check_bits
from .training import change_widths, check_widths
from .where import chosen

Width = int | ByStep | Callable[[int], int]
GRADIENT = "grad"


class BitSchedule:
    """Gives quantizers of a prepared model, and gradients of int8 training layers, the widths of each step.

    ```
    schedule = qk.BitSchedule(prepared, {"*": qk.schedules.cyclic(3, 8, period=500, steps=5000), "head.*": 8})
    for x, target in batches:
        ...
        optimizer.step()
        schedule.step()
    ```

    The model gets the widths of step 0 at once. ``step``, called after a step of the optimizer, gives it those of the
    next. A width that does not change costs nothing; one that does goes by ``qk.set_bits``, which gives a learned scale
    a range that fits the width: a weight's by one search over its values for each change to 4 bits or less, an input's
    by a stated factor. An optimizer's state stays valid. Nothing of a tensor's size is allocated, and scales stay where
    they are in memory. Compiled code compiles once for each width,
    or combination of widths, that it meets (see ``torch._dynamo.config.recompile_limit``): eager code never.

    Args:
        model: from ``prepare``, or any that holds ``qk.nn.Int8TrainingLinear``.
        widths: by a glob on names, the width: a number, a function of the step, or one of ``qk.schedules``, which may
            differ by name. Names are those of quantizers, such as ``"layer1.0.weight_fake_quant"`` or
            ``"*input_fake_quant"``, and ``"<layer>.grad"`` for the gradients of an ``Int8TrainingLinear``. The last
            glob that matches a name decides; what none matches keeps its width.

    Raises:
        ValueError: a glob that matches nothing, a width other than 2 to 8 or that a quantizer does not take (the text
            names both), lazy layers that have not run yet, or nothing to schedule. The model then stays as it was. What
            a function of the user's returns is looked at when its step comes.
        TypeError: model is not a module, or a width is neither a number nor a function.
    """

    def __init__(self, model: nn.Module, widths: Mapping[str, Width]) -> None:
        self._targets, self._widths = checked_widths(model, widths)
        self.model = unwrapped(model)
        self.steps = 0  # how often ``step`` was called
        self._apply(0)

    @property
    def bits(self) -> dict[str, int]:
        """The present widths of all that is scheduled, by name."""
        return {name: self._bits_of(name) for name in self._widths}

    def _bits_of(self, name: str) -> int:
        target = self._targets[name]
        return target.bits if isinstance(target, FakeQuantize) else target.grad_bits

    def step(self) -> dict[str, int]:
        """Goes on by one step, after one of the optimizer's.

        Returns:
            The names whose width changed, with the new widths.

        Raises:
            ValueError, TypeError: a function of the user's returned what its quantizer does not take; the text names
                both. Model and step then stay as they were.
        """
        changed = self._apply(self.steps + 1)
        self.steps += 1
        return changed

    def _apply(self, step: int) -> dict[str, int]:
        wanted = {name: at_step(width, step, name) for name, width in self._widths.items()}
        changed = {name: bits for name, bits in wanted.items() if bits != self._bits_of(name)}
        quantizers = {}
        for name, bits in changed.items():
            _check(self._targets, name, bits)
            if isinstance(target := self._targets[name], FakeQuantize):
                quantizers[target] = bits
        if quantizers:
            change_widths(self.model, quantizers)
        for name, bits in changed.items():
            if isinstance(target := self._targets[name], Int8TrainingLinear):
                target.grad_bits = bits
        return changed

    def state_dict(self) -> dict[str, Any]:
        """The step, to go on from in a resumed run, and the widths as numbers and texts; it raises nothing."""
        return {"steps": self.steps, "widths": {name: as_text(width) for name, width in self._widths.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the step of a ``state_dict``, and gives the model its widths.

        A model's state loads into a model of its widths: load the schedule's first.

        Raises:
            ValueError: state holds no number of steps, or is that of another schedule; or as ``step``.
        """
        steps = steps_of(state)
        own = self.state_dict()["widths"]
        given = state.get("widths", own)  # older states hold the step alone
        if given != own:
            theirs = given if isinstance(given, Mapping) else {}
            name = next(name for name in {**own, **theirs} if theirs.get(name) != own.get(name))
            raise ValueError(
                f"state: got one of another schedule, {name}: {theirs.get(name)!r}; accepted: {own.get(name)!r}"
            )
        self._apply(steps)
        self.steps = steps


Targets = dict[str, FakeQuantize | Int8TrainingLinear]


def checked_widths(model: nn.Module, widths: Mapping[str, Width]) -> tuple[Targets, dict[str, Width]]:
    """What a schedule of these widths changes, and the width of each name in it; it raises as ``BitSchedule``."""
    check_module(model)
    model = unwrapped(model)
    check_shapes(model)
    targets: Targets = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            targets[name] = module
        elif isinstance(module, Int8TrainingLinear):
            targets[f"{name}.{GRADIENT}".removeprefix(".")] = module
    if not targets:
        raise ValueError("model: got one without quantizers or Int8TrainingLinear; accepted: one with some")
    if not isinstance(widths, Mapping) or not widths:
        raise TypeError(f"widths: got {widths!r}; accepted: a dict of globs on names and their widths")
    found: dict[str, Width] = {}
    for glob, width in widths.items():
        found.update(dict.fromkeys(chosen(glob, targets, "quantizers and gradients", "widths"), width))
    for name, width in found.items():
        if isinstance(width, ByStep) or not callable(width):  # what a user's function returns is not known yet
            for bits in width.every if isinstance(width, ByStep) else (width,):
                _check(targets, name, bits)
    return targets, found


def _check(targets: Targets, name: str, bits: int) -> None:
    check_bits(name, bits)
    if isinstance(target := targets[name], FakeQuantize):
        check_widths({name: target}, {name: bits})


def as_text(width: Width) -> Any:
    """A width as a number, or as the call that makes it; what a function of the user's does is not known."""
    if isinstance(width, int):
        return width
    return repr(width) if isinstance(width, ByStep) else "a function"


def at_step(width: Width, step: int, name: str) -> int:
    bits = width(step, name) if isinstance(width, ByStep) else width(step) if callable(width) else width
    check_bits(f"{name}, at step {step}", bits)
    return bits
