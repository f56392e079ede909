"""A start waits for whatever passes, and says once what for."""

from __future__ import annotations

from typing import Any, cast

import pytest

from flanneld import startup
from flanneld.errors import FlannelError, KernelError, Unavailable
from flanneld.model.options import Options


@pytest.mark.parametrize(
    "refusal", [Unavailable("etcd at http://192.0.2.1:2379: no answer"), KernelError("read kernel tables", 4)]
)
async def test_what_passes_is_waited_for_and_told_once(
    refusal: FlannelError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Netlink's dumps are interrupted for as long as others change a host's devices, as at a boot with many pods."""
    failures = [refusal, refusal]

    async def attempt(*_: object) -> str:
        if failures:
            raise failures.pop()
        return "standing"

    monkeypatch.setattr(startup, "_attempt", attempt)
    monkeypatch.setattr(startup, "backoff", lambda **_: iter((0.0, 0.0)))
    shown: list[str] = []
    nothing = cast(Any, None)
    standing: object = await startup.start_up(Options(), nothing, nothing, nothing, nothing, shown.append)
    assert standing == "standing"
    assert shown == [str(refusal)]
    assert caplog.messages == [f"cannot start yet, trying again: {refusal}"]
