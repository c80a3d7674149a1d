"""What ``python -m qkernels tune`` measured on this machine's GPU: tiles that go before those of gemm_configs.py.

One JSON file for each kind of GPU, in $QKERNELS_TUNE_DIR, else in qkernels/ of the user's cache folder. Read once, at
the first product; no file, no effect.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from . import gemm_configs, replay

Measured = dict[tuple[int, int, int], tuple[gemm_configs.Tile, int]]  # (class of M, N, K): tile and parts of K


def path_of(gpu: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkernels"
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")
    return Path(os.environ.get("QKERNELS_TUNE_DIR") or cache) / f"tune-{name}.json"


def measured(gpu: str, arch: int, m: int, n: int, k: int) -> tuple[gemm_configs.Tile, int] | None:
    table = load(gpu, arch)
    return table.get((gemm_configs.class_of(m, gemm_configs.GEMM_ROWS), n, k)) if table else None


@functools.cache
def load(gpu: str, arch: int) -> Measured:
    """The table of a GPU; what is wrong in its file is said once, and left out."""
    if not gpu or not (path := path_of(gpu)).is_file():
        return {}
    try:
        rows = json.loads(path.read_text())["int8_mm"]
        return dict(parsed(row, arch) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"qkernels: {path} is not used ({type(error).__name__}: {error}); make it anew with: "
            "python -m qkernels tune",
            stacklevel=6,
        )
        return {}


def parsed(row: dict[str, Any], arch: int) -> tuple[tuple[int, int, int], tuple[gemm_configs.Tile, int]]:
    tile, splits = gemm_configs.Tile(**row["tile"]), int(row["splits"])
    if fault := gemm_configs.gemm_fault(arch, tile):
        raise ValueError(fault)
    if not 1 <= splits <= 64:
        raise ValueError(f"splits: got {splits}; accepted: 1 to 64")
    ends = (*gemm_configs.GEMM_ROWS, None)
    return (ends.index(row["m_up_to"]), int(row["n"]), int(row["k"])), (tile, splits)


def save(gpu: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Writes the rows beside those of earlier runs, in whose place they come where M's class, N and K are the same."""
    path = path_of(gpu)
    old: list[dict[str, Any]] = []
    if path.is_file():
        try:
            old = json.loads(path.read_text())["int8_mm"]
        except (ValueError, KeyError):
            old = []
    key = lambda row: (row["m_up_to"], row["n"], row["k"])  # noqa: E731
    new = {key(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": gpu, **about, "int8_mm": [row for row in old if key(row) not in new] + rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    load.cache_clear()
    replay.forget()
    return path
