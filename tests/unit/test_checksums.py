"""Checksums that the card is to fill in (failures F03): when they are left to it, and what is told when they break."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

import pytest

from backends.vxlan_backend import VxlanBackend
from flanneld.contracts import Surroundings, Tunnel
from flanneld.duties.checksums import CALM_S, ENOUGH, Arrivals, ChecksumWatch
from flanneld.errors import ConfigError, KernelError
from flanneld.kernel import conntrack, nlmsg
from flanneld.kernel.udp_counters import bad_checksums
from flanneld.model.addr import IP, Family, Prefix, parse_ip
from flanneld.model.host import ExtIface
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.objects import Offload
from flanneld.model.state import State
from flanneld.plan.diff import plan
from flanneld.wake import Wake

OURS, PEER = parse_ip("198.18.0.1"), parse_ip("198.18.0.2")
EXT = ExtIface("eth0", 2, 1500, OURS, None, OURS, None)
AROUND = Surroundings(EXT, {Family.V4: Prefix.parse("10.5.1.0/24")}, "flanneld /coreos.com/network", (), False)
ON, OFF = Offload("flannel.1", True), Offload("flannel.1", False)


def conf(value: str = "") -> bytes:
    key = f',"TxChecksum":{value}' if value else ""
    return f'{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"{key}}}}}'.encode()


class Host:
    """A vxlan host with a configuration."""

    def __init__(self, value: str = "") -> None:
        self.backend = VxlanBackend(parse_netconf(conf(value)), {}, "0" * 32)
        self.path = self.backend.data_path(AROUND)

    def reconfigure(self, value: str) -> None:
        self.backend.reconfigure(parse_netconf(conf(value)), self.path)

    @property
    def wanted(self) -> list[Offload]:
        return list(self.path.desired.offloads.values())

    @property
    def tunnel(self) -> Tunnel:
        assert isinstance(self.path, Tunnel)
        return self.path


class TestSetting:
    @pytest.mark.parametrize(
        ("value", "wanted"), [("", []), ('"auto"', []), ('"on"', [ON]), ('"off"', [OFF]), ('"OFF"', [OFF])]
    )
    def test_the_offload_is_ours_only_when_somebody_has_said_what_it_is_to_be(
        self, value: str, wanted: list[Offload]
    ) -> None:
        assert Host(value).wanted == wanted

    @pytest.mark.parametrize("value", ['"no"', "false", "0"])
    def test_another_value_is_refused_with_the_remedy(self, value: str) -> None:
        with pytest.raises(ConfigError, match=r"^Backend\.TxChecksum (is|has).*(use one of auto, on, off|quotes)"):
            Host(value)

    def test_it_changes_live_and_back_to_auto_is_as_a_new_device_has_it(self) -> None:
        host = Host()
        for value, wanted in (('"off"', OFF), ('"on"', ON), ('"off"', OFF), ('"auto"', ON)):
            host.reconfigure(value)
            assert host.wanted == [wanted]

    def test_what_was_found_out_stays_until_the_operator_decides(self) -> None:
        host = Host()
        host.tunnel.distrust_card()
        host.path.configure(EXT._replace(mtu=1400))
        host.path.isolate(True)
        assert host.wanted == [OFF]
        assert not host.tunnel.may_distrust_card
        host.reconfigure('"on"')
        assert host.wanted == [ON]

    def test_a_device_made_anew_has_it_before_it_is_up(self) -> None:
        host = Host('"off"')
        there = State.of(host.path.desired)
        there.discard(host.path.desired.links["flannel.1"])
        ops = [str(op) for op in plan(host.path.desired, there, host.path.own)]
        made, up = (next(i for i, op in enumerate(ops) if f"{word} link flannel.1" in op) for word in ("create", "put"))
        assert made < ops.index("put offload tx-checksum-ip-generic off dev flannel.1") < up


class Table:
    """What the table of connections tells."""

    def __init__(self) -> None:
        self.flow: conntrack.Rewritten | None = None
        self.error: KernelError | None = None
        self.asked = 0

    def rewritten(self, source: IP, port: int) -> conntrack.Rewritten | None:
        assert (source, port) == (OURS, 8472)
        self.asked += 1
        if self.error:
            raise self.error
        return self.flow


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    made = Table()
    monkeypatch.setattr(conntrack, "rewritten", made.rewritten)
    return made


def look(host: Host, release: tuple[int, int] = (6, 1), times: int = 1) -> None:
    watch = ChecksumWatch(host.tunnel, lambda: [OURS], Wake(), lambda _: None, release)
    for _ in range(times):
        asyncio.run(watch.look())


class TestWatch:
    FLOW = conntrack.Rewritten((OURS, 40029), (PEER, 8472), (OURS, 7103), (PEER, 8472))

    def test_checksums_are_left_to_the_card_as_long_as_nothing_rewrites_tunnel_packets(self, table: Table) -> None:
        host = Host()
        look(host)
        assert table.asked
        assert host.wanted == []

    def test_rewritten_tunnel_packets_get_theirs_before_and_the_log_says_why(
        self, table: Table, caplog: pytest.LogCaptureFixture
    ) -> None:
        table.flow = self.FLOW
        host = Host()
        look(host, times=3)
        assert host.wanted == [OFF]
        [line] = caplog.messages
        assert "(198.18.0.1:40029 > 198.18.0.2:8472 leaves as 198.18.0.1:7103 > 198.18.0.2:8472)" in line
        assert "exempt UDP port 8472" in line

    def test_a_kernel_that_cannot_be_asked_is_not_trusted(self, table: Table) -> None:
        host = Host()
        look(host, release=(5, 4))
        assert host.wanted == [OFF]
        assert not table.asked

    @pytest.mark.parametrize(("value", "wanted"), [('"on"', ON), ('"off"', OFF)])
    def test_what_the_operator_has_said_is_not_overruled(self, table: Table, value: str, wanted: Offload) -> None:
        table.flow = self.FLOW
        host = Host(value)
        look(host)
        look(host, release=(4, 18))
        assert host.wanted == [wanted]

    def test_a_table_that_cannot_be_read_changes_nothing_and_is_told_once(
        self, table: Table, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        table.error = KernelError("look for rewritten tunnel packets", 95)
        host = Host()
        look(host, times=3)
        assert host.wanted == []
        assert len(caplog.messages) == 1


class TestArrivals:
    def test_a_streak_is_told_and_ends_when_it_is_calm(self) -> None:
        at, counted = 0.0, 5
        arrivals = Arrivals(lambda: counted, lambda: at)
        assert arrivals.look(8472) is None, "what was before us is none of our business"
        counted, at = 5 + ENOUGH, 10.0
        said = arrivals.look(8472)
        assert said is not None
        assert f"{ENOUGH} since" in said
        assert "port 8472" in said
        at += CALM_S
        assert arrivals.look(8472)
        at += 1
        assert arrivals.look(8472) is None

    def test_a_few_now_and_then_are_no_streak(self) -> None:
        at, counted = 0.0, 0
        arrivals = Arrivals(lambda: counted, lambda: at)
        for _ in range(ENOUGH * 2):
            at += 2 * CALM_S
            assert arrivals.look(8472) is None
            counted, at = counted + 1, at + 10
            assert arrivals.look(8472) is None


def test_wrong_checksums_of_both_families_are_counted(tmp_path: Path) -> None:
    (tmp_path / "snmp").write_text(
        "Tcp: InErrs InCsumErrors\nTcp: 9 9\n"
        "Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti\n"
        "Udp: 2151 0 3 7 0 0 3 0\nUdpLite: InDatagrams InCsumErrors\nUdpLite: 5 5\n"
    )
    assert bad_checksums(tmp_path) == 3, "IPv6 is switched off"
    (tmp_path / "snmp6").write_text("Udp6InErrors \t4\nUdp6InCsumErrors \t4\nUdpLite6InCsumErrors \t8\n")
    assert bad_checksums(tmp_path) == 7


REQUEST = bytes.fromhex(
    "48000000" "0101" "0103" "00000000" "00000000"  # nlmsghdr: 72 bytes, CTNETLINK GET, dump
    "02000000"  # nfgenmsg: AF_INET
    "1800" "0180" "1400" "0280" "0500" "0100" "11000000" "0600" "0300" "21180000"  # orig tuple: UDP, to port 8472
    "0c00" "1980" "0800" "0100" "28000000"  # filter: by protocol and target port
    "0800" "0300" "00000010" "0800" "1a00" "00000010"  # status and its mask: source NAT
)  # fmt: skip


def test_the_table_is_asked_for_rewritten_tunnel_packets_alone() -> None:
    assert conntrack.request(Family.V4, 8472, conntrack.IPS_SRC_NAT) == REQUEST


def entry(source: str, target: str, after: str) -> bytes:
    """One entry as the kernel sends it: UDP, from port 40029, which becomes 7103."""

    def nested(kind: int, payload: bytes) -> bytes:
        return nlmsg.attr(kind | nlmsg.NLA_F_NESTED, payload)

    def one(kind: int, a: str, b: str, ports: tuple[int, int]) -> bytes:
        size = len(parse_ip(a))
        addresses = nlmsg.attr(conntrack.CTA_IP_SRC[size], parse_ip(a)) + nlmsg.attr(
            conntrack.CTA_IP_DST[size], parse_ip(b)
        )
        protocol = nlmsg.attr(1, bytes((socket.IPPROTO_UDP,)))
        protocol += nlmsg.attr(2, struct.pack("!H", ports[0])) + nlmsg.attr(3, struct.pack("!H", ports[1]))
        return nested(kind, nested(1, addresses) + nested(2, protocol))

    status = nlmsg.attr(conntrack.CTA_STATUS, struct.pack("!I", 0x198))
    return bytes(4) + one(1, source, target, (40029, 8472)) + one(2, target, after, (8472, 7103)) + status


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (
            "198.18.0.1",
            "198.18.0.2",
            "198.18.0.1:40029 > 198.18.0.2:8472 leaves as 198.18.0.1:7103 > 198.18.0.2:8472",
        ),
        ("fd00::1", "fd00::2", "[fd00::1]:40029 > [fd00::2]:8472 leaves as [fd00::1]:7103 > [fd00::2]:8472"),
    ],
)
def test_an_entry_tells_the_flow_before_and_after(source: str, target: str, said: str) -> None:
    status, flow = conntrack.decode(memoryview(entry(source, target, source)))
    assert status & conntrack.IPS_SRC_NAT
    assert str(flow) == said


def test_an_entry_cut_short_anywhere_is_no_flow() -> None:
    whole = entry("198.18.0.1", "198.18.0.2", "198.18.0.1")
    for end in range(len(whole) - 12):
        assert conntrack.decode(memoryview(whole)[:end])[1] is None
