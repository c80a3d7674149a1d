"""Configs as JSON and back."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..nn.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from .config import FIELDS, QConfig, QSpec, nearest

GRANULARITIES = {kind.__name__: kind for kind in (PerTensor, PerChannel, PerGroup, PerToken)}


def to_json(config: QConfig) -> str:
    """The config as JSON; ``from_json`` gives an equal one. A module type is written as its module and its name."""
    fields: dict[str, Any] = {name: _plain(getattr(config, name)) for name in FIELDS}
    fields["rules"] = [[_plain(pattern), _plain(overrides)] for pattern, overrides in config.rules]
    return json.dumps(fields, indent=2)


def from_json(text: str) -> QConfig:
    """The config that ``to_json`` wrote.

    Raises:
        ValueError: no JSON, an unknown key, or a module type whose module is not imported.
        TypeError, ValueError: as ``QConfig``, for what the fields hold.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"text: got no JSON ({error}); accepted: what to_json returns") from None
    known = [*FIELDS, "rules"]
    for key in fields if isinstance(fields, dict) else [text]:
        if key not in known:
            raise ValueError(f"text: got the key {key!r}; accepted: {', '.join(known)}{nearest(key, known)}")
    rules = [(_pattern(pattern), _overrides(overrides)) for pattern, overrides in fields.get("rules", [])]
    return QConfig(**{key: _spec(value) for key, value in fields.items() if key != "rules"}, rules=rules)


def _plain(value: Any) -> Any:
    if isinstance(value, QSpec):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Granularity):
        return {"kind": type(value).__name__, **dataclasses.asdict(value)}
    if isinstance(value, type):
        return {"module": value.__module__, "name": value.__qualname__}
    if isinstance(value, Mapping):
        # The fields of a spec, or some of them: what stands for the whole spec says so.
        return {key: {"spec": _plain(v)} if isinstance(v, QSpec) else _plain(v) for key, v in value.items()}
    return value


def _spec(value: Any) -> Any:
    return QSpec(**_fields(value)) if isinstance(value, dict) else value


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "granularity": _granularity(value["granularity"])} if "granularity" in value else value


def _granularity(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items() if key != "kind"}
    kind = value.get("kind")
    if kind not in GRANULARITIES:
        raise ValueError(f"granularity: got {kind!r}; accepted: {', '.join(GRANULARITIES)}")
    return GRANULARITIES[kind](**options)


def _overrides(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found = {}
    for key, spec in value.items():
        if isinstance(spec, dict) and set(spec) == {"spec"}:
            found[key] = _spec(spec["spec"])
        else:
            found[key] = _fields(spec) if isinstance(spec, dict) else spec
    return found


def _pattern(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found: Any = sys.modules.get(value["module"])
    for name in value["name"].split("."):
        found = getattr(found, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"rules: got the type {value['module']}.{value['name']}; accepted: a subclass of Module whose module is "
            "imported already"
        )
    return found
