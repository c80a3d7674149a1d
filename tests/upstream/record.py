"""A pytest plugin: enters override_torch where that is asked for, and writes how each test ended as it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

OUTCOMES = Path(os.environ["QKERNELS_OUTCOMES"])
ended: dict[str, tuple[str, str]] = {}


def pytest_configure() -> None:
    if os.environ["QKERNELS_OVERRIDE"]:
        import torch

        import qkernels as qk

        qk.override_torch()
        assert torch.fake_quantize_per_tensor_affine(torch.tensor([float("nan")]), 1.0, 0, 0, 1).isnan().all()


def write(test: str, outcome: str, error: str = "") -> None:
    with OUTCOMES.open("a") as out:
        out.write(json.dumps([test, outcome, error]) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    write(nodeid, "crash or timeout")


def pytest_runtest_logreport(report: Any) -> None:
    """The first phase that did not pass says how the test ended; of a test in parts, the parts count as one."""
    outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
    if ended.get(report.nodeid, ("passed",))[0] == "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        ended[report.nodeid] = outcome, crash.message.partition("\n")[0] if crash else ""
    if report.when == "teardown":
        write(report.nodeid, *ended[report.nodeid])


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        write(report.nodeid, "not collected")
