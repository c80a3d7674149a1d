"""The argument ``where``: names of layers, quantizers or weights, chosen by globs."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

from ..nn.quantizer_rules import nearest
from .spec import listed

Where = str | Sequence[str]


def chosen(where: Where, names: Collection[str], what: str, argument: str = "where") -> list[str]:
    """The names, in their order, that one of the globs matches.

    what: what has these names, for errors.

    Raises:
        TypeError: where is neither a text nor a list of texts.
        ValueError: a glob that matches none of the names, or no glob.
    """
    globs = [where] if isinstance(where, str) else where
    accepted = f"accepted: a glob, or a list of globs, on the names of {what}"
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{argument}: got {where!r}; {accepted}")
    found = {glob: [name for name in names if matches(glob, name)] for glob in globs}
    for glob in globs:
        if not found[glob]:
            known = listed(map(repr, names)) or "there are none"
            raise ValueError(f"{argument}: got {glob!r}; {accepted}: {known}{nearest(glob, names)}")
    if not found:
        raise ValueError(f"{argument}: got {where!r}; {accepted}")
    wanted = {name for some in found.values() for name in some}
    return [name for name in names if name in wanted]


def matches(glob: str, name: str) -> bool:
    """Whether the glob is the name itself, which may hold brackets, or matches it; ``*`` passes dots too."""
    return name == glob or fnmatch.fnmatchcase(name, glob)
