"""The schemes and sizes that matrix products are timed at, as the commands for the CPU and for a GPU take them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from qkernels import gemm_checks

MAX_K = 131071
GROUP_SIZES = (128, 32)
INT4 = ("w4a8", "w4a16")  # int4 weights with group scales, on int8 activations and on floating ones
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


class Case(NamedTuple):
    """A product to time; group_size: of the scales of int4 weights, −1 for one of each row."""

    scheme: str
    shape: Shape
    group_size: int | None = None

    @property
    def groups(self) -> int:
        """How many scales a row of the weight has."""
        return 1 if self.group_size in (None, -1) else self.shape.k // self.group_size


def cases_of(
    schemes: Sequence[str], group_sizes: Sequence[int], shapes: Sequence[Shape]
) -> tuple[list[Case], list[str]]:
    """The products, int4 schemes with each group size, and which ones there cannot be, and why."""
    cases, left_out = [], []
    for scheme in schemes:
        for group_size in group_sizes if scheme in INT4 else (None,):
            for shape in shapes:
                try:
                    if group_size is not None:
                        gemm_checks.weight_group_size(shape.k if group_size == -1 else group_size, shape.k)
                except RuntimeError as error:
                    left_out.append(f"{scheme} {'×'.join(map(str, shape))}: {error}")
                else:
                    cases.append(Case(scheme, shape, group_size))
    return cases, left_out


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def listed(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """For argparse: what ``one`` makes of each part between commas."""

    def parts(text: str) -> list[Any]:
        return [one(part) for part in text.split(",") if part]

    parts.__name__ = one.__name__
    return parts


def arguments(command: str, doc: str, schemes: Sequence[str], rows: list[int]) -> argparse.ArgumentParser:
    """The options that both commands have; ``flat`` makes lists of those that may be given with commas."""

    def scheme(text: str) -> str:
        if text not in schemes:
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted: {', '.join(schemes)}")
        return text

    def group_size(text: str) -> int:
        value = int(text)
        if value != -1 and (value < 16 or value % 8):
            raise argparse.ArgumentTypeError(f"got {text}; accepted: -1, or a multiple of 8 from 16 on")
        return value

    parser = argparse.ArgumentParser(prog=command, description=doc.split("\n\n")[0])
    parser.add_argument("--shapes", default="llama", help="llama (Llama-8B's layers), square, or a CSV of M,N,K")
    parser.add_argument("--rows", type=positive, nargs="+", default=rows, help="M of llama")
    parser.add_argument(
        "--schemes", "--scheme", type=listed(scheme), nargs="+", default=[list(schemes)], metavar="SCHEME",
        help=f"separated by spaces or commas: {', '.join(schemes)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--group-sizes", "--group-size", type=listed(group_size), nargs="+", default=[list(GROUP_SIZES)], metavar="G",
        help=f"of int4 weights, along K; -1: one scale for each row; default: {' '.join(map(str, GROUP_SIZES))}",
    )  # fmt: skip
    return parser


def flat(lists: list[list[Any]]) -> list[Any]:
    """Each once, in the order given."""
    return list(dict.fromkeys(chain.from_iterable(lists)))
