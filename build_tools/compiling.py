"""Compiles one file at a time, and only where it or a file that it includes has changed."""

import os
import re
import subprocess
import sys
import time
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


def is_current(built: Path) -> bool:
    """Whether an object is newer than every file that its compiler read, which the compiler listed beside it."""
    depfile = built.with_suffix(".d")
    if not built.exists() or not depfile.exists():
        return False
    read = re.split(r"(?<!\\)\s+", depfile.read_text().partition(":")[2].replace("\\\n", " ").strip())
    files = [Path(file.replace("\\ ", " ")) for file in read]
    return all(file.exists() and file.stat().st_mtime_ns <= built.stat().st_mtime_ns for file in files)


def compile_if_stale(command: list[str], source: str, built: Path) -> str:
    """Makes the object ``built`` from a source, unless it is current; returns its name."""
    if not is_current(built):
        built.parent.mkdir(parents=True, exist_ok=True)
        start = time.time_ns()  # the object's time, so that what is edited while the compiler runs makes it stale
        unfinished = built.with_suffix(f".{os.getpid()}.part")
        run([*command, "-MD", "-MF", str(built.with_suffix(".d")), "-c", source, "-o", str(unfinished)])
        os.utime(unfinished, ns=(start, start))
        unfinished.replace(built)
    return str(built)
