"""Files that are whole or not there, and errors of the system that say which argument they are about."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside, the name of a file to write; then it takes the place of ``path``, which is at no time a part of a file.

    Raises:
        TypeError: path is no path.
        OSError: the file cannot be written; the text names it.
    """
    path = as_path(path)
    with named("path", path):
        target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
        partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            yield partial
            os.replace(partial, target)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


def as_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: got {path!r}; accepted: the path of a file")
    return Path(path)


@contextlib.contextmanager
def named(argument: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system inside gets a text that names the argument and its path."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        accepted = "a file that exists" if argument == "log" else "a file in a folder that exists and can be written to"
        text = f"{argument}: got {os.fspath(path)!r} ({error.strerror}); accepted: {accepted}"
        raise type(error)(error.errno, text) from error
