"""Firewall rules by iptables, legacy and nf_tables, on a real kernel with real packets (contract 8.1 to 8.13, 8.20)."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flanneld.errors import KernelError
from flanneld.kernel import xtables
from flanneld.kernel.iptables import Iptables
from flanneld.model.addr import Family, Prefix
from tests.support.firewall import (
    ADDRESSES,
    BOTH,
    V4,
    VARIANTS,
    Bed,
    StandIns,
    bed,
    ensure,
    remove,
    saved_rules,
    source_seen,
    use_variant,
)
from tests.support.netns import Netns
from tests.support.packet_walk import PacketWalk
from tests.support.wait import until

pytestmark = [pytest.mark.kernel, pytest.mark.needs("iptables")]

FOREIGN = """\
*nat
:KUBE-POSTROUTING - [0:0]
-A POSTROUTING -m comment --comment "kubernetes \\"postrouting\\" rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
COMMIT
"""

MASQ = '-m comment --comment "flanneld masq"'
LISTED = [
    '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
    '-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    '-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG',
    '-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN',
    '-A FLANNEL-POSTRTG -s 10.5.1.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN',
    '-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.1.0/24 -m comment --comment "flanneld masq" -j RETURN',
    '-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.1.0/24 -m comment --comment "flanneld masq" -j RETURN',
    f"-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 {MASQ} -j MASQUERADE --random-fully",
    f"-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 {MASQ} -j MASQUERADE --random-fully",
]


@pytest.fixture
def ns() -> Iterator[Netns]:
    with Netns("fw-ipt") as made:
        yield made


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, stand_ins: StandIns) -> str:
    """The variant behind the name ``iptables`` on this host."""
    name = str(request.param)
    use_variant(stand_ins, name)
    return name


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))  # not to stand in the machine's way
    return StandIns(tmp_path, monkeypatch)


@pytest.fixture(scope="module", params=VARIANTS)
def masqueraded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """The drawing in tests/support/firewall.py with FORWARD dropping by policy and our rules on the host."""
    with bed() as made, pytest.MonkeyPatch.context() as patch:
        use_variant(StandIns(tmp_path_factory.mktemp("tools"), patch), request.param)
        for stem in ("iptables", "ip6tables"):
            made.host.run(f"/usr/sbin/{VARIANTS[request.param]}", stem, "-P", "FORWARD", "DROP")
        made.host.exec_async(ensure, Iptables(), *BOTH)
        yield made


class TestPackets(PacketWalk):
    """FORWARD drops by policy throughout: what arrives proves the forward rules, too (failures F08)."""


@pytest.mark.parametrize("iptables", VARIANTS)
def test_without_forward_rules_a_dropping_policy_stops_overlay_traffic(iptables: str, stand_ins: StandIns) -> None:
    """Shows that the tests above prove something, and that the switch works."""
    use_variant(stand_ins, iptables)
    with bed() as made:
        made.host.run(f"/usr/sbin/{VARIANTS[iptables]}", "iptables", "-P", "FORWARD", "DROP")
        made.host.exec_async(ensure, Iptables(), V4._replace(forward=False))
        assert source_seen(made.pod, made.far, ADDRESSES[Family.V4].far, wait_s=0.3) is None


def test_the_kernel_lists_flannels_rules(ns: Netns, variant: str) -> None:
    """Contract 8.2, 8.3, 8.5, as the end-to-end suite of flannel compares them."""
    ns.exec_async(ensure, Iptables(), V4)
    assert sorted(saved_rules(ns, variant)) == sorted(LISTED)


def test_jumps_stand_after_everybody_elses(ns: Netns, variant: str) -> None:
    """Contract 8.6."""
    ns.run(f"/usr/sbin/{VARIANTS[variant]}", "iptables-restore", stdin=FOREIGN)
    ns.exec_async(ensure, Iptables(), V4)
    parents = [line for line in saved_rules(ns, variant) if line.startswith(("-A POSTROUTING", "-A FORWARD"))]
    assert ["KUBE" in line for line in parents] == [True, False, True, False]


def test_quiet_ensure_changes_nothing_and_starts_no_process(ns: Netns, variant: str, stand_ins: StandIns) -> None:
    """Contract 11.43; failures F38, F39. Also while others change their chains, and packets are counted."""
    tool = f"/usr/sbin/{VARIANTS[variant]}"

    async def scenario() -> None:
        with closing(Iptables()) as rules:
            assert await rules.ensure(BOTH)
            before = stand_ins.calls()
            assert await rules.ensure(BOTH) == ()
            await asyncio.to_thread(ns.run, tool, "iptables", "-t", "nat", "-N", "KUBE-A")
            await asyncio.to_thread(
                ns.run, tool, "iptables", "-t", "nat", "-A", "KUBE-A", "-s", "192.0.2.1", "-j", "RETURN"
            )
            again = r"*nat\n:KUBE-A - [0:0]\n-A KUBE-A -s 192.0.2.2 -j RETURN\nCOMMIT\n"  # as kube-proxy does
            script = f"printf '{again}' | {tool} iptables-restore --noflush"
            await asyncio.to_thread(ns.run, "sh", "-c", script)
            await asyncio.to_thread(ns.call, send_to_self)
            assert await rules.ensure(BOTH) == ()
            assert stand_ins.calls() == before

    ns.exec_async(scenario)


def send_to_self() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"counted", ("127.0.0.1", 9))


DISTURBANCES = {
    "nat flushed": "-t nat -F",
    "jump deleted": "-t nat -F POSTROUTING",
    "chain emptied": "-t nat -F FLANNEL-POSTRTG",
    "forward flushed": "-F",
    "one rule deleted": "-t nat -D FLANNEL-POSTRTG 3",
    "one rule replaced": "-R FLANNEL-FWD 2 -d 192.0.2.0/24 -j ACCEPT",
    "rule added in front": "-I FLANNEL-FWD -j DROP",
    "second jump": "-A FORWARD -j FLANNEL-FWD",
}


@pytest.mark.parametrize("stem", ["iptables", "ip6tables"])
@pytest.mark.parametrize("disturbance", DISTURBANCES.values(), ids=DISTURBANCES)
def test_whatever_others_do_to_our_rules_is_undone_exactly(
    ns: Netns, variant: str, stem: str, disturbance: str
) -> None:
    """Failures F07; the legacy tables announce nothing, there it is the release of the xtables lock that wakes us."""
    if stem == "ip6tables":
        disturbance = disturbance.replace("192.0.2.0/24", "2001:db8::/32")

    async def scenario() -> None:
        wakes: list[str] = []
        with closing(Iptables()) as rules:
            rules.watch(wakes.append)
            await rules.ensure(BOTH)
            before = saved_rules(ns, variant, stem)
            assert await rules.ensure(BOTH) == ()
            wakes.clear()
            await asyncio.to_thread(ns.run, f"/usr/sbin/{VARIANTS[variant]}", stem, *disturbance.split())
            assert saved_rules(ns, variant, stem) != before
            await until(lambda: wakes, what="a wake")
            assert await rules.ensure(BOTH)
            assert saved_rules(ns, variant, stem) == before
            assert await rules.ensure(BOTH) == ()

    ns.exec_async(scenario)


@pytest.mark.parametrize("chain", ["-t nat -E FLANNEL-POSTRTG OTHER", "-E FLANNEL-FWD OTHER"])
def test_a_chain_of_ours_that_was_renamed_is_made_again_by_event(ns: Netns, variant: str, chain: str) -> None:
    """nftables announces the new name only. The renamed chain is another's now, and does nothing."""

    async def scenario() -> None:
        wakes: list[str] = []
        with closing(Iptables()) as rules:
            rules.watch(wakes.append)
            await rules.ensure(BOTH)
            assert await rules.ensure(BOTH) == ()
            before = saved_rules(ns, variant, "iptables")
            wakes.clear()
            await asyncio.to_thread(ns.run, f"/usr/sbin/{VARIANTS[variant]}", "iptables", *chain.split())
            await until(lambda: wakes, what="a wake")
            assert await rules.ensure(BOTH)
            after = saved_rules(ns, variant, "iptables")
            assert [line for line in after if "OTHER" not in line] == before
            assert not [line for line in after if "-j OTHER" in line]

    ns.exec_async(scenario)


def test_programs_that_use_legacy_tables_all_the_time_are_followed_at_a_bounded_rate(
    ns: Netns, stand_ins: StandIns, tmp_path: Path
) -> None:
    use_variant(stand_ins, "iptables-legacy")

    async def scenario() -> None:
        wakes: list[str] = []
        with closing(Iptables()) as rules:
            rules.watch(wakes.append)
            await rules.ensure(BOTH)
            assert await rules.ensure(BOTH) == ()
            wakes.clear()
            lock = tmp_path / "lock"
            for _ in range(1000):
                lock.open().close()
                await asyncio.sleep(0)
            await until(lambda: wakes, what="a wake")
            assert len(wakes) < 20
            lock.unlink()  # and made anew by the next one who wants it
            lock.touch()
            assert await rules.ensure(BOTH) == ()
            wakes.clear()
            lock.open().close()
            await until(lambda: wakes, what="a wake from the new file")

    ns.exec_async(scenario)


def test_the_number_of_rules_is_stable_over_many_repairs(ns: Netns, variant: str) -> None:
    """Contract 8.6: flannel re-appends its jumps at each start."""
    ns.run(f"/usr/sbin/{VARIANTS[variant]}", "iptables-restore", stdin=FOREIGN)
    ns.exec_async(ensure, Iptables(), V4)
    before = sorted(saved_rules(ns, variant))
    for turn in range(20):
        ns.run(
            f"/usr/sbin/{VARIANTS[variant]}",
            "iptables",
            "-t",
            "nat",
            "-F",
            ("POSTROUTING", "FLANNEL-POSTRTG")[turn % 2],
        )
        ns.exec_async(ensure, Iptables(), V4)
    foreign_lost = [line for line in before if line.startswith("-A POSTROUTING") and "KUBE" in line]
    assert sorted(saved_rules(ns, variant) + foreign_lost) == before


def test_rules_of_an_older_network_are_gone_after_start(ns: Netns, variant: str) -> None:
    """Contract 8.11, without needing to know what the older network was."""
    old = V4._replace(network=Prefix.parse("10.77.0.0/16"), subnet=Prefix.parse("10.77.3.0/24"))
    ns.exec_async(ensure, Iptables(), old)
    ns.exec_async(ensure, Iptables(), V4)
    assert sorted(saved_rules(ns, variant)) == sorted(LISTED)


def test_switched_off_features_leave_neither_chain_nor_jump(ns: Netns, variant: str) -> None:
    async def scenario() -> None:
        with closing(Iptables()) as rules:
            await rules.ensure(BOTH)
            await rules.ensure([V4._replace(masquerade=False)])

    ns.exec_async(scenario)
    assert sorted(saved_rules(ns, variant)) == sorted(line for line in LISTED if "forward" in line)
    assert saved_rules(ns, variant, "ip6tables") == []


def test_without_random_fully_in_the_tool_rules_are_set_without_it(
    ns: Netns, stand_ins: StandIns, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures F12."""
    use_variant(stand_ins, "iptables-nft")
    refuse = '[[ $input != *random-fully* ]] || { echo "unknown option --random-fully" >&2; exit 2; }'
    for stem in ("iptables", "ip6tables"):
        stand_ins.add(f"{stem}-restore", f"/usr/sbin/xtables-nft-multi {stem}-restore", refuse)
    quiet_without_random(ns, caplog)


def test_a_kernel_that_forgets_random_fully_does_not_make_rules_flap(
    ns: Netns, stand_ins: StandIns, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures F12: old kernels take the option and list the rule without it."""
    use_variant(stand_ins, "iptables-nft")
    for stem in ("iptables", "ip6tables"):
        real = f"/usr/sbin/xtables-nft-multi {stem}-restore"
        stand_ins.add(f"{stem}-restore", real, "input=${input// --random-fully/}")
    quiet_without_random(ns, caplog)


def quiet_without_random(ns: Netns, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with closing(Iptables()) as rules:
            assert await rules.ensure(BOTH)
            assert await rules.ensure(BOTH) == ()

    ns.exec_async(scenario)
    assert sorted(saved_rules(ns, "iptables-nft")) == sorted(line.replace(" --random-fully", "") for line in LISTED)
    assert [r.args[0] for r in caplog.records if r.levelno == logging.WARNING and isinstance(r.args, tuple)] == [
        "iptables",
        "ip6tables",
    ]


def test_refused_rules_are_one_sentence_and_the_other_family_is_set_all_the_same(
    ns: Netns, stand_ins: StandIns
) -> None:
    """Contract 8.12, 11.24: flannel called itself ready without its rules."""
    use_variant(stand_ins, "iptables-nft")
    stand_ins.add("iptables-restore", "true", 'echo "iptables-restore: line 3 failed" >&2; exit 1')
    with pytest.raises(
        KernelError, match=r"run iptables-restore --noflush -w: failed \(iptables-restore: line 3 failed\)"
    ):
        ns.exec_async(ensure, Iptables(), *BOTH)
    assert len(saved_rules(ns, "iptables-nft", "ip6tables")) == len(LISTED)


def test_a_held_xtables_lock_delays_rules_but_not_the_daemon(ns: Netns, stand_ins: StandIns, tmp_path: Path) -> None:
    """Failures F38."""
    use_variant(stand_ins, "iptables-legacy")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with closing(Iptables()) as rules, (tmp_path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            setting = asyncio.create_task(rules.ensure([V4]))
            await until(lambda: any("-restore" in call for call in stand_ins.calls()), what="iptables-restore")
            latest, worst = loop.time(), 0.0
            while loop.time() < latest + 0.3:
                before = loop.time()
                await asyncio.sleep(0)
                worst = max(worst, loop.time() - before)
            assert not setting.done()
            assert worst < 0.2
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert await setting

    ns.exec_async(scenario)


# -- two variants on one host (failures F09) ----------------------------------------------------------------


def other(variant: str) -> str:
    return next(name for name in VARIANTS if name != variant)


def test_our_rules_end_up_in_the_hosts_variant_only(ns: Netns, variant: str) -> None:
    ns.run(f"/usr/sbin/{VARIANTS[other(variant)]}", "iptables-restore", stdin=as_go_flanneld_leaves_it())
    ns.exec_async(ensure, Iptables(), V4)
    assert saved_rules(ns, other(variant)) == []
    assert sorted(saved_rules(ns, variant)) == sorted(LISTED)


def test_others_rules_in_the_other_variant_are_left_and_warned_of_once(
    ns: Netns, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    ns.run(f"/usr/sbin/{VARIANTS[other(variant)]}", "iptables-restore", stdin=FOREIGN)
    before = saved_rules(ns, other(variant))

    async def scenario() -> None:
        with closing(Iptables()) as rules:
            await rules.ensure(BOTH)
            await rules.ensure([V4])

    ns.exec_async(scenario)
    assert saved_rules(ns, other(variant)) == before
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"rules={other(variant)}={len(before)}" in warning


def as_go_flanneld_leaves_it() -> str:
    nat = "\n".join(line for line in LISTED if "masq" in line)
    forward = "\n".join(line for line in LISTED if "forward" in line)
    return f"*nat\n:FLANNEL-POSTRTG - [0:0]\n{nat}\nCOMMIT\n*filter\n:FLANNEL-FWD - [0:0]\n{forward}\nCOMMIT\n"


# -- no plain name, as in our image (contract 10.6) --------------------------------------------------------


@pytest.fixture
def no_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant, tables in VARIANTS.items():
        for stem in ("iptables", "ip6tables"):
            for suffix in ("", "-save", "-restore"):
                name = variant.replace("iptables", stem) + suffix
                (tmp_path / name).symlink_to(f"/usr/sbin/{tables}")
    (tmp_path / "ip").symlink_to(str(shutil.which("ip")))
    monkeypatch.setattr("flanneld.kernel.run.SBIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))


HINT = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"


@pytest.mark.usefixtures("no_plain_name")
@pytest.mark.parametrize("used", VARIANTS)
@pytest.mark.parametrize("evidence", [HINT, FOREIGN], ids=["kubelet's hint", "rules"])
def test_without_a_plain_name_the_hosts_rules_tell_the_variant(ns: Netns, used: str, evidence: str) -> None:
    ns.run(f"/usr/sbin/{VARIANTS[used]}", "iptables-restore", stdin=evidence)
    ns.exec_async(ensure, Iptables(), *BOTH)
    for stem in ("iptables", "ip6tables"):
        assert any("FLANNEL-POSTRTG" in rule for rule in saved_rules(ns, used, stem)), f"{stem} follows, though empty"
        assert not any("FLANNEL" in rule for rule in saved_rules(ns, other(used), stem))


@pytest.mark.usefixtures("no_plain_name")
def test_kubelets_hint_counts_for_more_than_rules(ns: Netns) -> None:
    ns.run("/usr/sbin/xtables-legacy-multi", "iptables-restore", stdin=HINT)
    ns.run("/usr/sbin/xtables-nft-multi", "iptables-restore", stdin=FOREIGN)
    ns.exec_async(ensure, Iptables(), V4)
    assert sorted(saved_rules(ns, "iptables-legacy")) == sorted(LISTED)


@pytest.mark.usefixtures("no_plain_name")
def test_without_a_plain_name_and_without_rules_it_is_nf_tables(ns: Netns) -> None:
    ns.exec_async(ensure, Iptables(), V4)
    assert sorted(saved_rules(ns, "iptables-nft")) == sorted(LISTED)
    assert ns.call(xtables.tables, Family.V4) == frozenset(), "to look makes no legacy tables"


# -- removal ------------------------------------------------------------------------------------------------


def test_remove_restores_what_was_there_before_us(ns: Netns, variant: str) -> None:
    """Failures F40."""
    tool = f"/usr/sbin/{VARIANTS[variant]}"
    ns.run(tool, "iptables-restore", stdin=FOREIGN)
    before = (saved_rules(ns, variant), chains(ns, variant))
    ns.exec_async(ensure, Iptables(), *BOTH)
    assert saved_rules(ns, variant) != before[0]
    ns.exec_async(remove, Iptables())
    assert (saved_rules(ns, variant), chains(ns, variant)) == before
    assert saved_rules(ns, variant, "ip6tables") == []
    assert ns.exec_async(remove, Iptables()) == []


def test_remove_takes_go_flannels_rules_from_both_variants_and_both_families(ns: Netns, variant: str) -> None:
    """Contract 8.20, 11.23: flannel's own clean-up leaves FLANNEL-FWD and the jumps. Very old ones had no chain."""
    old = f"*nat\n-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 {MASQ} -j MASQUERADE\nCOMMIT\n"
    old += '*filter\n-A FORWARD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT\nCOMMIT\n'
    for tables in VARIANTS.values():
        for stem in ("iptables", "ip6tables"):
            text = as_go_flanneld_leaves_it() + old
            if stem == "ip6tables":
                for v4, v6 in (
                    ("10.5.0.0/16", "fd00:5::/48"),
                    ("10.5.1.0/24", "fd00:5:0:1::/64"),
                    ("224.0.0.0/4", "ff00::/8"),
                ):
                    text = text.replace(v4, v6)
            ns.run(f"/usr/sbin/{tables}", f"{stem}-restore", "--noflush", stdin=text)
    ns.exec_async(remove, Iptables())
    left = [saved_rules(ns, v, stem) + chains(ns, v, stem) for v in VARIANTS for stem in ("iptables", "ip6tables")]
    assert left == [[], [], [], []]


def test_remove_makes_no_tables_where_there_are_none(ns: Netns, variant: str) -> None:
    """A legacy table that exists costs every packet, so to look must not make it."""
    assert ns.exec_async(remove, Iptables()) == []
    assert ns.call(xtables.tables, Family.V4) == frozenset()
    assert ns.run("nft", "list", "tables") == ""


def test_missing_iptables_is_an_error_only_for_who_needs_it(ns: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 8.20, 11.23: nftables mode ended with status 1 on hosts without iptables."""
    monkeypatch.setattr("flanneld.kernel.run.SBIN", "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert ns.exec_async(remove, Iptables()) == []
    assert ns.exec_async(ensure, Iptables()) == []
    assert ns.exec_async(ensure, Iptables(), V4._replace(masquerade=False, forward=False)) == []
    with pytest.raises(KernelError, match="apt-get install iptables"):
        ns.exec_async(ensure, Iptables(), V4)


def chains(ns: Netns, variant: str, stem: str = "iptables") -> list[str]:
    """Names of the user chains in both tables."""
    text = ns.run(f"/usr/sbin/{VARIANTS[variant]}", f"{stem}-save")
    return [line.split()[0] for line in text.splitlines() if line.startswith(":") and line.split()[1] == "-"]
