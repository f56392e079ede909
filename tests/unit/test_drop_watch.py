"""Rules that cannot be read for a while are looked at when they can be, though nothing changes then (F08)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from flanneld.duties import foreign_drop
from flanneld.duties.foreign_drop import DropWatch
from flanneld.errors import KernelError
from flanneld.kernel import nft
from flanneld.model.addr import Family, Prefix
from flanneld.plan.foreign_drop import walks
from tests.support.wait import until

CHAIN = {"family": "inet", "table": "filter", "name": "forward", "hook": "forward", "policy": "drop"}


class Silent:
    """A kernel in which no rule changes."""

    def __init__(self, _concerns: object) -> None:
        pass

    def watch(self, wake: object) -> None:
        pass

    def version(self, _family: Family) -> int:
        return 0

    def close(self) -> None:
        pass


async def test_a_failed_look_is_repeated_without_any_change(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [KernelError("run nft", 11), KernelError("run nft", 110)]

    async def chains() -> Sequence[object]:
        if failures:
            raise failures.pop()
        return [{"chain": CHAIN}]

    async def rules(_name: tuple[str, str]) -> Sequence[object]:
        return [{"chain": CHAIN}]

    monkeypatch.setattr(nft, "list_chains", chains)
    monkeypatch.setattr(nft, "list_rules", rules)
    monkeypatch.setattr(foreign_drop, "NftEvents", Silent)
    monkeypatch.setattr(foreign_drop, "SETTLE_S", 0.0)
    monkeypatch.setattr(foreign_drop, "GAPS_S", (0.0, 0.01))
    shown: list[Sequence[str]] = []
    packets = walks(Prefix.parse("10.5.0.0/16"), Prefix.parse("10.5.7.0/24"), frozenset({"flannel.1"}))
    ready = asyncio.Event()
    ready.set()
    task = asyncio.create_task(DropWatch(lambda: packets, shown.append).run(ready))
    await until(lambda: bool(shown), what="the rule's name")
    task.cancel()
    assert "nftables table inet filter drops" in shown[0][0]
