"""A pytest plugin that prints each failure when it happens: a run that is killed has said what failed by then."""

from __future__ import annotations

import pytest


class FailuresAtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def say(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:  # the workers of xdist have none
            terminal.line("")
            terminal.write_line(f"FAILED {report.nodeid}")
            terminal.write_line(report.longreprtext)
            terminal.flush()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.say(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.say(report)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FailuresAtOnce(config))
