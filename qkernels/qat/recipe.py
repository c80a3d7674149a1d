"""Recipe: a training of phases, each of which says what is quantized, at how many bits, and what is frozen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.int8_training import Int8TrainingLinear
from .batch_norm import batch_norms, freeze_bn
from .bit_schedule import BitSchedule, Width, as_text, at_step, checked_widths
from .calibrate import calibrate, check_batches, check_module, check_shapes, quantizers_of, unwrapped
from .quant_loss import steps_of
from .scale_tuning import ScaleTuning
from .spec import listed
from .training import enable_fake_quant, freeze_observers, freeze_scales

KINDS = ("weights", "inputs")  # of quantizers that a phase may switch apart
FREEZES: dict[str, Callable[..., list[str]]] = {
    "observers": freeze_observers,
    "scales": freeze_scales,
    "batch_norm": freeze_bn,
}
RANGES = ("observers", "scales")  # frozen, they take no other width and no calibration


@dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
    """A part of a training, for ``qk.Recipe``, which checks it.

    Args:
        steps: how many steps of the optimizer it takes.
        epochs: the same in epochs; one of the two is given.
        fake_quant: whether quantizers quantize: True, False (the model trains in float, and quantizers observe), or a
            dict that says it of "weights" and of "inputs" (all others) apart.
        bits: the widths, sets at the start: a number for all, or a dict as in ``qk.BitSchedule``, whose widths may
            follow the step of this phase. They stay until a later phase changes them. None: as they are.
        calibrate: batches for ``qk.calibrate``, which runs at the start of the phase, at its widths; or a function of
            the model: ``lambda model: qk.calibrate(model, batches, method="mse")``. None: it does not run.
        freeze: what is frozen from the start of this phase to the end of the training, by ``"observers"``
            (``qk.freeze_observers``), ``"scales"`` (``qk.freeze_scales``), ``"batch_norm"`` (``qk.freeze_bn``): one, or
            a list.
        name: for ``print(recipe)``.
    """

    steps: int | None = None
    epochs: int | None = None
    fake_quant: bool | Mapping[str, bool] = True
    bits: int | Mapping[str, Width] | None = None
    calibrate: Any = field(default=None, repr=False)
    freeze: str | Sequence[str] = ()
    name: str = ""

    @property
    def frozen(self) -> tuple[str, ...]:
        """``freeze`` as a tuple."""
        return (self.freeze,) if isinstance(self.freeze, str) else tuple(self.freeze)

    @property
    def widths(self) -> Mapping[str, Width]:
        """``bits`` as a dict of globs."""
        return {"*": self.bits} if isinstance(self.bits, int) else self.bits or {}

    @property
    def quantizes(self) -> dict[str, bool]:
        """Of weights and of all else whether they are quantized."""
        given = self.fake_quant
        return {kind: given if isinstance(given, bool) else given.get(kind, True) for kind in KINDS}


class Recipe:
    """Takes a prepared model through the phases of a training, in any loop.

    ```
    recipe = qk.Recipe(prepared, [
        qk.Phase(steps=100, fake_quant=False),
        qk.Phase(epochs=2, calibrate=batches),
        qk.Phase(epochs=1, bits={"*.weight_fake_quant": qk.schedules.progressive(8, 4, steps=500)}),
        qk.Phase(steps=200, freeze=["scales", "batch_norm"]),
    ], steps_per_epoch=500)
    recipe.start()
    while not recipe.done:
        ...
        optimizer.step()
        recipe.step()
    ```

    ``start`` begins the first phase, and ``step``, called after each step of the optimizer, the next one where its time
    has come. After the last phase all quantizers quantize, and the model can be converted; what was frozen stays so,
    and further steps change nothing. A recipe does only what the functions named in ``qk.Phase`` do.

    ``state_dict`` belongs into the checkpoint. A training that is resumed from there, at any step, goes on with the
    same numbers: load the recipe's first, as it sets the widths that the model's state asks for, then the model's and
    the optimizer's.

    Attributes:
        phases: as given.
        steps: how often ``step`` was called, up to total_steps.
        total_steps: of all phases together.

    Args:
        model: from ``prepare``; or a ``qk.ScaleTuning`` of a converted model, for phases that have steps and at most
            ``freeze="batch_norm"``.
        phases: in their order.
        steps_per_epoch: how many steps of the optimizer an epoch has; phases that count epochs need it.

    Raises:
        TypeError: an argument, also of a phase, has another type.
        ValueError: the model has no quantizers, or lazy layers that have not run yet; there are no phases; a phase with
            neither or both of steps and epochs, or none of them, epochs without steps_per_epoch; a width that a
            quantizer does not take; a glob without a name; a calibration or another width behind a freeze of the
            ranges, which would have to be undone; a freeze of ranges that no batch has set, or of BatchNorms that are
            not there. The text names the phase and its argument.
    """

    def __init__(
        self, model: nn.Module | ScaleTuning, phases: Sequence[Phase], *, steps_per_epoch: int | None = None
    ) -> None:
        self.tuning = model if isinstance(model, ScaleTuning) else None
        model = model.model if isinstance(model, ScaleTuning) else model
        check_module(model)
        self.model = unwrapped(model)
        if self.tuning is None:
            check_shapes(self.model)
            quantizers_of(self.model)
        if not isinstance(phases, Sequence) or not all(isinstance(phase, Phase) for phase in phases):
            raise TypeError(f"phases: got {phases!r}; accepted: a list of qk.Phase")
        if not phases:
            raise ValueError("phases: got none; accepted: a list of qk.Phase")
        if steps_per_epoch is not None:
            _check_count("steps_per_epoch", steps_per_epoch)
        self.phases = tuple(phases)
        self._lengths = [_length(f"phases[{i}]", phase, steps_per_epoch) for i, phase in enumerate(phases)]
        self._own_bits: dict[str, Width] = {}
        self._check()
        self.steps, self.total_steps = 0, sum(self._lengths)
        self._index = -1  # of the present phase; −1: not started
        self._schedule: BitSchedule | None = None
        self._frozen: dict[str, list[str]] = {}  # what was frozen here, and whose

    def _check(self) -> None:
        frozen: dict[str, int] = {}
        for i, phase in enumerate(self.phases):
            where = f"phases[{i}]"
            _check_fields(where, phase)
            if self.tuning is not None:
                _check_tuned(where, phase)
            behind = next((f"phases[{frozen[kind]}] freezes the {kind}" for kind in RANGES if kind in frozen), None)
            if phase.bits is not None:
                if behind:
                    raise ValueError(f"{where}.bits: got {phase.bits!r}, but {behind}; accepted: None from there on")
                try:
                    targets, widths = checked_widths(self.model, phase.widths)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}.bits: {error}") from None
                self._own_bits |= {
                    name: t.bits if isinstance(t, FakeQuantize) else t.grad_bits
                    for name, t in targets.items()
                    if name in widths
                }
                if any(map(callable, widths.values())) and set(phase.frozen) & set(RANGES):
                    raise ValueError(
                        f"{where}.bits: got widths that follow the step with freeze={phase.freeze!r}; accepted: numbers"
                    )
            if isinstance(phase.calibrate, Iterator) and any(p.calibrate is phase.calibrate for p in self.phases[:i]):
                raise ValueError(
                    f"{where}.calibrate: got an iterator that an earlier phase uses up; accepted: batches that can be "
                    "gone through again, such as a list"
                )
            if phase.calibrate is not None and behind:
                raise ValueError(f"{where}.calibrate: got batches, but {behind}; accepted: None from there on")
            for kind in phase.frozen:
                frozen.setdefault(kind, i)
            if i == 0 and phase.calibrate is None and set(phase.frozen) & set(RANGES):
                unset = [name for name, q in quantizers_of(self.model).items() if not q.is_calibrated]
                if unset:
                    raise ValueError(
                        f"{where}.freeze: got {phase.freeze!r}, but {listed(unset)} have no scale yet; accepted: "
                        "with calibrate=batches, or behind a phase that trains"
                    )
        if "batch_norm" in frozen and not batch_norms(self.model):
            i = frozen["batch_norm"]
            raise ValueError(
                f"phases[{i}].freeze: got 'batch_norm' for a model without BatchNorm; accepted: "
                + ("()" if self.tuning is not None else ", ".join(RANGES))
            )

    @property
    def phase(self) -> Phase | None:
        """The present phase; None before the start and after the end."""
        return self.phases[self._index] if 0 <= self._index < len(self.phases) else None

    @property
    def done(self) -> bool:
        """Whether all phases are over."""
        return self.steps >= self.total_steps

    def start(self) -> None:
        """Begins the first phase.

        Raises:
            RuntimeError: it has begun.
            ValueError, TypeError: what its calibration, or a function for a width, raises. The model then stays as it
                was.
        """
        if self._index >= 0:
            raise RuntimeError(f"start: got a recipe at step {self.steps}; accepted: one that has not been started")
        self._begin(0)

    def step(self) -> Phase | None:
        """Goes on by one step, after one of the optimizer's.

        Returns:
            The phase that begins; None: none does.

        Raises:
            RuntimeError: ``start`` was not called.
            ValueError, TypeError: as ``start``; model and step then stay as they were.
        """
        if self._index < 0:
            raise RuntimeError("step: got a recipe that has not been started; accepted: a call of start() before")
        steps = min(self.steps + 1, self.total_steps)
        index, _ = self._place(steps)
        begins = index != self._index
        if begins:
            self._begin(index)
        elif self._schedule is not None:
            self._schedule.step()
        if self.tuning is not None:
            self.tuning.step()
        self.steps = steps
        return self.phase if begins else None

    def _place(self, step: int) -> tuple[int, int]:
        """The phase of a step, and which of its steps that is."""
        for i, length in enumerate(self._lengths):
            if step < length:
                return i, step
            step -= length
        return len(self.phases), step

    def _begin(self, index: int) -> None:
        schedule = None
        phase = self.phases[index] if index < len(self.phases) else Phase()
        if phase.bits is not None or phase.calibrate is not None:
            with _as_it_was_on_errors(self.model):
                if phase.bits is not None:
                    schedule = BitSchedule(self.model, phase.widths)
                if callable(phase.calibrate):
                    phase.calibrate(self.model)
                elif phase.calibrate is not None:
                    try:
                        calibrate(self.model, phase.calibrate)
                    except (ValueError, TypeError) as error:
                        raise type(error)(f"phases[{index}].calibrate: {error}") from error
        self._schedule, self._index = schedule, index
        self._switch()

    def _switch(self) -> None:
        """Gives the quantizers the switches of the present phase, and freezes what is frozen up to there."""
        if self.tuning is None:
            enable_fake_quant(self.model, **(self.phase or Phase()).quantizes)
        wanted = {kind for phase in self.phases[: self._index + 1] for kind in phase.frozen}
        if self._frozen.keys() - wanted:  # back to an earlier phase; what others froze is not undone
            for kind, names in self._frozen.items():
                if names:
                    FREEZES[kind](self.model, False, names)
            self._frozen = {}
        for kind in FREEZES:
            if kind in wanted and kind not in self._frozen:
                self._frozen[kind] = FREEZES[kind](self.model)

    def state_dict(self) -> dict[str, Any]:
        """The step, and what the phases are, as numbers and texts; it raises nothing."""
        state: dict[str, Any] = {"steps": self.steps, "phases": self._described()}
        return state if self.tuning is None else {**state, "tuning": self.tuning.state_dict()}

    def _described(self) -> list[dict[str, Any]]:
        return [
            {
                "steps": length,
                "fake_quant": phase.quantizes,
                "bits": {glob: as_text(width) for glob, width in phase.widths.items()},
                "calibrate": phase.calibrate is not None,
                "freeze": sorted(phase.frozen),
            }
            for phase, length in zip(self.phases, self._lengths, strict=True)
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict`` of the same recipe: gives the model that step's widths, switches and freezes.

        Raises:
            ValueError: state is that of another recipe, whose first difference the text names. Nothing is changed then.
        """
        steps, given = steps_of(state), state.get("phases")
        own = self._described()
        if not isinstance(given, list) or len(given) != len(own):
            count = f"{len(given)} phases" if isinstance(given, list) else "no phases"
            raise ValueError(f"state: got {count}; accepted: the {len(own)} of this recipe")
        for i, (theirs, ours) in enumerate(zip(given, own, strict=True)):
            for key, value in ours.items():
                got = theirs.get(key) if isinstance(theirs, Mapping) else theirs
                if got != value:
                    raise ValueError(
                        f"state: got one of another recipe, phases[{i}].{key}: {got!r}; accepted: {value!r}"
                    )
        if steps > self.total_steps:
            raise ValueError(
                f"state: got one at step {steps}; accepted: up to {self.total_steps}, which this recipe has"
            )
        if self.tuning is not None:
            self.tuning.load_state_dict(state.get("tuning", {}))
        index, local = self._place(steps)
        wanted = dict(self._own_bits)
        for i, phase in enumerate(self.phases[: index + 1]):
            if phase.bits is not None:
                last = local if i == index else self._lengths[i] - 1
                _, widths = checked_widths(self.model, phase.widths)
                wanted |= {name: at_step(width, last, name) for name, width in widths.items()}
        if wanted:
            BitSchedule(self.model, wanted)
        self.steps, self._index, self._schedule = steps, index, None
        if index < len(self.phases) and self.phases[index].bits is not None:
            self._schedule = BitSchedule(self.model, self.phases[index].widths)
            self._schedule.load_state_dict({"steps": local})
        self._switch()

    def __repr__(self) -> str:
        lines, start = [], 0
        for i, (phase, length) in enumerate(zip(self.phases, self._lengths, strict=True)):
            parts = [f"{key}={value!r}" for key, value in vars(phase).items() if key in SHOWN and value != SHOWN[key]]
            if phase.calibrate is not None:
                parts.insert(0, "calibrate")
            text = ": ".join(filter(None, (phase.name, ", ".join(parts) or "quantized")))
            lines.append(f"{'>' if i == self._index else ' '} steps {start} to {start + length - 1}: {text}")
            start += length
        return "\n".join(lines)


SHOWN = {"fake_quant": True, "bits": None, "freeze": ()}


@contextlib.contextmanager
def _as_it_was_on_errors(model: nn.Module) -> Iterator[None]:
    """Gives the quantizers their widths, scales and switches back if something is raised inside."""
    before = [(q, q.bits, copy.deepcopy(q.state_dict())) for q in quantizers_of(model).values()]
    gradients = {m: m.grad_bits for m in model.modules() if isinstance(m, Int8TrainingLinear)}
    try:
        yield
    except BaseException:
        for quantizer, bits, state in before:
            if quantizer.bits != bits:
                quantizer.set_bits(bits)
            quantizer.load_state_dict(state)
        for layer, bits in gradients.items():
            layer.grad_bits = bits
        raise


def _check_count(name: str, count: Any) -> None:
    accepted = "a whole number of at least 1"
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: got {count!r}; accepted: {accepted}")
    if count < 1:
        raise ValueError(f"{name}: got {count}; accepted: {accepted}")


def _length(where: str, phase: Phase, steps_per_epoch: int | None) -> int:
    if (phase.steps is None) == (phase.epochs is None):
        got = "neither" if phase.steps is None else "both"
        raise ValueError(f"{where}.steps: got {got} of steps and epochs; accepted: one of them")
    if phase.steps is not None:
        _check_count(f"{where}.steps", phase.steps)
        return phase.steps
    assert phase.epochs is not None
    _check_count(f"{where}.epochs", phase.epochs)
    if steps_per_epoch is None:
        raise ValueError(
            f"{where}.epochs: got {phase.epochs} without steps_per_epoch; accepted: with Recipe(…, steps_per_epoch=n)"
        )
    return phase.epochs * steps_per_epoch


def _check_fields(where: str, phase: Phase) -> None:
    given = phase.fake_quant
    if not isinstance(given, bool):
        switches = isinstance(given, Mapping) and set(given) <= set(KINDS) and bool(given)
        if not switches or not all(isinstance(value, bool) for value in given.values()):
            raise TypeError(
                f"{where}.fake_quant: got {given!r}; accepted: True, False, or a dict of 'weights' and 'inputs'"
            )
    if phase.bits is not None and (isinstance(phase.bits, bool) or not isinstance(phase.bits, int | Mapping)):
        raise TypeError(f"{where}.bits: got {phase.bits!r}; accepted: 2 to 8, a dict of globs and widths, or None")
    if not isinstance(phase.freeze, str | Sequence) or any(kind not in FREEZES for kind in phase.frozen):
        raise ValueError(f"{where}.freeze: got {phase.freeze!r}; accepted: {', '.join(FREEZES)}, or a list of them")
    if phase.calibrate is not None and not callable(phase.calibrate):
        try:
            check_batches(phase.calibrate)
        except TypeError as error:
            raise TypeError(f"{where}.calibrate: {error}, or a function of the model") from None


def _check_tuned(where: str, phase: Phase) -> None:
    """The weights of a converted model have their codes, and its activations their ranges."""
    for key, value in (("fake_quant", True), ("bits", None), ("calibrate", None)):
        if (given := getattr(phase, key)) is not value:
            got = "batches" if key == "calibrate" else repr(given)
            raise ValueError(f"{where}.{key}: got {got} for a converted model; accepted: {value}")
    if set(phase.frozen) - {"batch_norm"}:
        raise ValueError(f"{where}.freeze: got {phase.freeze!r} for a converted model; accepted: 'batch_norm', ()")
