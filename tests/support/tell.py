"""``tell("booted in 3 s")``: what a test did, listed under its name at the end of pytest's report.

For tests whose worth is in what was really run. A conftest.py imports both names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

Tell: TypeAlias = Callable[[str], None]

_TOLD = "told"


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Say one thing that this test did or measured."""
    # with its report, which comes from whatever process the test runs in
    return lambda line: request.node.user_properties.append((_TOLD, line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = [(report, lines) for report in _calls(terminalreporter) if (lines := _lines(report))]
    if not told:
        return
    terminalreporter.section("what was done")
    for report, lines in told:
        markup = {"passed": {"green": True}, "failed": {"red": True}}.get(report.outcome, {})
        terminalreporter.write_line(report.nodeid, **markup)
        for line in lines:
            terminalreporter.write_line(f"    {line}")


def _lines(report: pytest.TestReport) -> list[str]:
    return [str(line) for kind, line in report.user_properties if kind == _TOLD]


def _calls(terminalreporter: pytest.TerminalReporter) -> list[pytest.TestReport]:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    return [report for report in reports if isinstance(report, pytest.TestReport) and report.when == "call"]
