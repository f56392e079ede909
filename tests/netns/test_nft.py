"""Firewall rules by nftables, on a real kernel with real packets (contract 8.14 to 8.19)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flanneld.errors import KernelError
from flanneld.kernel.nft import Nftables
from flanneld.kernel.run import run
from tests.support.firewall import (
    BOTH,
    V4,
    Bed,
    StandIns,
    bed,
    ensure,
    nft_rules,
    nft_tables,
    remove,
)
from tests.support.netns import Netns
from tests.support.packet_walk import PacketWalk
from tests.support.wait import until

pytestmark = [pytest.mark.kernel, pytest.mark.needs("nft")]


@pytest.fixture
def ns() -> Iterator[Netns]:
    with Netns("fw-nft") as made:
        yield made


@pytest.fixture(scope="module")
def masqueraded() -> Iterator[Bed]:
    """The drawing in tests/support/firewall.py with our rules on the host."""
    with bed() as made:
        made.host.exec_async(ensure, Nftables(), *BOTH)
        yield made


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(tmp_path, monkeypatch)


async def listed() -> list[str]:
    """The whole ruleset; sorted, because a table made anew moves to the end."""
    return sorted((await run("nft", "list", "ruleset")).splitlines())


class TestPackets(PacketWalk):
    """The packets by our nft rules."""


def test_tables_are_flannels_own(ns: Netns) -> None:
    """Contract 8.14, 8.15, 8.18; 8.17 for fully-random."""
    ns.exec_async(ensure, Nftables(), V4)
    assert nft_rules(ns) == [
        "table ip flannel-ipv4 {",
        'comment "rules for flannel-ipv4"',
        "chain postrtg {",
        'comment "chain to manage traffic masquerading by flannel"',
        "type nat hook postrouting priority srcnat; policy accept;",
        "meta mark & 0x00004000 == 0x00004000 return",
        "ip saddr 10.5.1.0/24 ip daddr 10.5.0.0/16 return",
        "ip saddr 10.5.0.0/16 ip daddr 10.5.1.0/24 return",
        "ip saddr != 10.5.0.0/16 ip daddr 10.5.1.0/24 return",
        "ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
        "ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random",
        "}",
        "",
        "chain forward {",
        'comment "chain to accept flannel traffic"',
        "type filter hook forward priority filter; policy accept;",
        "ip saddr 10.5.0.0/16 accept",
        "ip daddr 10.5.0.0/16 accept",
        "}",
        "}",
        "table ip6 flannel-ipv6 {",
        'comment "rules for flannel-ipv6"',
        "}",
    ]


def test_quiet_ensure_changes_nothing_and_starts_no_process(ns: Netns, stand_ins: StandIns) -> None:
    """Failures F38, F39; also while others change their rules."""
    stand_ins.add("nft", "/usr/sbin/nft")

    async def scenario() -> None:
        with closing(Nftables()) as rules:
            assert len(await rules.ensure(BOTH)) == 2
            before = stand_ins.calls()
            assert await rules.ensure(BOTH) == ()
            foreign = await asyncio.create_subprocess_exec(
                "/usr/sbin/nft", "add table ip foreign; add chain ip foreign c"
            )
            await foreign.wait()
            assert await rules.ensure(BOTH) == ()
            assert stand_ins.calls() == before

    ns.exec_async(scenario)


def test_a_restarted_daemon_adopts_the_rules_it_finds(ns: Netns) -> None:
    ns.exec_async(ensure, Nftables(), *BOTH)
    before = nft_rules(ns)
    assert ns.exec_async(ensure, Nftables(), *BOTH) == []
    assert nft_rules(ns) == before


def test_rules_follow_a_changed_network(ns: Netns) -> None:
    async def scenario() -> None:
        with closing(Nftables()) as rules:
            await rules.ensure(BOTH)
            assert await rules.ensure([V4._replace(masquerade=False, fully_random=False)])

    ns.exec_async(scenario)
    text = "\n".join(nft_rules(ns))
    assert "masquerade" not in text
    assert "fd00:5" not in text
    assert "ip saddr 10.5.0.0/16 accept" in text


@pytest.mark.parametrize(
    "disturbance",
    [
        "flush ruleset",
        "delete table ip flannel-ipv4",
        "flush chain ip flannel-ipv4 postrtg",
        "insert rule ip6 flannel-ipv6 forward drop",
        "add chain ip flannel-ipv4 forward { policy drop; }",
        "add set ip flannel-ipv4 s { type ipv4_addr; }",
        "add table ip flannel-ipv4 { flags dormant; }",
    ],
)
def test_whatever_others_do_to_our_tables_wakes_us_and_is_undone(ns: Netns, disturbance: str) -> None:
    """Failures F07: flannel's nft rules stayed lost until the next start (contract 8.19)."""

    async def scenario() -> list[str]:
        wakes: list[str] = []
        with closing(Nftables()) as rules:
            rules.watch(wakes.append)
            await rules.ensure(BOTH)
            before = await listed()
            for times in range(1, 4):
                await run("nft", "-f", "-", stdin=disturbance)
                await until(lambda times=times: len(wakes) == times, what="a wake")  # type: ignore[misc]
                assert await rules.ensure(BOTH)
                assert await listed() == before
        return wakes

    assert ns.exec_async(scenario) == ["nftables rules changed"] * 3  # and none for our own repairs


def test_twenty_flushes_in_a_row_are_each_repaired_by_event(ns: Netns) -> None:
    async def scenario() -> None:
        woken = asyncio.Event()
        with closing(Nftables()) as rules:
            rules.watch(lambda reason: woken.set())
            await rules.ensure(BOTH)
            before = await listed()
            for _ in range(20):
                await run("nft", "flush", "ruleset")
                await asyncio.wait_for(woken.wait(), 5)
                woken.clear()
                await rules.ensure(BOTH)
            assert await listed() == before

    ns.exec_async(scenario)


def test_others_changing_their_own_rules_does_not_wake_us(ns: Netns) -> None:
    async def scenario() -> list[str]:
        wakes: list[str] = []
        with closing(Nftables()) as rules:
            rules.watch(wakes.append)
            await rules.ensure(BOTH)
            for _ in range(3):
                await run(
                    "nft", "-f", "-", stdin="add table ip x; add chain ip x y; add rule ip x y accept; flush table ip x"
                )
            # announcements come in order: once the change to our table is heard, all before it were
            await run("nft", "flush", "table", "ip", "flannel-ipv4")
            await until(lambda: wakes)
        return wakes

    assert ns.exec_async(scenario) == ["nftables rules changed"]


def test_lost_announcements_cost_one_look_and_no_repair_is_missed(ns: Netns) -> None:
    """The event socket overruns (ENOBUFS) when the loop is late."""

    async def scenario() -> None:
        with closing(Nftables()) as rules:
            await rules.ensure(BOTH)
            flood = "add table ip x; add chain ip x y\n" + "add rule ip x y ip daddr 192.0.2.1 accept\n" * 12000
            await run("nft", "-f", "-", stdin=flood)
            await run("nft", "-f", "-", stdin=flood)
            await run("nft", "flush", "table", "ip", "flannel-ipv4")
            assert await rules.ensure(BOTH) == ["replaced nftables table ip flannel-ipv4"]
            assert await rules.ensure(BOTH) == ()

    ns.exec_async(scenario)


def test_without_fully_random_in_the_tool_rules_are_set_without_it(ns: Netns, stand_ins: StandIns) -> None:
    """Failures F12: support is found out by trying, and its lack must not make rules flap."""
    stand_ins.add(
        "nft", "/usr/sbin/nft", '[[ $input != *fully-random* ]] || { echo "Error: syntax error" >&2; exit 1; }'
    )

    async def scenario() -> None:
        with closing(Nftables()) as rules:
            assert await rules.ensure(BOTH)
            assert await rules.ensure(BOTH) == ()

    ns.exec_async(scenario)
    text = "\n".join(nft_rules(ns))
    assert "masquerade" in text
    assert "fully-random" not in text


def test_refused_rules_are_one_sentence_and_the_old_ones_stay(ns: Netns, stand_ins: StandIns) -> None:
    ns.exec_async(ensure, Nftables(), V4)
    before = nft_rules(ns)
    stand_ins.add("nft", "/usr/sbin/nft", '[[ -z $input ]] || { echo "Error: Operation not permitted" >&2; exit 1; }')
    with pytest.raises(KernelError, match=r"run nft -f -: failed .*Operation not permitted"):
        ns.exec_async(ensure, Nftables(), *BOTH)
    assert nft_rules(ns) == before


def test_remove_deletes_our_tables_and_no_others(ns: Netns) -> None:
    ns.run("nft", "add table ip foreign; add table ip6 flannel-ipv4")
    ns.exec_async(ensure, Nftables(), *BOTH)
    assert len(ns.exec_async(remove, Nftables())) == 2
    assert nft_tables(ns) == {"foreign", "flannel-ipv4"}
    assert ns.exec_async(remove, Nftables()) == []


def test_missing_nft_is_an_error_only_for_who_needs_it(ns: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 8.20, 11.23."""
    monkeypatch.setattr("flanneld.kernel.run.SBIN", "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert ns.exec_async(remove, Nftables()) == ()
    with pytest.raises(KernelError, match="apt-get install nftables"):
        ns.exec_async(ensure, Nftables(), *BOTH)
