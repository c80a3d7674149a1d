"""The sizes that matrix products are timed at, on the CPU and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

MAX_K = 131071
SQUARES = (256, 512, 1024, 2048, 4096)
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


class Shape(NamedTuple):
    m: int
    n: int
    k: int


def read_shapes(path: Path) -> list[Shape]:
    """Rows M,N,K; a first line of names, empty lines and lines that begin with # are passed over."""
    shapes = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = [field.strip() for field in line.split(",")]
        if (
            not line.strip()
            or line.lstrip().startswith("#")
            or (not shapes and list(map(str.lower, fields)) == [*"mnk"])
        ):
            continue
        try:
            shape = Shape(*map(int, fields))
        except (TypeError, ValueError):
            shape = Shape(0, 0, 0)
        if min(shape) < 1 or shape.k > MAX_K:
            raise ValueError(f"{path}:{number}: got {line!r}; accepted: M,N,K, integers from 1, K up to {MAX_K}")
        shapes.append(shape)
    if not shapes:
        raise ValueError(f"{path}: got no shapes; accepted: a line M,N,K for each")
    return shapes


def shapes_of(name: str, rows: list[int]) -> list[Shape]:
    if name == "square":
        return [Shape(size, size, size) for size in SQUARES]
    if name == "llama":
        return [Shape(m, n, k) for m in rows for n, k in LLAMA_8B.values()]
    return read_shapes(Path(name))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
