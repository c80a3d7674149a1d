"""Pickling of objects that hold packed tensors and whose pickles hold logical ones."""

from __future__ import annotations

import copyreg
from typing import Any


def reduce_for_a_process(value: Any) -> tuple[Any, ...]:
    """Reduces value for a process that this one starts: to the very tensors that value holds, in shared memory.

    Tensors that ``__reduce__`` makes would be freed before that process opens them.
    """
    return copyreg.__newobj__, (type(value),), dict(vars(value))  # type: ignore[attr-defined]
