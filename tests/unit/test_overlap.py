"""Which networks of a host stand in the cluster network's way, and which only look like it (failure F22)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flanneld.kernel.resolvers import name_servers
from flanneld.model.addr import IP, Prefix, parse_ip
from flanneld.model.host import AddrInfo, ExtIface, HostNet, LinkInfo
from flanneld.model.netconf import NetConf
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.objects import METRIC_V6, PROTO_BOOT, PROTO_OURS, Route
from flanneld.model.options import Options
from flanneld.plan.overlap import Mine, Needed, former_subnets, overlaps, refusal, sentences
from flanneld.sources.servers import store_hosts

KERNEL, STATIC, BIRD = 2, 4, 12
KINDS = {"cni0": "bridge", "docker0": "bridge", "br0": "bridge", "flannel.1": "vxlan", "tun0": "tun"}
DEVICES = frozenset({"flannel.1"})


def conf(*, backend: str = "vxlan", allocates: bool = True, **keys: object) -> NetConf:
    text = json.dumps({"Network": "10.244.0.0/16", **keys, "Backend": {"Type": backend}})
    return parse_netconf(text, allocates=allocates)


def ip_of(text: str) -> IP | None:
    return parse_ip(text) if text else None


def mine(ip: str = "198.18.0.11", *subnets: str, public: str = "", allocates: bool = True) -> Mine:
    """A host with an address on eth0 and the subnets that it has or had."""
    v4, v6 = ("", ip) if ":" in ip else (ip, "")
    public4, public6 = ("", public) if ":" in public else (public, "")
    ext = ExtIface("eth0", 2, 1500, ip_of(v4), ip_of(v6), ip_of(public4 or v4), ip_of(public6 or v6))
    return Mine(ext, DEVICES, tuple(map(Prefix.parse, subnets)), allocates)


def route(dst: str, link: str, via: str = "", proto: int = KERNEL, metric: int = 0) -> Route:
    return Route(Prefix.parse(dst), link, ip_of(via), proto=proto, metric=metric)


def host(*inside: Route, serving: dict[IP, Route] | None = None, addrs: tuple[tuple[str, str], ...] = ()) -> HostNet:
    names = ["lo", "eth0", "eth1", "tun0", "cni0", "docker0", "br0", "flannel.1"]
    links = tuple(LinkInfo(name, index, 1500, True, KINDS.get(name, "")) for index, name in enumerate(names, 1))
    given = tuple(AddrInfo(names.index(name) + 1, (p := Prefix.parse(text)).ip, p.length) for name, text in addrs)
    return HostNet(links, given, inside=inside, serving=serving or {})


def told(found: HostNet, settings: NetConf | None = None, me: Mine | None = None) -> list[str]:
    return [str(overlap) for overlap in overlaps(settings or conf(), found, me or mine())]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (route("10.244.0.0/16", "docker0"), "is also the network of interface docker0"),  # flannel #844
        (route("10.244.64.0/18", "eth1"), "contains 10.244.64.0/18, a network of interface eth1"),
        (route("10.244.9.0/24", "eth1"), "contains 10.244.9.0/24, a network of interface eth1"),
        (route("10.244.9.128/25", "eth1"), "contains 10.244.9.128/25"),
        (route("10.244.9.0/24", "eth0"), "contains 10.244.9.0/24, a network of interface eth0"),
        (route("10.244.0.0/24", "eth1"), "contains 10.244.0.0/24"),
        (route("10.244.0.0/17", "tun0", "10.8.0.1", STATIC), "interface tun0 (by a route via 10.8.0.1)"),
        (route("10.244.3.0/24", "tun0", "10.8.0.1", PROTO_BOOT), "interface tun0 (by a route via 10.8.0.1)"),
        (route("10.244.64.0/18", "eth0", "198.18.0.1", BIRD), "interface eth0 (by a route via 198.18.0.1)"),
    ],
)
def test_another_interfaces_network_inside_ours_is_refused_with_its_name_and_the_remedy(
    found: Route, words: str
) -> None:
    sentence = refusal(overlaps(conf(), host(found), mine()))
    assert sentence
    assert sentence.startswith("Network 10.244.0.0/16 ")
    assert words in sentence
    remedy = f"choose another Network, or renumber or remove what is on {found.link}, or start with --allow-overlap"
    assert sentence.endswith("; " + remedy)


@pytest.mark.parametrize(
    "found",
    [
        # our own, of this run and former ones, and of Go flanneld (contract 6.16, 6.19)
        route("10.244.0.0/16", "flannel.1", proto=PROTO_BOOT),
        route("10.244.9.0/24", "flannel.1", "10.244.9.0", PROTO_BOOT),
        route("10.244.9.0/24", "eth1", "198.18.1.9", PROTO_OURS),
        route("10.244.9.0/24", "eth0", "198.18.0.9", PROTO_BOOT),
        # containers: bridges of a lease's size, and single pods, as Calico and others attach them
        route("10.244.7.0/24", "docker0"),
        route("10.244.9.5/32", "eth1", proto=PROTO_BOOT),
        # what a routing daemon makes of peers' subnets
        route("10.244.9.0/24", "eth1", "192.0.2.9", BIRD),
    ],
)
def test_what_flannel_and_containers_have_made_is_no_overlap(found: Route) -> None:
    assert told(host(found)) == []


@pytest.mark.parametrize(
    "found",
    [
        route("10.244.7.0/24", "eth1"),
        route("10.244.7.128/25", "br0"),
        route("10.244.7.64/26", "eth1", "10.244.7.2", STATIC),
        route("10.244.3.0/24", "cni0"),
    ],
)
def test_what_stands_in_a_subnet_of_this_host_is_its_own_business(found: Route) -> None:
    assert told(host(found), me=mine("198.18.0.11", "10.244.7.1/24", "10.244.3.0/24")) == []


def test_a_host_that_served_the_network_before_is_told_and_not_turned_away() -> None:
    """An upgrade, or the swap from Go flanneld, must not end a network that works."""
    found = overlaps(conf(), host(route("10.244.64.0/18", "tun0")), mine("198.18.0.11", "10.244.7.0/24"))
    assert len(found) == 1
    assert refusal(found) is None
    elsewhere = overlaps(conf(), host(route("10.244.64.0/18", "tun0")), mine("198.18.0.11", "10.5.7.0/24"))
    assert refusal(elsewhere), "it served another network, which says nothing about this one"


def test_addresses_that_the_operator_has_set_apart_may_be_used_by_others() -> None:
    """Network 10.0.0.0/8 around everything, with SubnetMin and SubnetMax, stands in flannel's own documentation."""
    apart = conf(Network="10.0.0.0/8", SubnetLen=20, SubnetMin="10.10.0.0", SubnetMax="10.99.0.0")
    assert told(host(route("10.0.0.0/24", "eth0"), route("10.100.0.0/16", "eth1")), apart, mine("10.0.0.11")) == []
    inside = told(host(route("10.0.0.0/24", "eth0"), route("10.99.15.0/24", "eth1")), apart, mine("10.0.0.11"))
    assert inside == [
        "Network 10.0.0.0/8 contains 10.99.15.0/24, a network of interface eth1: packets to pods with such addresses "
        "go there"
    ]


@pytest.mark.parametrize("backend", ["vxlan", "udp"])
def test_an_underlay_that_our_covering_route_would_take_is_refused_even_where_the_network_was_served(
    backend: str,
) -> None:
    """A cloud's /32 address: its neighbours are reached by the default route, which is shorter than ours."""
    settings = conf(backend=backend, Network="10.0.0.0/8", SubnetMin="10.10.0.0", SubnetMax="10.99.0.0")
    sentence = refusal(overlaps(settings, host(), mine("10.128.0.2", "10.10.7.0/24")))
    assert sentence
    assert "contains this host's address 10.128.0.2, interface eth0: this host and others would lose" in sentence


def test_without_a_covering_route_only_addresses_that_may_be_leased_are_lost() -> None:
    apart = conf(backend="host-gw", Network="10.0.0.0/8", SubnetMin="10.10.0.0", SubnetMax="10.99.0.0")
    assert told(host(), apart, mine("10.128.0.2")) == []
    assert len(told(host(), apart, mine("10.12.0.2"))) == 1


def test_the_underlays_own_network_keeps_its_packets_when_it_was_there_first() -> None:
    """One /16 for hosts and, further up, pods; the kernel refuses a second route of the same metric."""
    shared = conf(SubnetMin="10.244.100.0")
    served = mine("10.244.3.11", "10.244.107.0/24")
    assert refusal(overlaps(shared, host(route("10.244.0.0/16", "eth0")), served)) is None
    managed = route("10.244.0.0/16", "eth0", metric=100)  # NetworkManager's, behind ours
    assert refusal(overlaps(shared, host(managed), served))


def test_the_advertised_address_counts_as_well() -> None:
    assert told(host(), me=mine("198.18.0.11", public="10.244.9.9")) == [
        "Network 10.244.0.0/16 contains this host's advertised address 10.244.9.9, interface eth0: this host and "
        "others would lose each other"
    ]


SERVER = IP(parse_ip("10.244.9.53"))


@pytest.mark.parametrize(
    ("way", "lost"),
    [
        (route("0.0.0.0/0", "eth0", "198.18.0.1"), True),
        (route("10.0.0.0/8", "eth1", "192.0.2.1"), True),
        (route("10.244.9.53/32", "eth1", "192.0.2.1"), False),  # the operator's own exception
        (route("10.244.0.0/16", "flannel.1"), False),  # a pod serves
    ],
)
def test_a_server_that_our_routes_would_take_away_is_named(way: Route, lost: bool) -> None:
    found = overlaps(conf(), host(serving={SERVER: way}), mine(), [Needed(SERVER, "a name server of /etc/resolv.conf")])
    assert [str(overlap) for overlap in found] == [
        "Network 10.244.0.0/16 contains 10.244.9.53, a name server of /etc/resolv.conf, reached through interface "
        f"{way.link}: this host would lose it"
    ] * lost
    assert (refusal(found) is not None) is lost


def test_servers_elsewhere_unreachable_or_in_our_own_subnet_are_passed_over() -> None:
    default = route("0.0.0.0/0", "eth0", "198.18.0.1")
    far = IP(parse_ip("192.0.2.53"))
    needed = [Needed(far, "a name server"), Needed(SERVER, "a name server")]
    assert overlaps(conf(), host(serving={far: default}), mine(), needed) == []
    own = mine("198.18.0.11", "10.244.9.0/24")
    assert overlaps(conf(), host(serving={SERVER: default}), own, needed) == []


def test_both_families_are_looked_at() -> None:
    found = host(
        route("10.244.64.0/18", "eth1"), route("fd00:244:0:8000::/49", "eth1"), route("fd00:244:0:9::/64", "br0")
    )
    both = conf(EnableIPv6=True, IPv6Network="fd00:244::/48")
    assert [sentence.split(" contains ")[0] for sentence in told(found, both)] == [
        "Network 10.244.0.0/16",
        "IPv6Network fd00:244::/48",
    ]
    six = conf(EnableIPv4=False, EnableIPv6=True, IPv6Network="fd00:244::/48")
    equal = route("fd00:244::/48", "eth0", metric=256)
    served = mine("fd00:244::11", "fd00:244:0:7::/64")
    assert "IPv6Network fd00:244::/48 is also the network of interface eth0" in " ".join(told(host(equal), six, served))
    later = equal._replace(metric=METRIC_V6 + 1)
    assert refusal(overlaps(six, host(later), served)), "our route would win"


def test_where_subnets_are_given_by_name_every_longer_bridge_may_hold_containers() -> None:
    """Kubernetes names pod CIDRs of any length, anywhere in the network (contract 9.15)."""
    kube = conf(allocates=False, SubnetLen=24)
    me = mine(allocates=False)
    assert told(host(route("10.244.7.0/25", "cni0"), route("10.244.9.0/26", "eth0", "198.18.0.9")), kube, me) == []
    assert len(told(host(route("10.244.0.0/24", "eth1"), route("10.244.0.0/16", "docker0")), kube, me)) == 2


def test_a_backend_without_routes_is_in_nobodys_way() -> None:
    assert told(host(route("10.244.0.0/16", "eth0")), conf(backend="alloc"), mine("10.244.3.11")) == []


def test_several_overlaps_are_one_bounded_sentence() -> None:
    many = [route(f"10.244.{number}.0/25", "eth1") for number in range(1, 200)]
    sentence = refusal(overlaps(conf(), host(*many), mine()))
    assert sentence
    assert " (and 196 more); choose another Network" in sentence
    assert len(sentence) < 700
    told = sentences(overlaps(conf(), host(*many), mine()))
    assert len(told) == 4
    assert told[-1] == "more networks than that overlap: ip route show root 10.244.0.0/16"
    assert told == sentences(overlaps(conf(), host(*many[:150]), mine())), "another number is no news"


def test_former_subnets_are_read_from_the_devices_where_files_are_gone() -> None:
    there = host(addrs=(("flannel.1", "10.244.7.0/32"), ("cni0", "10.244.9.1/24"), ("flannel.1", "192.0.2.1/24")))
    assert list(map(str, former_subnets(conf(), there, DEVICES))) == ["10.244.7.0/24"]


def test_name_servers_are_those_that_the_c_library_reads(tmp_path: Path) -> None:
    first, second = tmp_path / "resolv.conf", tmp_path / "behind.conf"
    first.write_text("# nameserver 192.0.2.9\nsearch x\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver\n")
    second.write_text("nameserver 192.0.2.1 \n\tnameserver 2001:db8::1\n")
    found = name_servers((first, tmp_path / "missing", second))
    assert found == {
        parse_ip("127.0.0.53"): str(first),
        parse_ip("192.0.2.1"): str(second),
        parse_ip("2001:db8::1"): str(second),
    }


def test_servers_of_the_store_are_those_of_the_flags() -> None:
    etcd = Options(etcd_endpoints="http://10.244.9.1:2379,https://[fd00::1]:2379")
    assert store_hosts(etcd, {}) == {
        "10.244.9.1": "the etcd server http://10.244.9.1:2379",
        "fd00::1": "the etcd server https://[fd00::1]:2379",
    }
    kube = Options(kube_subnet_mgr=True, kube_api_url="https://10.244.0.1:6443")
    assert store_hosts(kube, {}) == {"10.244.0.1": "the API server https://10.244.0.1:6443"}
    pod = {"KUBERNETES_SERVICE_HOST": "10.244.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    assert store_hosts(kube, pod) == {}, "a service's address, which kube-proxy answers for"
