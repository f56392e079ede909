"""The daemon that has to begin anew with another subnet, where that fails (design/lease-protocol.md, "Moving")."""

from __future__ import annotations

import sys

import pytest

from flanneld import app
from flanneld.errors import ConfigError, LeaseMoved


def test_a_program_that_an_upgrade_took_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/bin/python")
    with pytest.raises(
        ConfigError, match=r"/nonexistent/bin/python cannot be run \(No such file or directory\), start"
    ):
        app._begin_anew(LeaseMoved("our subnet is another host's"))
