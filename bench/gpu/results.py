"""The rows of one benchmark: a JSON file rewritten at every step, so that nothing measured is lost to what follows."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steps import GPU_LOST

Row = dict[str, Any]
FAULT = 1  # exit code, beside GPU_LOST
UNFINISHED = "begun and not finished: the process was killed or died"
LABELS = ("case", "shape", "dtype", "group_size")


def reason_of(fault: Exception) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0][:200]


def tried(build: Callable[..., Any], *args: Any) -> Any:
    """What it builds, or why it cannot: libraries refuse sizes, GPUs and versions in ways of their own."""
    try:
        return build(*args)
    except Exception as fault:
        return reason_of(fault)


def blame(row: Row, fault: str) -> None:
    """Adds a fault of ours to a row: what fails the run in the end, but not the rows after it."""
    row["fault"] = "; ".join(filter(None, [row.get("fault"), fault]))


class Results:
    """``path`` None: in memory alone. ``end``: by time.monotonic(). ``resume``: go on after the rows in the file."""

    def __init__(self, path: Path | None, machine: dict[str, Any], end: float, resume: bool) -> None:
        self.path, self.machine, self.end = path, machine, end
        self.rows: list[Row] = []
        self.left = 0  # rows that time did not allow
        if resume and path is not None and path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    @property
    def faults(self) -> int:
        return sum("fault" in row for row in self.rows)

    def measure(self, row: Row, body: Callable[[Row], None]) -> Row | None:
        """``body`` fills the row in; what it raises is the row's fault. None: measured earlier, or out of time.

        Ends the process where the GPU answers nothing any more, as after an access to a wrong address.
        """
        if any(all(row.get(label) == old.get(label) for label in LABELS) for old in self.rows):
            return None
        if time.monotonic() > self.end:
            self.left += 1
            return None
        self.rows.append({**row, "fault": UNFINISHED})  # what a process says that hangs or dies here
        self.write()
        torch.manual_seed(0)
        try:
            body(row)
        except Exception as fault:
            traceback.print_exc()
            blame(row, f"{type(fault).__name__}: {reason_of(fault)}")
        self.rows[-1] = row
        self.write()
        if "fault" in row:
            print(f"FAULT {[row.get(label) for label in LABELS]}: {row['fault']}", flush=True)
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                print(f"the GPU is lost to this process: {reason_of(lost)}", flush=True)
                sys.exit(GPU_LOST)
        return row

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"machine": self.machine, "rows": self.rows, "out_of_time": self.left}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.replace(self.path)

    def finish(self) -> int:
        """Says how many there are; the exit code."""
        self.write()
        print(f"{len(self.rows)} rows, {self.faults} with a fault; {self.left} not begun for lack of time")
        return FAULT if self.faults else 0
