"""What a QConfig holds, as values that JSON knows, and back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..nn.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from .spec import QSpec, check_keys

GRANULARITIES = {kind.__name__: kind for kind in (PerTensor, PerChannel, PerGroup, PerToken)}


def plain(value: Any) -> Any:
    if isinstance(value, QSpec):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Granularity):
        return {"kind": type(value).__name__, **dataclasses.asdict(value)}
    if isinstance(value, type):
        return {"module": value.__module__, "name": value.__qualname__}
    if isinstance(value, Mapping):
        # The fields of a spec, or some of them: what stands for the whole spec says so.
        return {key: {"spec": plain(v)} if isinstance(v, QSpec) else plain(v) for key, v in value.items()}
    return value


def spec_of(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    check_keys("QSpec", value, [field.name for field in dataclasses.fields(QSpec)])
    return QSpec(**_fields(value))


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "granularity": granularity_of(value["granularity"])} if "granularity" in value else value


def granularity_of(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items() if key != "kind"}
    name = value.get("kind", value)
    if not isinstance(name, str) or name not in GRANULARITIES:
        raise ValueError(f'granularity: got {name!r}; accepted: a "kind" of {", ".join(GRANULARITIES)}')
    kind = GRANULARITIES[name]
    check_keys(f"granularity: {kind.__name__}", options, [field.name for field in dataclasses.fields(kind)])
    return kind(**options)


def rules_of(value: Any) -> Any:
    """The rules; what is no list of pairs stays as it is, for QConfig to refuse."""
    if not isinstance(value, list):
        return value
    pair = (_module_type, _overrides)
    return [
        [read(part) for read, part in zip(pair, rule, strict=True)]
        if isinstance(rule, list) and len(rule) == len(pair)
        else rule
        for rule in value
    ]


def _overrides(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found = {}
    for key, spec in value.items():
        if isinstance(spec, dict) and set(spec) == {"spec"}:
            found[key] = spec_of(spec["spec"])
        else:
            found[key] = _fields(spec) if isinstance(spec, dict) else spec
    return found


def _module_type(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if not (set(value) == {"module", "name"} and all(isinstance(part, str) for part in value.values())):
        raise ValueError(f'rules: got {value!r} as a pattern; accepted: a name glob, {{"module": …, "name": …}}')
    found: Any = sys.modules.get(value["module"])
    for name in value["name"].split("."):
        found = getattr(found, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"rules: got the type {value['module']}.{value['name']}; accepted: a subclass of Module whose module is "
            "imported already"
        )
    return found
