"""Free subnets: in range, aligned, never overlapping, every one reachable (contract 3.20, 3.22)."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.errors import ConfigError, Unavailable
from flanneld.model.addr import Family, Prefix
from flanneld.model.netconf import FamilyConf, NetConf
from flanneld.plan.allocate import Subnets, allocate, capacity, counts, is_compatible, pick_subnet, vacancies

NOTHING = Subnets(None, None)


def family_conf(network: str, length: int, first: int | None = None, last: int | None = None) -> FamilyConf:
    """The defaults of contract 2.6: the first subnet is skipped."""
    block = Prefix.parse(network)
    step = 1 << (block.family.bits - length)
    return FamilyConf(
        block,
        length,
        block.first + step if first is None else first,
        block.last + 1 - step if last is None else last,
    )


def net_conf(v4: FamilyConf | None, v6: FamilyConf | None = None) -> NetConf:
    return NetConf(v4, v6, nftables=False, backend_type="vxlan", backend=b"{}")


def subnets(v4: str | None, v6: str | None = None) -> Subnets:
    return Subnets(Prefix.parse(v4) if v4 else None, Prefix.parse(v6) if v6 else None)


V4 = family_conf("10.5.0.0/16", 24)
V6 = family_conf("fd00:5::/48", 64)


@st.composite
def networks(draw: st.DrawFn) -> tuple[FamilyConf, list[Prefix]]:
    """A small range somewhere, and blocks taken in, around and across it."""
    family = draw(st.sampled_from(Family))
    length = draw(st.integers(8, family.bits - 2))
    width = draw(st.integers(2, 6))
    step = 1 << (family.bits - length)
    base = draw(st.integers(0, (1 << (length - width)) - 1)) * (step << width)
    low, high = sorted((draw(st.integers(0, (1 << width) - 1)), draw(st.integers(0, (1 << width) - 1))))
    conf = FamilyConf(Prefix.of_int(base, length - width, family), length, base + low * step, base + high * step)
    block = st.builds(
        lambda offset, bits: Prefix.of_int(base + offset, bits, family),
        st.integers(0, (step << width) - 1),
        st.integers(length - 2, family.bits),
    )
    return conf, draw(st.lists(block, max_size=40))


def free_subnets(conf: FamilyConf, taken: list[Prefix]) -> list[Prefix]:
    """The slow definition of what is free."""
    step = 1 << (conf.network.family.bits - conf.subnet_len)
    candidates = (
        Prefix.of_int(value, conf.subnet_len, conf.network.family)
        for value in range(conf.subnet_min, conf.subnet_max + 1, step)
    )
    return [c for c in candidates if not any(c.overlaps(block) for block in taken)]


@given(networks())
def test_the_choices_are_exactly_the_free_subnets_each_once(network: tuple[FamilyConf, list[Prefix]]) -> None:
    conf, taken = network
    free = free_subnets(conf, taken)
    if not free:
        with pytest.raises(Unavailable, match="are taken"):
            pick_subnet(conf, taken, lambda _: 0)
        return
    offered: list[int] = []

    def below(limit: int) -> int:
        offered.append(limit)
        return len(offered) - 1

    assert [pick_subnet(conf, taken, below) for _ in free] == free
    assert set(offered) == {len(free)}


def test_the_last_free_subnet_is_found() -> None:
    taken = [p for p in Prefix.parse("10.5.0.0/16").subnets(24) if str(p) != "10.5.77.0/24"]
    assert str(pick_subnet(V4, taken, random.randrange)) == "10.5.77.0/24"


def test_a_full_network_says_how_many_are_taken() -> None:
    with pytest.raises(Unavailable, match=r"all 255 IPv4 subnets of 10\.5\.0\.0/16 are taken"):
        pick_subnet(V4, [Prefix.parse("10.5.0.0/16")], random.randrange)


@given(networks())
def test_what_is_free_is_counted(network: tuple[FamilyConf, list[Prefix]]) -> None:
    conf, taken = network
    assert vacancies(conf, taken) == len(free_subnets(conf, taken))
    assert vacancies(conf, []) == capacity(conf) == len(free_subnets(conf, []))


def test_leases_of_another_split_that_fill_a_network_are_named() -> None:
    """Whoever changed SubnetLen has hosts with larger leases until they are restarted (contract 3.22)."""
    halves = [Prefix.parse("10.5.0.0/17"), Prefix.parse("10.5.128.0/17")]
    with pytest.raises(Unavailable, match=r"larger leases hold several: 10\.5\.0\.0/17, 10\.5\.128\.0/17\)"):
        pick_subnet(V4, halves, lambda _: 0)
    quarters = [Prefix.of_int(V4.network.first + (number << 14), 18, Family.V4) for number in range(4)]
    with pytest.raises(Unavailable, match=r"10\.5\.128\.0/18 and 1 more\); release"):
        pick_subnet(V4, quarters, lambda _: 0)


@pytest.mark.parametrize(
    ("claimed", "counted"),
    [
        (subnets("10.5.3.0/24", "fd00:5:0:3::/64"), subnets("10.5.3.0/24", "fd00:5:0:3::/64")),
        (subnets("10.0.0.0/8", "fd00:5:0:3::/64"), subnets(None, "fd00:5:0:3::/64")),
        (subnets("10.5.0.0/17", "fd00::/16"), subnets("10.5.0.0/17")),
        (subnets("10.5.0.0/16"), NOTHING),
    ],
)
def test_a_claim_to_a_whole_network_counts_for_nothing(claimed: Subnets, counted: Subnets) -> None:
    assert counts(claimed, net_conf(V4, V6)) == counted


def test_a_range_without_any_subnet_is_the_operators_mistake() -> None:
    upside_down = V4._replace(subnet_min=V4.subnet_max, subnet_max=V4.subnet_min)
    with pytest.raises(ConfigError, match="SubnetMin lies above SubnetMax"):
        pick_subnet(upside_down, [], random.randrange)  # contract 2.6g


@pytest.mark.parametrize("conf", [family_conf("10.0.0.0/8", 30), family_conf("fd00:5::/48", 126)])
def test_a_huge_range_costs_nothing(conf: FamilyConf) -> None:
    rand = random.Random(1)
    taken: list[Prefix] = []
    start = time.thread_time()
    for _ in range(20):
        taken.append(pick_subnet(conf, taken, rand.randrange))
    assert time.thread_time() - start < 0.1
    assert len(set(taken)) == 20


def test_the_whole_range_is_used_from_the_first_lease_on() -> None:
    rand = random.Random(7)
    third_bytes = {pick_subnet(V4, [], rand.randrange).ip[2] for _ in range(2000)}
    assert third_bytes == set(range(1, 256))


@pytest.mark.parametrize(
    ("lease", "conf", "fits"),
    [
        (subnets("10.5.1.0/24"), net_conf(V4), True),
        (subnets("10.5.255.0/24"), net_conf(V4), True),
        (subnets("10.5.0.0/24"), net_conf(V4), False),  # below SubnetMin
        (subnets("10.6.1.0/24"), net_conf(V4), False),
        (subnets("10.5.1.0/25"), net_conf(V4), False),
        (subnets("10.5.1.0/24", "fd00:5:0:1::/64"), net_conf(V4), False),
        (subnets("10.5.1.0/24"), net_conf(V4, V6), False),
        (subnets("10.5.1.0/24", "fd00:5:0:1::/64"), net_conf(V4, V6), True),
        (subnets("10.5.1.0/24", "fd00:6:0:1::/64"), net_conf(V4, V6), False),
        (subnets(None, "fd00:5:0:1::/64"), net_conf(None, V6), True),
        (subnets("10.5.1.0/24", "fd00:5:0:1::/64"), net_conf(None, V6), False),
    ],
)
def test_compatibility_is_flannels(lease: Subnets, conf: NetConf, fits: bool) -> None:
    assert is_compatible(lease, conf) is fits  # contract 3.20


def test_a_free_previous_subnet_is_taken_again() -> None:
    before = subnets("10.5.9.0/24", "fd00:5:0:9::/64")
    assert allocate(net_conf(V4, V6), [subnets("10.5.8.0/24")], before, lambda _: 0) == before


@pytest.mark.parametrize("before", ["10.5.9.0/25", "10.6.9.0/24", "10.5.0.0/24"])
def test_a_previous_subnet_that_no_longer_fits_is_forgotten(before: str) -> None:
    assert allocate(net_conf(V4), [], subnets(before), lambda _: 0) == subnets("10.5.1.0/24")


def test_a_previous_subnet_that_is_taken_is_left_to_its_holder() -> None:
    taken = [subnets("10.5.9.0/24", "fd00:5:0:8::/64")]
    chosen = allocate(net_conf(V4), taken, subnets("10.5.9.0/24"), lambda _: 0)
    assert chosen == subnets("10.5.1.0/24")


def test_a_host_keeps_its_ipv4_subnet_when_the_network_gains_ipv6() -> None:
    chosen = allocate(net_conf(V4, V6), [subnets("10.5.8.0/24")], subnets("10.5.9.0/24"), lambda _: 0)
    assert chosen == subnets("10.5.9.0/24", "fd00:5:0:1::/64")


def test_leases_without_ipv6_do_not_disturb_a_dual_stack_choice() -> None:
    chosen = allocate(net_conf(V4, V6), [subnets("10.5.1.0/24"), NOTHING], NOTHING, lambda _: 0)
    assert chosen == subnets("10.5.2.0/24", "fd00:5:0:1::/64")  # contract 11.9


@pytest.mark.parametrize("hog", ["10.5.0.0/16", "10.0.0.0/8"])
def test_a_lease_of_everything_keeps_no_newcomer_out(hog: str) -> None:
    """It is nobody's subnet (``plan/fold.py`` uses no such lease), and one written key must not stop all joins."""
    assert allocate(net_conf(V4), [subnets(hog)], NOTHING, lambda _: 0) == subnets("10.5.1.0/24")
