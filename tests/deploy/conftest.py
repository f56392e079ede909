"""Tests of the ways the daemon gets onto a machine; `make test-deploy` installs what they need and runs them."""

from __future__ import annotations

from tests.support.tell import pytest_terminal_summary, tell

__all__ = ["pytest_terminal_summary", "tell"]
