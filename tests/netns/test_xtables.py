"""The legacy tables' fingerprint against real tables of both families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flanneld.kernel import xtables
from flanneld.kernel.iptables import Iptables
from flanneld.model.addr import Family
from flanneld.plan.traffic_iptables import MASQUERADE, Place
from tests.support.firewall import BOTH, StandIns, ensure, use_variant
from tests.support.netns import Netns

pytestmark = [pytest.mark.kernel, pytest.mark.needs("iptables")]


@pytest.fixture
def ns() -> Iterator[Netns]:
    with Netns("fw-xt") as made:
        yield made


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))  # not to stand in the machine's way
    return StandIns(tmp_path, monkeypatch)


def fingerprint(ns: Netns, family: Family, place: Place = MASQUERADE) -> bytes | None:
    return ns.call(xtables.fingerprint, family, place.table, place.parent, place.chain)


@pytest.mark.parametrize("family", Family, ids=lambda f: f.label)
class TestFingerprint:
    def test_is_told_without_making_the_table(self, ns: Netns, family: Family) -> None:
        assert fingerprint(ns, family) is not None
        assert ns.call(xtables.tables, family) == frozenset()

    def test_stays_when_others_change_their_chains(self, ns: Netns, family: Family, stand_ins: StandIns) -> None:
        use_variant(stand_ins, "iptables-legacy")
        legacy = self._tool(ns, family)
        legacy("-t", "nat", "-N", "A-CHAIN")
        legacy("-t", "nat", "-A", "POSTROUTING", "-j", "A-CHAIN")
        ns.exec_async(ensure, Iptables(), *BOTH)
        before = fingerprint(ns, family)
        assert before
        for i in range(5):  # these move everything that stands behind in the kernel's blob
            legacy("-t", "nat", "-A", "A-CHAIN", "-p", "tcp", "--dport", str(i + 1), "-j", "ACCEPT")
        legacy("-t", "nat", "-A", "PREROUTING", "-m", "comment", "--comment", "FLANNEL-POSTRTG", "-j", "ACCEPT")
        legacy("-t", "nat", "-N", "FLANNEL-POSTRTG-X")
        assert fingerprint(ns, family) == before

    @pytest.mark.parametrize(
        "change",
        [
            "-D FLANNEL-POSTRTG 1",
            "-A FLANNEL-POSTRTG -j ACCEPT",
            "-R FLANNEL-POSTRTG 1 -j RETURN",
            "-F FLANNEL-POSTRTG",
            "-F POSTROUTING",
            "-R POSTROUTING 1 -j OTHER",
            "-I POSTROUTING -j ACCEPT",
            "-A POSTROUTING -j OTHER",
            "-E FLANNEL-POSTRTG RENAMED",
        ],
    )
    def test_changes_with_every_change_of_ours(
        self, ns: Netns, family: Family, stand_ins: StandIns, change: str
    ) -> None:
        use_variant(stand_ins, "iptables-legacy")
        ns.exec_async(ensure, Iptables(), *BOTH)
        legacy = self._tool(ns, family)
        legacy("-t", "nat", "-N", "OTHER")
        before = fingerprint(ns, family)
        legacy("-t", "nat", *change.split())
        assert fingerprint(ns, family) not in (None, before)

    @staticmethod
    def _tool(ns: Netns, family: Family) -> Callable[..., str]:
        stem = "iptables" if family is Family.V4 else "ip6tables"
        return lambda *argv: ns.run("/usr/sbin/xtables-legacy-multi", stem, *argv)
