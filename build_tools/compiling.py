"""Compiles one file at a time, and only where it or a file that it includes has changed."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools.errors import CompileError


def run(command: list[str]) -> None:
    """Runs a compiler or a linker. Raises CompileError, with all that it printed, where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(str(error)) from None
    if done.returncode:
        raise CompileError(f"{' '.join(command[:4])} … failed:\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)  # warnings


def read_for(built: Path) -> list[Path]:
    """The files that the compiler of an object read, which it listed in a depfile beside the object."""
    listed = built.with_suffix(".d").read_text().partition(":")[2].replace("\\\n", " ").strip()
    return [Path(file.replace("\\ ", " ")) for file in re.split(r"(?<!\\)\s+", listed)]


def state_of(files: list[Path]) -> str:
    """What changes when one of these files does: its contents in this tree, its time elsewhere (torch, the system)."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file} ".encode())
        digest.update(str(file.stat().st_mtime_ns).encode() if file.is_absolute() else file.read_bytes())
    return digest.hexdigest()


def is_current(built: Path) -> bool:
    """Whether an object was compiled from the files that it includes as they are now."""
    state = built.with_suffix(".state")
    try:
        return built.exists() and state.read_text() == state_of(read_for(built))
    except OSError:  # it was not finished, or includes a file that is gone
        return False


def tree_of(folder: str) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in Path(folder).rglob("*") if path.is_file())


def compile_if_stale(command: list[str], source: str, built: Path) -> str:
    """Makes the object ``built`` from a source, unless it is current; returns its name."""
    if not is_current(built):
        built.parent.mkdir(parents=True, exist_ok=True)
        state = built.with_suffix(".state")
        state.unlink(missing_ok=True)
        before = tree_of(Path(source).parts[0])
        unfinished = built.with_suffix(f".{os.getpid()}.part")
        run([*command, "-MD", "-MF", str(built.with_suffix(".d")), "-c", source, "-o", str(unfinished)])
        unfinished.replace(built)
        if tree_of(Path(source).parts[0]) == before:  # else a file was edited while the compiler read it
            state.write_text(state_of(read_for(built)))
    return str(built)
