"""Pickling of what holds packed tensors and is pickled by its logical ones."""

from __future__ import annotations

import copyreg
from typing import Any


def reduce_for_a_process(value: Any) -> tuple[Any, ...]:
    """For a pickle that a process started by this one reads: with the tensors that value holds, in shared memory.

    Those that ``__reduce__`` makes would be gone before the process opens them.
    """
    return copyreg.__newobj__, (type(value),), dict(vars(value))  # type: ignore[attr-defined]
