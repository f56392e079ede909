"""The choice of the external interface on real interfaces, as the kernel lists them (failures F32, F33).

::

    namespace: lo  n0 10.0.2.15   n1 192.0.2.11 .12, 2001:db8:1::11   n2 198.51.100.5 (lifetime), 2001:db8:2::5
               n3 without address   flannel.9 10.5.1.0, with a default route that a DHCP client put there
    default routes: IPv4 through n2 (metric 50) and n0 (100), IPv6 through n2
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flanneld.errors import ConfigError
from flanneld.kernel.host_net import read_host_net
from flanneld.model.addr import Family, format_ip, parse_ip
from flanneld.model.host import HostNet, IfaceWish
from flanneld.plan.extiface import follow, select
from tests.support.netns import Netns

pytestmark = pytest.mark.kernel

V4, V6 = Family.V4, Family.V6
OURS = frozenset({"flannel.9"})
SETUP = """
for n in n0 n1 n2 n3 flannel.9; do
    ip link add $n type veth peer name p-$n
    ip link set $n up
    ip link set p-$n up
done
ip link set n1 mtu 9000
ip addr add 10.0.2.15/24 dev n0
ip addr add 192.0.2.11/24 dev n1
ip addr add 192.0.2.12/24 dev n1
ip addr add 2001:db8:1::11/64 dev n1 nodad
ip addr add 198.51.100.5/24 dev n2 valid_lft 3600 preferred_lft 3600
ip addr add 2001:db8:2::dead/64 dev n2 nodad preferred_lft 0
ip addr add 2001:db8:2::5/64 dev n2 nodad
ip addr add 10.5.1.0/32 dev flannel.9
ip route add default dev flannel.9
ip route add default via 10.0.2.2 metric 100
ip route add default via 198.51.100.1 metric 50
ip -6 route add default via 2001:db8:2::1
ip route add 203.0.113.0/24 via 192.0.2.1 src 192.0.2.12
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Netns]:
    with Netns("extif") as namespace:
        namespace.run("sh", "-ec", SETUP)
        yield namespace


def read(host: Netns, wish: IfaceWish) -> HostNet:
    return host.call(read_host_net, [parse_ip(wish.can_reach)] if wish.can_reach else [])


@pytest.mark.parametrize(
    ("families", "wish", "expected"),
    [
        ((V4,), IfaceWish(), "n2 198.51.100.5"),
        ((V6,), IfaceWish(), "n2 2001:db8:2::5"),
        ((V4, V6), IfaceWish(), "n2 198.51.100.5 2001:db8:2::5"),
        ((V4,), IfaceWish(public_ip="10.0.2.15"), "n0 10.0.2.15"),
        ((V4, V6), IfaceWish(("n3", "n1")), "n1 192.0.2.11 2001:db8:1::11"),
        ((V4, V6), IfaceWish(("2001:db8:1::11",)), "n1 192.0.2.11 2001:db8:1::11"),
        ((V4,), IfaceWish(iface_regex=(r"^10\.",)), "n0 10.0.2.15"),
        ((V4,), IfaceWish(iface_regex=(r"\.12$",)), "n1 192.0.2.12"),
        ((V4,), IfaceWish(iface_regex=("^n[1-9]$",)), "n1 192.0.2.11"),
        ((V4,), IfaceWish(can_reach="203.0.113.9"), "n1 192.0.2.12"),
        ((V4, V6), IfaceWish(can_reach="2001:db8:1::99"), "n1 192.0.2.11 2001:db8:1::11"),
    ],
)
def test_chosen_on_a_real_host(host: Netns, families: tuple[Family, ...], wish: IfaceWish, expected: str) -> None:
    net = read(host, wish)
    chosen, _ = select(net, wish, families, OURS)
    assert " ".join([chosen.name, *(format_ip(ip) for ip in (chosen.ip, chosen.ip6) if ip)]) == expected
    assert chosen.mtu == (9000 if chosen.name == "n1" else 1500)
    assert follow(chosen, net, wish, families) == chosen


def test_address_of_this_host_cannot_be_the_one_to_reach(host: Netns) -> None:
    wish = IfaceWish(can_reach="10.0.2.15")
    with pytest.raises(ConfigError, match="the kernel would send through lo"):
        select(read(host, wish), wish, (V4,), OURS)


def test_default_route_over_several_interfaces_is_refused() -> None:
    with Netns("extif") as host:
        host.run("sh", "-ec", SETUP)
        hops = "nexthop via 10.0.2.2 nexthop via 192.0.2.1"
        host.run("sh", "-ec", f"ip route add default metric 10 {hops}; ip route del default dev flannel.9")
        with pytest.raises(ConfigError, match="the one for IPv4 has several next hops"):
            select(read(host, IfaceWish()), IfaceWish(), (V4,), OURS)


def test_renumbered_interface_is_followed() -> None:
    with Netns("extif") as host:
        host.run("sh", "-ec", SETUP)
        wish = IfaceWish(("n1",))
        before, _ = select(read(host, wish), wish, (V4,), OURS)
        host.run("ip", "addr", "add", "192.0.2.1/25", "dev", "n1")
        assert follow(before, read(host, wish), wish, (V4,)) == before
        host.run("ip", "addr", "flush", "dev", "n1")
        assert follow(before, read(host, wish), wish, (V4,)) is None
        host.run("sh", "-ec", "ip addr add 192.0.2.99/24 dev n1; ip link set n1 mtu 1400")
        ip = parse_ip("192.0.2.99")
        assert follow(before, read(host, wish), wish, (V4,)) == before._replace(ip=ip, public_ip=ip, mtu=1400)
