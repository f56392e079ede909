"""``tell("booted in 3 s")``: what a test did, listed under its name at the end of pytest's report.

For tests whose worth is in what was really run. A conftest.py imports both names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

Tell: TypeAlias = Callable[[str], None]

_TOLD = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Say one thing that this test did or measured."""
    told = request.config.stash.setdefault(_TOLD, {})
    lines = told.setdefault(request.node.nodeid, [])
    return lines.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    told = {name: lines for name, lines in config.stash.get(_TOLD, {}).items() if lines}
    if not told:
        return
    outcome = {report.nodeid: report.outcome for report in _calls(terminalreporter)}
    terminalreporter.section("what was done")
    for name, lines in told.items():
        markup = {"passed": {"green": True}, "failed": {"red": True}}.get(outcome.get(name, ""), {})
        terminalreporter.write_line(name, **markup)
        for line in lines:
            terminalreporter.write_line(f"    {line}")


def _calls(terminalreporter: pytest.TerminalReporter) -> list[pytest.TestReport]:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    return [report for report in reports if isinstance(report, pytest.TestReport) and report.when == "call"]
