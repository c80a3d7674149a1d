"""Reads the files of a checkpoint: tensors of one file or of shards, and JSON; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

TENSORS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def safetensors_torch() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "compressed-tensors checkpoints need the safetensors package; install it with: "
            "pip install 'qkernels[checkpoints]'"
        ) from error
    return safetensors.torch


def read(safetensors: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file or directory, and the config.json there."""
    described = (path if path.is_dir() else path.parent) / CONFIG
    config = read_json(described) if described.exists() else None
    if not path.is_dir():
        return _file(safetensors, path), config
    if (path / TENSORS).exists():
        return _file(safetensors, path / TENSORS), config
    if not (path / INDEX).exists():
        raise FileNotFoundError(f"{path}: holds neither {TENSORS} nor {INDEX}")
    shards = read_json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{path / INDEX}: weight_map: got {type(shards).__name__}; accepted: file names by tensor")
    for name, shard in shards.items():
        if not (path / shard).is_file():
            raise FileNotFoundError(f"{path / shard}: missing; {INDEX} says that {name} is in it")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(shards.values()):
        held = _file(safetensors, path / shard)
        for name in (name for name, place in shards.items() if place == shard):
            if name not in held:
                raise ValueError(f"{name}: missing in {path / shard}, where {INDEX} says it is")
            tensors[name] = held[name]
    return tensors, config


def _file(safetensors: Any, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return dict(safetensors.load_file(path))
    except Exception as error:  # a SafetensorError, which only that package defines
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}; accepted: an object")
    return found


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tied weights, because safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    for name, t in tensors.items():
        storage = t.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = t.clone()
        seen.add(storage)
    return tensors
