"""What one run takes of the work that is too long for every run: a sample, chosen by a seed that is printed.

The seed is that of the checked-out commit, so that a run can be repeated, and the next commit gets another sample.
QKERNELS_TEST_SEED sets another one; QKERNELS_TEST_SEED=all takes everything, as `make nightly` does.

    python tests/sampling.py ONE OTHER ANOTHER      # prints the one whose turn it is
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

SEED = "QKERNELS_TEST_SEED"
# A test of more cases than this runs a sample of them. The sample holds each value of each parameter at least once
# (each kernel, each path, each dtype), unless the parameter has more values than MOST_VALUES.
MOST_CASES, MOST_VALUES = 4, 80
T = TypeVar("T")


@functools.cache
def seed() -> int | None:
    """The number that chooses the sample; None: everything is taken."""
    if wanted := os.environ.get(SEED):
        return None if wanted == "all" else int(wanted)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout[:7], 16)
    except (OSError, subprocess.CalledProcessError):  # an archive of the sources
        return date.today().toordinal()


def described() -> str:
    return f"all cases ({SEED}=all)" if seed() is None else f"a sample of the long tests ({SEED}={seed()})"


def in_turn(choices: Sequence[T], count: int = 1) -> list[T]:
    """``count`` neighbours among the choices, which another seed moves on by one; all choices where all is taken."""
    number = seed()
    if number is None or count >= len(choices):
        return list(choices)
    return [choices[(number + at) % len(choices)] for at in range(count)]


def one_of(count: int, at: int) -> Any:
    """A mark for one of ``count`` tests that check the same things in different ways: a run takes one of them."""
    import pytest

    number = seed()
    return pytest.mark.nightly if number is not None and number % count != at else lambda test: test


def drawn(choices: Iterable[T], share: float, name: str) -> Iterator[T]:
    """A random share of the choices, one after the other; all of them where all is taken."""
    chance = random.Random(f"{seed()} {name}")
    return (choice for choice in choices if seed() is None or chance.random() < share)


def cases_of(params: Sequence[dict[str, Any]], name: str) -> set[int]:
    """The cases of a test that run, by their places: of each value of each parameter one, and random ones."""
    if seed() is None or len(params) <= MOST_CASES:
        return set(range(len(params)))
    values = [{(key, repr(value)) for key, value in of_case.items()} for of_case in params]
    counts = Counter(key for key, _ in set().union(*values))
    shuffled = random.Random(f"{seed()} {name}").sample(range(len(params)), len(params))
    kept: list[int] = []
    seen: set[tuple[str, str]] = set()
    for at in shuffled:
        new = {value for value in values[at] - seen if counts[value[0]] <= MOST_VALUES}
        if new:
            kept.append(at)
            seen |= new
    others = [at for at in shuffled if at not in set(kept)]
    return {*kept, *others[: max(0, MOST_CASES - len(kept))]}


if __name__ == "__main__":
    print(*in_turn(sys.argv[1:]))
