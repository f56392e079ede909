"""Choice of the external interface: contract section 5, failures F32 to F34.

The host of most tests, five interfaces besides lo::

    lo      127.0.0.1 ::1
    eth0    10.0.2.15 (the same on every Vagrant host)   fe80::1
    eth1    192.0.2.11 192.0.2.12                        2001:db8:1::11
    eth2    198.51.100.5 (DHCP)                          2001:db8:2::5 and privacy, deprecated, fe80 ones
    wlan0   down, 203.0.113.9
    flannel.1  ours, 10.5.1.0
"""

from __future__ import annotations

import pytest

from flanneld.errors import ConfigError
from flanneld.model.addr import Family, format_ip, parse_ip
from flanneld.model.host import AddrInfo, DefaultRoute, ExtIface, HostNet, IfaceWish, LinkInfo, Reach
from flanneld.plan.extiface import follow, select

V4, V6 = Family.V4, Family.V6
DUAL = (V4, V6)
OURS = frozenset({"flannel.1"})


def addr(
    ifindex: int, text: str, *, deprecated: bool = False, temporary: bool = False, permanent: bool = True
) -> AddrInfo:
    ip = parse_ip(text)
    return AddrInfo(ifindex, ip, 24 if len(ip) == 4 else 64, deprecated, temporary, permanent)


LINKS = (
    LinkInfo("lo", 1, 65536, True),
    LinkInfo("eth0", 2, 1500, True),
    LinkInfo("eth1", 3, 9000, True),
    LinkInfo("eth2", 4, 1400, True),
    LinkInfo("wlan0", 5, 1500, False),
    LinkInfo("flannel.1", 6, 1450, True),
)
ADDRS = (
    addr(1, "127.0.0.1"),
    addr(2, "10.0.2.15"),
    addr(3, "192.0.2.11"),
    addr(3, "192.0.2.12"),
    addr(4, "198.51.100.5", permanent=False),
    addr(5, "203.0.113.9"),
    addr(6, "10.5.1.0"),
    addr(1, "::1"),
    addr(2, "fe80::1"),
    addr(3, "2001:db8:1::11"),
    addr(4, "fe80::4"),
    addr(4, "2001:db8:2::dead", deprecated=True),
    addr(4, "2001:db8:2::77", temporary=True, permanent=False),
    addr(4, "2001:db8:2::5", permanent=False),
)
NET = HostNet(
    LINKS,
    ADDRS,
    (
        DefaultRoute(V4, 2, parse_ip("10.0.2.2"), 0),
        DefaultRoute(V4, 4, parse_ip("198.51.100.1"), 100),
        DefaultRoute(V6, 4, parse_ip("fe80::ff"), 1024),
    ),
    {
        parse_ip("192.0.2.200"): Reach(3, parse_ip("192.0.2.12")),
        parse_ip("10.5.7.7"): Reach(6, parse_ip("10.5.1.0")),
        parse_ip("10.0.2.15"): Reach(1, parse_ip("10.0.2.15")),
        parse_ip("2001:db8:2::200"): Reach(4, parse_ip("2001:db8:2::5")),
        parse_ip("203.0.113.200"): Reach(5, None),
    },
)


def shown(iface: ExtIface) -> str:
    """``name local[,local6] [as public[,public6]]``."""
    local = ",".join(format_ip(ip) for ip in (iface.ip, iface.ip6) if ip)
    public = ",".join(format_ip(ip) for ip in (iface.public_ip, iface.public_ip6) if ip)
    return f"{iface.name} {local}" + (f" as {public}" if public != local else "")


def wish(*iface: str, regex: tuple[str, ...] = (), reach: str = "", public: str = "", public6: str = "") -> IfaceWish:
    return IfaceWish(iface, regex, reach, public, public6)


@pytest.mark.parametrize(
    ("families", "asked", "expected"),
    [
        # 5.2, 5.8: nothing asked
        ((V4,), wish(), "eth0 10.0.2.15"),
        ((V6,), wish(), "eth2 2001:db8:2::5"),
        # 5.2: a bare public address must be local and names the interface
        ((V4,), wish(public="192.0.2.12"), "eth1 192.0.2.12"),
        (DUAL, wish(public="192.0.2.12"), "eth1 192.0.2.12,2001:db8:1::11"),
        (DUAL, wish(public6="2001:db8:1::11"), "eth1 192.0.2.11,2001:db8:1::11"),
        ((V6,), wish(public="10.0.2.15", public6="2001:db8:1::11"), "eth1 2001:db8:1::11"),
        ((V6,), wish(public="10.0.2.15"), "eth2 2001:db8:2::5"),
        # 5.4: name or address
        ((V4,), wish("eth1"), "eth1 192.0.2.11"),
        ((V4,), wish("192.0.2.12"), "eth1 192.0.2.12"),
        ((V6,), wish("2001:db8:2::77"), "eth2 2001:db8:2::77"),
        ((V4,), wish("wlan0"), "wlan0 203.0.113.9"),
        (DUAL, wish("192.0.2.12"), "eth1 192.0.2.12,2001:db8:1::11"),
        (DUAL, wish("198.51.100.5", public6="2001:db8:2::77"), "eth2 198.51.100.5,2001:db8:2::77"),
        (DUAL, wish("2001:db8:2::5", public6="2001:db8:1::11"), "eth1 192.0.2.11,2001:db8:1::11"),
        # 5.5, 5.14: flannel crashes, or takes the address for an IPv4 one
        (DUAL, wish("2001:db8:1::11"), "eth1 192.0.2.11,2001:db8:1::11"),
        ((V6,), wish("2001:db8:1::11"), "eth1 2001:db8:1::11"),
        # 5.3, 5.11, F34: the advertised address is another matter than the local one
        ((V4,), wish("eth0", public="203.0.113.77"), "eth0 10.0.2.15 as 203.0.113.77"),
        (DUAL, wish("eth1", public6="2001:db8::77"), "eth1 192.0.2.11,2001:db8:1::11 as 192.0.2.11,2001:db8::77"),
        (DUAL, wish("192.0.2.11", public6="2001:db8::77"), "eth1 192.0.2.11,2001:db8:1::11 as 192.0.2.11,2001:db8::77"),
        # 5.13: unless it is local: then we send from it, too
        ((V4,), wish("eth1", public="192.0.2.12"), "eth1 192.0.2.12"),
        ((V4,), wish("192.0.2.11", public="192.0.2.12"), "eth1 192.0.2.11 as 192.0.2.12"),
        # 5.3: in order, the first that works
        ((V4,), wish("eth9", "eth2", "eth1"), "eth2 198.51.100.5"),
        ((V4,), wish("eth9", regex=("nothing", "^198"), reach="192.0.2.200"), "eth2 198.51.100.5"),
        ((V4,), wish("eth9", regex=("nothing",), reach="192.0.2.200"), "eth1 192.0.2.12"),
        (DUAL, wish("eth0", "wlan0", "eth1"), "eth0 10.0.2.15,fe80::1"),
        (DUAL, wish("wlan0", "eth1"), "eth1 192.0.2.11,2001:db8:1::11"),
        # 5.6: unanchored, addresses in the order of interfaces, then names
        ((V4,), wish(regex=(r"\.0\.2",)), "eth0 10.0.2.15"),
        ((V4,), wish(regex=(r"\.12$",)), "eth1 192.0.2.12"),
        ((V4,), wish(regex=("eth[12]",)), "eth1 192.0.2.11"),
        ((V4,), wish(regex=("(", "eth2")), "eth2 198.51.100.5"),
        (DUAL, wish(regex=(r"198\.|2001:db8:2",)), "eth2 198.51.100.5,2001:db8:2::5"),
        (DUAL, wish(regex=("^198",), reach="192.0.2.200"), "eth1 192.0.2.12,2001:db8:1::11"),
        ((V4,), wish(regex=("^(203|198)",)), "eth2 198.51.100.5"),
        ((V4,), wish(regex=("^203",)), "wlan0 203.0.113.9"),
        # our own devices and lo are passed over
        ((V4,), wish(regex=(r"^10\.5|^127", "lo|flannel", r"^10\.")), "eth0 10.0.2.15"),
        # 5.7: interface and source as the kernel would choose
        ((V4,), wish(reach="192.0.2.200"), "eth1 192.0.2.12"),
        (DUAL, wish(reach="2001:db8:2::200"), "eth2 198.51.100.5,2001:db8:2::5"),
        ((V4,), wish(reach="2001:db8:2::200"), "eth2 198.51.100.5"),
        ((V4,), wish(reach="203.0.113.200"), "wlan0 203.0.113.9"),
    ],
)
def test_interface_and_addresses_chosen(families: tuple[Family, ...], asked: IfaceWish, expected: str) -> None:
    chosen, why = select(NET, asked, families, OURS)
    assert shown(chosen) == expected
    assert why.startswith(f"external interface {chosen.name} by ")
    assert "\n" not in why
    link = NET.link(chosen.name)
    assert link
    assert (chosen.ifindex, chosen.mtu) == (link.ifindex, link.mtu)


@pytest.mark.parametrize(
    ("families", "asked", "reason"),
    [
        (DUAL, wish(), "default route (the families differ: IPv4 through eth0, IPv6 through eth2)"),
        ((V4,), wish(public="203.0.113.77"), "--public-ip=203.0.113.77 (no interface has that address; behind NAT"),
        ((V4,), wish(public="10.5.1.0"), "--public-ip=10.5.1.0 (flannel.1 is flanneld's own device)"),
        ((V4,), wish("eth9"), "--iface=eth9 (there is no interface of that name)"),
        ((V4,), wish("10.9.9.9"), "--iface=10.9.9.9 (no interface has that address)"),
        ((V4,), wish("127.0.0.1"), "(peers cannot send to such an address)"),
        ((V4,), wish("2001:db8:1::11"), "(the network has no IPv6)"),
        ((V4,), wish("lo"), "--iface=lo (lo has no usable IPv4 address)"),
        ((V4,), wish("flannel.1"), "(flannel.1 is flanneld's own device)"),
        (DUAL, wish("wlan0"), "--iface=wlan0 (wlan0 has no usable IPv6 address)"),
        (DUAL, wish("10.0.2.15", public6="2001:db8:1::11"), "is on eth0, but --public-ipv6=2001:db8:1::11 is on eth1"),
        ((V4,), wish(regex=("[",)), "--iface-regex=[ (not a regular expression: "),
        ((V4,), wish(regex=("^172",)), "--iface-regex=^172 (it matches no usable address and no name"),
        ((V4,), wish(reach="host.example"), "--iface-can-reach=host.example (not an IP address)"),
        ((V4,), wish(reach="192.0.2.99"), "(the kernel has no route to it)"),
        ((V4,), wish(reach="10.5.7.7"), "(the kernel would send through flannel.1)"),
        ((V4,), wish(reach="10.0.2.15"), "(the kernel would send through lo)"),
        ((V4,), wish(public="2001:db8::1"), "--public-ip=2001:db8::1 is not an IPv4 address"),
        ((V4,), wish("eth1", public="192.0.2.300"), "--public-ip=192.0.2.300 is not an IPv4 address"),
        ((V4,), wish("eth1", public6="192.0.2.3"), "--public-ipv6=192.0.2.3 is not an IPv6 address"),
    ],
)
def test_refusal_says_what_was_tried(families: tuple[Family, ...], asked: IfaceWish, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select(NET, asked, families, OURS)
    assert reason in str(caught.value)


def test_refusal_lists_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        select(NET, wish("eth9", "eth8"), (V4,), OURS)
    assert str(caught.value) == (
        "no external interface found: tried --iface=eth9 (there is no interface of that name), "
        "--iface=eth8 (there is no interface of that name); available: eth0 (10.0.2.15), "
        "eth1 (192.0.2.11 192.0.2.12), eth2 (198.51.100.5), wlan0 (203.0.113.9, down), flannel.1 (10.5.1.0); "
        "name one with --iface"
    )


def test_decision_is_told_with_everything_that_failed_before() -> None:
    _, why = select(NET, wish("eth9", regex=("^192",), public="203.0.113.77"), (V4,), OURS)
    assert why == (
        "external interface eth1 by --iface-regex=^192: IPv4 192.0.2.11 advertised as 203.0.113.77, MTU 9000; "
        "tried before: --iface=eth9 (there is no interface of that name)"
    )


def test_default_route_of_a_host_tool_on_our_own_device_is_no_default_route() -> None:
    net = NET._replace(defaults=(DefaultRoute(V4, 6, None, 0), DefaultRoute(V4, 3, None, 100)))
    assert shown(select(net, wish(), (V4,), OURS)[0]) == "eth1 192.0.2.11"


def test_lowest_metric_wins_and_the_first_among_equals() -> None:
    net = NET._replace(defaults=(DefaultRoute(V4, 2, None, 200), DefaultRoute(V4, 4, None, 100)))
    assert select(net, wish(), (V4,), OURS)[0].name == "eth2"
    net = NET._replace(defaults=(DefaultRoute(V4, 3, None, 100), DefaultRoute(V4, 4, None, 100)))
    assert select(net, wish(), (V4,), OURS)[0].name == "eth1"


@pytest.mark.parametrize(
    ("defaults", "reason"),
    [
        ((), "there is none for IPv4"),
        ((DefaultRoute(V4, 0, None, 0),), "the one for IPv4 has several next hops"),
    ],
)
def test_default_route_that_names_no_interface_is_refused(defaults: tuple[DefaultRoute, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        select(NET._replace(defaults=defaults), wish(), (V4,), OURS)


def test_interface_without_mtu_is_refused() -> None:
    net = NET._replace(links=(LinkInfo("eth1", 3, 0, True),))
    with pytest.raises(ConfigError, match="eth1 has no MTU"):
        select(net, wish("eth1"), (V4,), OURS)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        # 5.9, in the order of weight
        (addr(3, "192.0.2.1", permanent=False), addr(3, "169.254.1.1")),
        (addr(3, "2001:db8::1", temporary=True, permanent=False), addr(3, "fe80::1")),
        (addr(3, "192.0.2.2"), addr(3, "192.0.2.1", permanent=False)),
        (addr(3, "2001:db8::2", permanent=False), addr(3, "2001:db8::1", permanent=False, temporary=True)),
        (addr(3, "169.254.1.1"), addr(3, "192.0.2.1", deprecated=True)),
        (addr(3, "fe80::1"), addr(3, "2001:db8::1")._replace(duplicate=True)),
        (addr(3, "192.0.2.2"), addr(3, "224.0.0.9")),
        (addr(3, "192.0.2.2"), addr(3, "127.0.0.9")),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_better_address_is_taken_in_whatever_order(better: AddrInfo, worse: AddrInfo, swapped: bool) -> None:
    net = NET._replace(addrs=(better, worse) if swapped else (worse, better))
    family = V4 if len(better.ip) == 4 else V6
    assert select(net, wish("eth1"), (family,))[0].local(family) == better.ip


def test_kernel_flag_of_secondary_ipv4_address_is_not_taken_for_temporary() -> None:
    assert AddrInfo.from_kernel(3, parse_ip("192.0.2.1"), 24, 0x81) == addr(3, "192.0.2.1")
    assert AddrInfo.from_kernel(3, parse_ip("2001:db8::1"), 64, 0x21) == addr(
        3, "2001:db8::1", deprecated=True, temporary=True, permanent=False
    )
    assert AddrInfo.from_kernel(3, parse_ip("2001:db8::1"), 64, 0x88).duplicate


class TestFollow:
    """F33: addresses and MTU change while we run; the interface's name does not."""

    def chosen(self, asked: IfaceWish, families: tuple[Family, ...] = (V4,)) -> ExtIface:
        return select(NET, asked, families, OURS)[0]

    def follow(
        self, asked: IfaceWish, *addrs: AddrInfo, families: tuple[Family, ...] = (V4,), mtu: int = 9000
    ) -> str | None:
        net = NET._replace(addrs=addrs, links=(LINKS[0], LinkInfo("eth1", 30, mtu, True)))
        now = follow(self.chosen(asked, families), net, asked, families)
        return shown(now) if now else None

    @pytest.mark.parametrize(
        "asked", [wish(), wish("eth1"), wish("192.0.2.12"), wish(regex=("eth2",)), wish(reach="192.0.2.200")]
    )
    def test_nothing_changes_when_nothing_changed(self, asked: IfaceWish) -> None:
        before = self.chosen(asked)
        assert follow(before, NET, asked, (V4,)) == before

    def test_address_stays_when_a_better_one_is_added(self) -> None:
        before = self.chosen(wish("eth2"))
        net = NET._replace(addrs=(addr(4, "198.51.100.1"), *ADDRS))
        assert select(net, wish("eth2"), (V4,))[0] != before
        assert follow(before, net, wish("eth2"), (V4,)) == before

    def test_changed_address_is_taken_and_advertised(self) -> None:
        assert self.follow(wish("eth1"), addr(30, "192.0.2.40")) == "eth1 192.0.2.40"

    def test_advertised_address_of_a_nat_stays(self) -> None:
        asked = wish("eth1", public="203.0.113.77")
        assert self.follow(asked, addr(30, "192.0.2.40")) == "eth1 192.0.2.40 as 203.0.113.77"

    def test_regex_still_says_which_of_the_new_addresses_is_meant(self) -> None:
        asked = wish(regex=(r"^192\.0\.2\.",))
        assert self.follow(asked, addr(30, "10.1.1.1"), addr(30, "192.0.2.40")) == "eth1 192.0.2.40"

    def test_named_address_is_taken_back_when_it_returns(self) -> None:
        asked = wish("192.0.2.12")
        other = self.chosen(wish("192.0.2.11"))
        now = follow(other, NET, asked, (V4,))
        assert now
        assert shown(now) == "eth1 192.0.2.12"

    def test_global_address_is_not_given_up_for_a_link_local_one(self) -> None:
        assert self.follow(wish("eth1"), addr(30, "fe80::9"), families=(V6,)) is None
        assert self.follow(wish("eth1"), addr(30, "169.254.3.3")) is None

    def test_deprecated_address_is_left_for_a_fresh_one_and_kept_without(self) -> None:
        old = addr(30, "192.0.2.11", deprecated=True)
        assert self.follow(wish("eth1"), old, addr(30, "192.0.2.40")) == "eth1 192.0.2.40"
        assert self.follow(wish("eth1"), old) == "eth1 192.0.2.11"

    def test_address_of_another_interface_is_not_borrowed(self) -> None:
        assert self.follow(wish("eth1"), addr(2, "10.0.2.15"), addr(2, "192.0.2.11")) is None

    def test_source_on_lo_that_the_kernel_prefers_is_kept(self) -> None:
        ip = parse_ip("203.0.113.1")
        net = NET._replace(addrs=(addr(1, "203.0.113.1"), *ADDRS), reach={parse_ip("192.0.2.200"): Reach(3, ip)})
        asked = wish(reach="192.0.2.200")
        before = select(net, asked, (V4,))[0]
        assert shown(before) == "eth1 203.0.113.1"
        assert follow(before, net, asked, (V4,)) == before

    def test_one_family_without_address_keeps_everything_waiting(self) -> None:
        assert self.follow(wish("eth1"), addr(30, "192.0.2.11"), families=DUAL) is None

    def test_interface_gone_is_waited_for(self) -> None:
        before = self.chosen(wish("eth1"))
        assert follow(before, NET._replace(links=LINKS[:2]), wish("eth1"), (V4,)) is None

    def test_created_again_with_another_index_and_mtu(self) -> None:
        before = self.chosen(wish("eth1"))
        net = NET._replace(links=(LinkInfo("eth1", 30, 1400, True),), addrs=(addr(30, "192.0.2.11"),))
        assert follow(before, net, wish("eth1"), (V4,)) == before._replace(ifindex=30, mtu=1400)
