"""Widths by the step, for ``qk.BitSchedule``: each function here makes one.

A width is a function of the step, or of the step and the name of what it is for, that returns 2 to 8. These also say
which widths they will ever return, so that a schedule can refuse one that a quantizer does not take before training.
"""

from __future__ import annotations

import functools
import math
import random as generator
from collections.abc import Callable, Mapping, Sequence

from .spec import check_type

__all__ = ["ByStep", "cosine", "cyclic", "progressive", "random", "steps"]


class ByStep:
    """A width as a function of the step and the name, and every width that it returns.

    Args:
        function: (step, name) -> bits; one that pickles, so that schedules and recipes do.
        every: all that it may return.
        text: the call that makes it, its ``repr``.
    """

    def __init__(self, function: Callable[[int, str], int], every: tuple[int, ...], text: str) -> None:
        self.function, self.every, self.text = function, every, text

    def __repr__(self) -> str:
        return f"schedules.{self.text}"

    def __call__(self, step: int, name: str = "") -> int:
        return self.function(step, name)


def cyclic(low: int, high: int, *, period: int, steps: int | None = None) -> ByStep:
    """From low to high by half a cosine, and again from low (cyclic precision training, arXiv 2101.09868, equation 1).

    The authors take 3 to 8 bits and 32 periods for weights and activations, and 8 for gradients throughout. Give
    ``steps``, the length of the training: behind its last step the model then has the width high, at which it is to
    run; without it the next cycle would begin at low.

    Args:
        low, high: the ends of a cycle, 2 to 8.
        period: how many steps a cycle takes.
        steps: from this step on the width is high; None: the cycles never end.

    Raises:
        ValueError, TypeError: low, high, period or steps is out of range or no int.
    """
    _check_ends("low", low, "high", high)
    _check_count("period", period)
    if steps is not None:
        _check_count("steps", steps)

    ends = "" if steps is None else f", steps={steps}"
    text = f"cyclic({low}, {high}, period={period}{ends})"
    return ByStep(functools.partial(_cyclic, low, high, period, steps), _between(low, high), text)


def _cyclic(low: int, high: int, period: int, steps: int | None, step: int, _: str) -> int:
    if steps is not None and step >= steps:
        return high
    return round(low + (high - low) * (1 - math.cos(math.pi * (step % period) / period)) / 2)


def cosine(start: int, end: int, *, steps: int) -> ByStep:
    """From start to end by half a cosine over so many steps, and end from there on.

    Args:
        start, end: 2 to 8.
        steps: how many it takes.

    Raises:
        ValueError, TypeError: start, end or steps is out of range or no int.
    """
    _check_ends("start", start, "end", end)
    _check_count("steps", steps)
    text = f"cosine({start}, {end}, steps={steps})"
    return ByStep(functools.partial(_cosine, start, end, steps), _between(start, end), text)


def _cosine(start: int, end: int, steps: int, step: int, _: str) -> int:
    return round(end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2)


def progressive(start: int, end: int, *, steps: int) -> ByStep:
    """From start to end bit by bit, each for an equal share of the steps, and end from there on.

    Args:
        start, end: 2 to 8.
        steps: how many all widths together take, end's share included.

    Raises:
        ValueError, TypeError: start, end or steps is out of range or no int.
    """
    _check_ends("start", start, "end", end)
    _check_count("steps", steps)
    stages = range(start, end - 1, -1) if start > end else range(start, end + 1)
    text = f"progressive({start}, {end}, steps={steps})"
    return ByStep(functools.partial(_progressive, stages, steps), _between(start, end), text)


def _progressive(stages: Sequence[int], steps: int, step: int, _: str) -> int:
    return stages[min(step * len(stages) // steps, len(stages) - 1)]


def steps(widths: Mapping[int, int]) -> ByStep:
    """Given widths from given steps on: ``steps({0: 8, 1000: 6, 2000: 4})``.

    Args:
        widths: the width from each step on; one is from step 0.

    Raises:
        ValueError, TypeError: widths is no dict, a width or step is out of range or no int, or none is for step 0.
    """
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths: got {widths!r}; accepted: a dict of steps and their widths")
    for at, bits in widths.items():
        check_type("step", at, int, "a whole number of at least 0")
        check_bits(f"the width from step {at} on", bits)
    if 0 not in widths or min(widths) < 0:
        raise ValueError(f"widths: got steps {sorted(widths)}; accepted: 0, and others above it")
    starts = dict(sorted(widths.items()))
    return ByStep(functools.partial(_from_steps, starts), tuple(sorted(set(starts.values()))), f"steps({starts})")


def _from_steps(starts: Mapping[int, int], step: int, _: str) -> int:
    return starts[max(at for at in starts if at <= step)]


def random(low: int, high: int, *, seed: int = 0) -> ByStep:
    """At each step another width for each name, drawn evenly: for models that are to run at several widths.

    A draw depends on seed, step and name alone, so that a resumed run and all processes draw alike.

    Args:
        low, high: the smallest and the largest width, 2 to 8.
        seed: another one gives other draws.

    Raises:
        ValueError, TypeError: low or high is out of range or no int.
    """
    _check_ends("low", low, "high", high)
    every = _between(low, high)
    return ByStep(functools.partial(_drawn, every, seed), every, f"random({low}, {high}, seed={seed})")


def _drawn(every: tuple[int, ...], seed: int, step: int, name: str) -> int:
    return generator.Random(f"{seed} {step} {name}").choice(every)


def check_bits(name: str, bits: object) -> None:
    check_type(name, bits, int, "2 to 8")
    if not 2 <= bits <= 8:  # type: ignore[operator]
        raise ValueError(f"{name}: got {bits}; accepted: 2 to 8")


def _check_ends(first: str, one: int, second: str, other: int) -> None:
    check_bits(first, one)
    check_bits(second, other)
    if first == "low" and one > other:
        raise ValueError(f"low: got {one} with high={other}; accepted: at most high")


def _check_count(name: str, count: int) -> None:
    check_type(name, count, int, "a whole number of at least 1")
    if count < 1:
        raise ValueError(f"{name}: got {count}; accepted: a whole number of at least 1")


def _between(one: int, other: int) -> tuple[int, ...]:
    return tuple(range(min(one, other), max(one, other) + 1))
