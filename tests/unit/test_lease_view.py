"""How leases are shown (``flannelctl leases``)."""

from __future__ import annotations

import pytest

from flanneld.ctl.lease_view import View, as_json, details, duration, late_line, mark_late, mark_own, order, table
from flanneld.model.addr import IP, Prefix, parse_ip

VXLAN = (
    b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
)


def lease(name: str = "10.5.2.0-24", value: bytes = VXLAN, ttl_id: int = 7, ttl_s: int | None = 86390) -> View:
    return View.of(name, value, ttl_id, revision=3)._replace(ttl_s=ttl_s)


def test_a_table_row_tells_subnet_host_backend_mac_and_both_times() -> None:
    head, row = table([lease()]).splitlines()
    assert head.split() == ["SUBNET", "PUBLIC", "IP", "BACKEND", "MAC", "TTL", "AGE"]
    assert row.split() == ["10.5.2.0/24", "192.168.64.3", "vxlan", "c6:d2:32:6f:8f:44", "23h59m", "10s"]


def test_our_own_row_has_a_star() -> None:
    own = lease()._replace(is_own=True)
    assert table([own, lease("10.5.3.0-24")]).splitlines()[1].startswith("*")
    assert not table([own, lease("10.5.3.0-24")]).splitlines()[2].startswith("*")


def test_columns_line_up_whatever_is_in_them() -> None:
    lines = table([lease(), lease("10.5.200.0-24&fd00:12:13::-64", b'{"PublicIP":"1.2.3.4"}')]).splitlines()
    assert {line.find("1") for line in lines[1:]} == {lines[0].find("SUBNET")}
    assert len({line.find(what) for line, what in zip(lines, ("TTL", "23h", "23h"), strict=True)}) == 1


def test_a_reservation_has_no_time_to_live() -> None:
    """Contract 3.40: a key without a lease does not expire."""
    assert table([lease(ttl_id=0, ttl_s=None)]).split()[-2:] == ["reserved", "-"]
    assert as_json(lease(ttl_id=0, ttl_s=None))["reservation"] is True
    assert "does not expire" in details(lease(ttl_id=0, ttl_s=None))


def test_an_expired_lease_says_so() -> None:
    assert table([lease(ttl_s=-1)]).split()[-2:] == ["expired", "-"]


@pytest.mark.parametrize("name", ["10.12.13.0", "10.12.13.300-24", "nonsense"])
def test_a_key_that_flanneld_skips_is_shown_with_the_reason(name: str) -> None:
    """Contract 3.14."""
    view = lease(name)
    assert name in view.problem
    assert name in table([view])
    assert "unusable" in table([view])
    assert as_json(view)["problem"] == view.problem


def test_a_bad_value_keeps_the_subnet_visible() -> None:
    view = lease(value=b"{")
    assert view.subnet_text() == "10.5.2.0/24"
    assert "unusable" in table([view])


def test_a_dual_stack_lease_shows_both_subnets_and_addresses() -> None:
    value = b'{"PublicIP":"192.168.64.3","PublicIPv6":"2001:db8::3","BackendType":"host-gw"}'
    row = table([lease("10.12.13.0-24&fd00:12:13::-64", value)]).splitlines()[1]
    assert "10.12.13.0/24 fd00:12:13::/64" in row
    assert "192.168.64.3 2001:db8::3" in row


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("10.5.2.0/24", True),
        ("10.5.2.7/24", True),
        ("10.5.2.0/25", False),
        ("10.5.2.200", True),
        ("192.168.64.3", True),
        ("10.5.3.1", False),
        ("192.168.64.4", False),
    ],
)
def test_a_lease_is_found_by_subnet_pod_address_or_host_address(asked: str, found: bool) -> None:
    assert lease().holds(Prefix.parse(asked) if "/" in asked else parse_ip(asked)) is found


def test_the_identity_decides_whose_a_lease_is_and_the_address_only_without_one() -> None:
    def everything(_: IP) -> bool:
        return True

    def nothing(_: IP) -> bool:
        return False

    theirs = lease(value=VXLAN[:-1] + b',"FlanneldID":"them"}')
    assert mark_own(theirs, nothing, "them").is_own
    assert not mark_own(theirs, everything, "us").is_own  # two hosts behind one public address
    assert mark_own(lease(), everything, "us").is_own
    assert not mark_own(lease(), nothing, "us").is_own


def test_leases_are_ordered_by_address_and_not_by_text() -> None:
    views = [lease(name) for name in ("10.5.10.0-24", "bad", "0.0.0.0-0&fd00::-64", "10.5.9.0-24")]
    assert [view.name for view in sorted(views, key=order)] == [
        "10.5.9.0-24",
        "10.5.10.0-24",
        "0.0.0.0-0&fd00::-64",
        "bad",
    ]


def test_json_carries_backend_data_as_json() -> None:
    assert as_json(lease())["backend_data"] == {"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}
    assert as_json(lease())["age_s"] == 10


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (60, "1m00s"), (3599, "59m59s"), (86399, "23h59m")]
)
def test_durations_are_short(seconds: int, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("ttl_s", "margin_s", "is_late"),
    [
        (86390, 3600, False),
        (3500, 3600, False),
        (3200, 3600, True),
        (0, 3600, True),
        (42000, 82800, True),  # nobody renews before half of a lease's life is over
        (43000, 82800, False),
        (None, 3600, False),  # a reservation
    ],
)
def test_a_lease_is_late_when_its_host_should_have_renewed_it(ttl_s: int | None, margin_s: int, is_late: bool) -> None:
    view = mark_late(lease(ttl_s=ttl_s), margin_s)
    assert view.is_late is is_late
    assert as_json(view)["late"] is is_late
    assert table([view]).splitlines()[1].startswith("?") is is_late


def test_a_late_lease_is_told_with_host_and_time_left() -> None:
    assert late_line(lease(ttl_s=600)) == (
        "10.5.2.0/24 of 192.168.64.3 was not renewed in time, 10m00s left: is that host gone?"
    )
