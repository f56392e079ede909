"""Rules of two networks in one kernel, by each tool and variant: nobody's go, and nothing runs when nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flanneld.contracts import TrafficManager, TrafficRules
from flanneld.kernel.iptables import Iptables
from flanneld.kernel.nft import Nftables
from flanneld.model.addr import Prefix
from flanneld.plan.rule_owner import Us
from tests.support.firewall import V4, V6, VARIANTS, StandIns, use_variant
from tests.support.netns import Netns

pytestmark = [pytest.mark.kernel, pytest.mark.needs("iptables", "nft")]

OTHER = TrafficRules(Prefix.parse("10.66.0.0/16"), Prefix.parse("10.66.7.0/24"), True, True, True)
FIRST, SECOND = Us.of("/first", [V4.network, V6.network]), Us.of("/second", [OTHER.network])
Make = Callable[[Us], TrafficManager]


@pytest.mark.parametrize("tool", [*VARIANTS, "nft"])
def test_two_daemons_rules_stand_side_by_side_and_nothing_runs_in_between(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))  # not to stand in the machine's way
    stand_ins = StandIns(tmp_path, monkeypatch)
    if tool == "nft":
        stand_ins.add("nft", "/usr/sbin/nft")
    else:
        use_variant(stand_ins, tool)
    make: Make = Nftables if tool == "nft" else Iptables

    async def scenario() -> None:
        with closing(make(FIRST)) as first, closing(make(SECOND)) as second:
            assert await first.ensure([V4, V6])
            assert await second.ensure([OTHER])
            await first.ensure([V4, V6])  # looks at what the other did
            calls = stand_ins.calls()
            for _ in range(3):
                assert await first.ensure([V4, V6]) == ()
                assert await second.ensure([OTHER]) == ()
            assert stand_ins.calls() == calls
            assert rules(ns, tool).count("10.5.0.0/16") > 4
            assert rules(ns, tool).count("10.66.0.0/16") > 4
            assert await first.remove()
            assert "10.5.0.0/16" not in rules(ns, tool)
            assert await second.ensure([OTHER]), "it moves into the place that is free now"
            assert rules(ns, tool).count(SECOND.mark) == 0
            assert await second.remove()
            assert "flannel" not in rules(ns, tool).lower()

    with Netns("fw-two") as ns:
        ns.exec_async(scenario)


def rules(ns: Netns, tool: str) -> str:
    if tool == "nft":
        return ns.run("/usr/sbin/nft", "list", "ruleset")
    return ns.run(f"/usr/sbin/{VARIANTS[tool]}", "iptables-save")
