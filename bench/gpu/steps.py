"""Runs the steps of a GPU run, each a process within a limit of time, and publishes what there is after every one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import summary

ROOT = Path(__file__).parent.parent.parent
GPU_LOST = 3  # exit code of a benchmark after which a new process goes on with the rows that are left
LEAST = 5.0  # seconds below which a step is not begun
OUTPUTS = ("results.tar.gz", "table.md", "steps.json")


class Run:
    """``work`` takes the logs and the raw results; ``out`` only OUTPUTS, complete at any moment."""

    def __init__(self, work: Path, out: Path, machine: dict[str, Any]) -> None:
        self.work, self.out, self.machine = work, out, machine
        self.end = 0.0  # by time.monotonic()
        self.steps: list[dict[str, Any]] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def failed(self) -> bool:
        return any(str(step["outcome"]).startswith("FAILED") for step in self.steps)

    def step(self, name: str, command: list[str], seconds: float, *, optional: bool = False, **env: str) -> int | None:
        """Runs a command for at most ``seconds``, its output in <name>.log. The exit code; None: killed or not begun.

        An ``optional`` step may be left out or cut short for lack of time: that fails no run.
        """
        seconds = min(seconds, self.left())
        if seconds < LEAST:
            self.note(name, f"{'skipped' if optional else 'FAILED'}: no time left to begin it")
            return None
        start, log = time.monotonic(), self.work / f"{name}.log"
        with log.open("a") as sink:
            code = call(command, sink, seconds, env)
        lines = log.read_text(errors="replace").splitlines()
        outcome = "passed" if code == 0 else f"FAILED (exit code {code})"
        if code is None:
            outcome = f"FAILED: killed after {seconds:.0f} s"
            if optional and not any(line.startswith("FAILED") for line in lines):
                outcome = f"cut short after {seconds:.0f} s, nothing had failed"
        print("\n".join(f"    {line}" for line in lines[-3 if code == 0 else -40 :]), flush=True)
        self.note(name, outcome, time.monotonic() - start)
        return code

    def note(self, name: str, outcome: str, seconds: float = 0.0) -> None:
        self.steps.append({"step": name, "outcome": outcome, "seconds": round(seconds, 1)})
        print(f"{name}: {outcome} ({seconds:.0f} s)", flush=True)
        self.publish()

    def publish(self) -> None:
        """Each file replaced as a whole, so that a run ended from outside leaves the last state."""
        steps = json.dumps(self.steps, indent=1) + "\n"
        table = summary.table(self.machine, self.steps, sorted(self.work.glob("????-??-??-*.json")))
        for name, content in (("steps.json", steps), ("table.md", table)):
            (self.work / name).write_text(content)
            with replacing(self.out / name) as part:
                part.write_text(content)
        with replacing(self.out / "results.tar.gz") as part, tarfile.open(part, "w:gz") as archive:
            for path in sorted(self.work.iterdir()):
                archive.add(path, path.name)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` at the end."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    os.close(handle)
    try:
        yield Path(part)
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def call(command: list[str], sink: Any, seconds: float, env: dict[str, str]) -> int | None:
    """The exit code, or None where it was killed. No process that it started outlives it: they would slow the next."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **env},
        stdout=sink,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
