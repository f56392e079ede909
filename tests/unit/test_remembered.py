"""The memory of a network survives its file, and a file that was harmed is known as such."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld.model.addr import IP, Prefix, parse_ip
from flanneld.model.lease import Lease, LeaseAttrs
from flanneld.model.remembered import Header, decode, encode

HEADER = Header(
    network="/coreos.com/network",
    identity="a" * 32,
    boot="b",
    saved=1.5,
    store="17",
    config='{"Network": "10.5.0.0/16"}',
    own="10.5.2.0-24",
    expires=None,
    operator=("192.0.2.1", ""),
    leases=0,
)

ips = st.binary(min_size=4, max_size=4).map(IP)
attrs = st.builds(
    LeaseAttrs,
    ips.filter(any),
    st.none() | st.just(parse_ip("fd00::1")),
    st.sampled_from(["", "vxlan", "host-gw"]),
    st.sampled_from([b"", b'{"VNI":1}', b"[]"]),
    data6=st.just(b""),
    identity=st.sampled_from(["", "0123456789abcdef" * 2]),
)
leases = st.builds(
    Lease,
    ips.map(lambda ip: Prefix(ip, 24)),
    st.none() | st.just(Prefix(parse_ip("fd00:1::"), 64)),
    attrs,
    revision=st.just(0),  # another run's revisions and grants mean nothing
    ttl_id=st.just(0),
)
tables = st.dictionaries(st.text(max_size=12), leases, max_size=5)


def file_of(table: dict[str, Lease]) -> bytes:
    return b"".join(encode(HEADER, table))


@given(tables)
def test_what_was_written_is_read(table: dict[str, Lease]) -> None:
    found = decode(file_of(table))
    assert found.leases() == table
    assert found.header.config == HEADER.config
    for key in table:
        assert decode(b"".join(encode(replace(HEADER, own=key), table))).own() == table[key]
    assert decode(b"".join(encode(replace(HEADER, own="nobody's key"), table))).own() is None
    assert found.operator() == (parse_ip("192.0.2.1"), None)


@given(tables, st.data())
def test_no_changed_byte_goes_unnoticed(table: dict[str, Lease], data: st.DataObject) -> None:
    raw = bytearray(file_of(table))
    at = data.draw(
        st.integers(0, len(raw) - 2)
    )  # a missing last newline is noticed too, but a blank in its place is no harm
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        decode(bytes(raw)).leases()


@given(tables, st.data())
def test_no_file_that_was_cut_short_is_used(table: dict[str, Lease], data: st.DataObject) -> None:
    raw = file_of(table)
    with pytest.raises(ValueError):
        decode(raw[: data.draw(st.integers(0, len(raw) - 1))])


def test_key_that_is_no_text_is_left_out_and_harms_nobody_else() -> None:
    good = Lease(Prefix(parse_ip("10.5.2.0"), 24), None, LeaseAttrs(parse_ip("192.0.2.2")))
    assert decode(file_of({"\udcff": good, "10.5.2.0-24": good})).leases() == {"10.5.2.0-24": good}


def test_lease_that_only_an_older_version_took_is_left_out_and_harms_nobody_else() -> None:
    good = Lease(Prefix(parse_ip("10.5.2.0"), 24), None, LeaseAttrs(parse_ip("192.0.2.2")))
    bad = good._replace(attrs=good.attrs._replace(identity="two\nlines"))
    assert decode(file_of({"10.5.2.0-24": good, "10.5.3.0-24": bad})).leases() == {"10.5.2.0-24": good}
