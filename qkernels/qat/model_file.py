"""A safetensors file with a description beside its tensors: written as a whole or not at all, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import replacing
from .spec import listed

KEY = "qkernels"  # of the description among the file's metadata
FORMAT = 1  # of the description that this version writes, and the newest that it reads
_UNSIGNED = "0" * 64  # stands for the digest while the digest is computed
_CHUNK = 1 << 24


def safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "qk.save and qk.load need the safetensors package; install it with: pip install 'qkernels[checkpoints]'"
        ) from error
    return safetensors


def write(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Writes a file beside ``path`` and renames it, so that ``path`` is at no time a part of a file.

    Args:
        tensors: contiguous, on the CPU, no two in one memory.
        description: JSON values. The file's has ``format``, ``min_reader`` (the oldest format whose readers understand
            it) and ``digest`` as well: SHA-256 of the whole file with zeros in the digest's place. ``tensors`` says
            what each tensor was, so that a reader can name one that was changed.
    """
    package = safetensors()
    written = {name: _facts(t) for name, t in tensors.items()}
    own = {"format": FORMAT, "min_reader": FORMAT, "digest": _UNSIGNED, "tensors": written}
    text = json.dumps({**own, **description})
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; safetensors makes files that their owner alone may read
        package.torch.save_file(tensors, partial, metadata={KEY: text})  # one key: the order of several is random
        partial.chmod(mode)
        with open(partial, "r+b") as file:
            file.seek(_place_of(partial, _UNSIGNED))
            file.write(_digest(partial, _UNSIGNED).encode())
            file.flush()
            os.fsync(file.fileno())
    if os.name == "posix":  # the new name too survives a loss of power
        folder = os.open(partial.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors, which are views of the file.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: no file that can be read.
        ValueError: not a whole file of ``write``, one of a newer version, or one that was changed.
    """
    package = safetensors()
    if path.is_dir():
        raise IsADirectoryError(f"path: got {str(path)!r}, a folder; accepted: a file that qk.save wrote")
    if not path.is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, where no file is; accepted: a file that qk.save wrote")
    if not os.access(path, os.R_OK):  # safetensors would say that there is no such file
        raise PermissionError(f"path: got {str(path)!r}, which this process may not read; accepted: a file that it may")
    try:
        with package.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it has no __iter__
    except package.SafetensorError as error:
        raise ValueError(
            f"path: {str(path)!r} is not a whole safetensors file ({error}); accepted: a file that qk.save wrote, so "
            "copy it again or save it again"
        ) from error
    if text is None:
        raise ValueError(
            f"path: {str(path)!r} is a safetensors file without the description that qk.save writes; accepted: a file "
            "of qk.save (qkernels.integrations.compressed_tensors.load reads checkpoints of compressed-tensors, and "
            "load_state_dict reads plain tensors)"
        )
    try:
        description = json.loads(text)
        format, oldest, digest = int(description["format"]), int(description["min_reader"]), str(description["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"path: {str(path)!r} has a description that cannot be read ({type(error).__name__}: {error}); accepted: "
            "a file as qk.save wrote it"
        ) from error
    if FORMAT < oldest <= format:
        raise ValueError(
            f"path: {str(path)!r} has format {format}, written by qkernels "
            f"{description.get('version')}; accepted by this version: formats up to {FORMAT}, so install that one or a "
            "later one"
        )
    if _digest(path, digest) != digest:
        raise ValueError(
            f"path: {str(path)!r} is not as it was written: its digest differs: "
            f"{listed(_changes(description.get('tensors'), tensors), '; ')}; accepted: a file that nothing has "
            "changed, so copy it again or save it again"
        )
    return description, tensors


def _facts(t: Tensor) -> dict[str, Any]:
    values: Any = t.detach().reshape(-1).view(torch.uint8).numpy()
    return {
        "dtype": str(t.dtype).removeprefix("torch."),
        "shape": list(t.shape),
        "digest": hashlib.sha256(values).hexdigest()[:16],  # against damage; against intent there is the file's
    }


def _changes(written: Any, tensors: dict[str, Tensor]) -> Iterator[str]:
    """What of a file whose digest differs is not as it was written."""
    if not isinstance(written, dict):
        yield "it does not say what its tensors were, as older files do not"
        return
    unchanged = True
    for name in dict.fromkeys((*written, *tensors)):
        if name not in tensors:
            yield f"the tensor {name!r} is missing"
        elif name not in written:
            yield f"the tensor {name!r} was not in it"
        elif (fact := _first_that_differs(_facts(tensors[name]), written[name])) is not None:
            yield f"the tensor {name!r} {fact}"
        else:
            continue
        unchanged = False
    if unchanged:
        yield "its tensors are as they were, its header is not"


def _first_that_differs(facts: dict[str, Any], written: Any) -> str | None:
    if not isinstance(written, dict):
        return "has no facts that can be read"
    for key, here in facts.items():
        if here != written.get(key):
            return "has other values" if key == "digest" else f"has {key} {here}, and had {written.get(key)}"
    return None


def _header(path: Path) -> bytes:
    """The first 8 bytes, which give the length of the JSON behind them, and this JSON."""
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _place_of(path: Path, digest: str) -> int:
    """Where in the file the digest is; the description is a string of JSON in JSON, so its quotes are escaped."""
    field = b'\\"digest\\": \\"'
    return _header(path).find(field + digest.encode()) + len(field)


def _digest(path: Path, digest: str) -> str:
    """SHA-256 of the file with zeros in place of the digest that it holds."""
    place = _place_of(path, digest)
    found = hashlib.sha256()
    with open(path, "rb") as file:
        found.update(file.read(place))
        found.update(_UNSIGNED.encode())
        file.seek(len(digest), os.SEEK_CUR)
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
