"""The kinds of calls of a forward: which arguments are given, and the values of those by which it may decide."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from torch import nn

KINDS = 16  # of calls for which a module keeps what it was traced to
GIVEN, DEFAULT = "given", "default"  # what a trace knows of an argument; else "is" and its value
Pattern = tuple[str, ...]
_FROZEN = (type(None), bool, str)  # types of arguments by which a forward decides; those derived have other values


class Arguments:
    """The arguments of a class's forward.

    Raises:
        NotImplementedError: it takes any number.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        _, *found = inspect.signature(kind.forward).parameters.values()
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found):
            raise NotImplementedError("its forward takes any number of arguments")
        self.names = [p.name for p in found]
        self.defaults = [p.default for p in found]
        self.by_position = sum(p.kind is not p.KEYWORD_ONLY for p in found)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Pattern, list[Any]] | None:
        """The pattern of a call, and the arguments that are given by it; None: they are not those of the forward."""
        names = self.names
        if len(args) > self.by_position:
            return None
        if kwargs:
            rest = names[len(args) :]
            if any(name not in rest for name in kwargs):
                return None
        pattern, values = [], []
        for i, name in enumerate(names):
            if i < len(args):
                value = args[i]
            elif name in kwargs:
                value = kwargs[name]
            elif self.defaults[i] is inspect.Parameter.empty:
                return None
            else:
                pattern.append(DEFAULT)
                continue
            pattern.append(_how(value, self.defaults[i]))
            if pattern[-1] == GIVEN:
                values.append(value)
        return tuple(pattern), values

    def pattern_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pattern:
        """The kinds of the arguments in a call that may leave some out, or stand for one with defaults alone."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        pattern = []
        for name, default in zip(self.names, self.defaults, strict=True):
            value = given.get(name, default)
            pattern.append(GIVEN if value is inspect.Parameter.empty else _how(value, default))
        return tuple(pattern)

    def described(self, pattern: Pattern) -> str:
        """What sets a pattern apart from a call without optional arguments, for a message."""
        plain = self.pattern_of((), {})
        which = [f"{name} {how}" for name, how, usual in zip(self.names, pattern, plain, strict=True) if how != usual]
        return f"with {', '.join(which)}" if which else "as it is called"

    def values(self, pattern: Pattern, given: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments by position and by name of a call with this pattern and these given ones."""
        rest, values = iter(given), []
        for default, how in zip(self.defaults, pattern, strict=True):
            if how == GIVEN:
                values.append(next(rest))
            else:
                values.append(default if how == DEFAULT else ast.literal_eval(how.removeprefix("is ")))
        count = self.by_position
        return values[:count], dict(zip(self.names[count:], values[count:], strict=True))


def _how(value: Any, default: Any) -> str:
    """What a trace knows of an argument with this value."""
    if value is default:
        return DEFAULT
    return f"is {value!r}" if type(value) in _FROZEN else GIVEN
