"""Bytes of subnet.env: contract 3.41, 4.1, 4.7, 4.8, 10.12."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flanneld.model.addr import IP, Prefix
from flanneld.model.subnet_env import PreviousEnv, SubnetEnv, parse

P = Prefix.parse

# contract 4.8, word for word
DUAL = b"""\
FLANNEL_NETWORK=10.42.0.0/16
FLANNEL_SUBNET=10.42.0.1/24
FLANNEL_IPV6_NETWORK=2001:cafe:42::/56
FLANNEL_IPV6_SUBNET=2001:cafe:42::1/64
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
"""


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (
            SubnetEnv(P("10.42.0.0/16"), P("10.42.0.0/24"), P("2001:cafe:42::/56"), P("2001:cafe:42::/64"), 1450, True),
            DUAL,
        ),
        (
            SubnetEnv(P("10.5.0.0/16"), P("10.5.72.0/24"), None, None, 8951, False),
            b"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=8951\nFLANNEL_IPMASQ=false\n",
        ),
        (
            SubnetEnv(None, None, P("fd00::/48"), P("fd00:0:0:12::/64"), 1430, True),
            b"FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:12::1/64\n"
            b"FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n",
        ),
    ],
)
def test_file_is_written_byte_for_byte_as_flannel_writes_it(env: SubnetEnv, text: bytes) -> None:
    assert env.render() == text
    assert parse(text) == PreviousEnv(env.network, env.subnet, env.network6, env.subnet6)


@pytest.mark.parametrize(
    ("text", "subnet"),
    [
        ("FLANNEL_SUBNET=10.5.72.1/24\n", "10.5.72.0/24"),
        ("FLANNEL_SUBNET=10.5.72.1/24", "10.5.72.0/24"),
        ("# by hand\r\n\r\nexport FLANNEL_SUBNET='10.5.72.1/24' # ours\r\n", "10.5.72.0/24"),
        ('FLANNEL_SUBNET="10.5.72.1/24"\n', "10.5.72.0/24"),
        ("FLANNEL_SUBNET = 10.5.72.1/24  # ours\n", "10.5.72.0/24"),
        ("FLANNEL_SUBNET: 10.5.72.1/24\n", "10.5.72.0/24"),
        ("FLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_SUBNET=10.5.73.1/24\n", "10.5.73.0/24"),
        # 3.41: comma lists
        ("FLANNEL_SUBNET=junk,10.5.72.1/24,\n", "10.5.72.0/24"),
        ("FLANNEL_SUBNET=10.5.72.1/24,fd00::1/64\n", "10.5.72.0/24"),
        ("FLANNEL_SUBNET=10.5.72.1/24,10.5.73.1/24\n", None),
        ("FLANNEL_SUBNET=junk\n", None),
        ("FLANNEL_SUBNET=\n", None),
        ("FLANNEL_SUBNET=fd00::1/64\n", None),
        ("FLANNEL_SUBNET=10.5.72.1\n", None),
        ("", None),
        # 4.7: one malformed line spoils the file
        ("FLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_M", None),
        ("FLANNEL_SUBNET=10.5.72.1/24\n\0\0\0\0\n", None),
        ("FLANNEL_SUBNET=10.5.72.1/24\n=x\n", None),
    ],
)
def test_previous_subnet_read_from(text: str, subnet: str | None) -> None:
    assert parse(text.encode()).subnet == (P(subnet) if subnet else None)


def test_bytes_that_are_no_text_count_as_no_file() -> None:
    assert parse(b"FLANNEL_SUBNET=10.5.72.1/24\n\xff\xfe\n") == PreviousEnv()


@given(st.binary(max_size=300) | st.text(alphabet="FLANEBSUT_IPV6=:#'\"/.,0123456789af \r\n\0", max_size=200))
@example(DUAL[:50])
def test_reader_takes_anything(raw: bytes | str) -> None:
    parse(raw if isinstance(raw, bytes) else raw.encode())


@pytest.mark.parametrize("length", range(len(DUAL)))
def test_cut_file_gives_the_subnet_or_one_that_no_claim_fits(length: int) -> None:
    """``/24`` cut to ``/2`` is well-formed, but then its length differs from SubnetLen (contract 3.20)."""
    env = parse(DUAL[:length])
    assert env.subnet in (None, P("10.42.0.0/24"), P("0.0.0.0/2"))
    assert env.subnet6 in (None, P("2001:cafe:42::/64"), P("2000::/6"))


@given(
    st.binary(min_size=4, max_size=4),
    st.integers(1, 31),
    st.none() | st.tuples(st.binary(min_size=16, max_size=16), st.integers(1, 127)),
    st.integers(576, 65535),
    st.booleans(),
)
def test_what_is_written_is_read_back(
    ip: bytes, length: int, v6: tuple[bytes, int] | None, mtu: int, masq: bool
) -> None:
    subnet = Prefix(IP(ip), length).masked()
    subnet6 = Prefix(IP(v6[0]), v6[1]).masked() if v6 else None
    text = SubnetEnv(subnet, subnet, subnet6, subnet6, mtu, masq).render()
    assert parse(text) == PreviousEnv(subnet, subnet, subnet6, subnet6)
    # contract 10.12: the CNI plugin trims nothing, and crashes on a known key without "="
    assert all(line.count(b"=") == 1 and line.strip() == line for line in text.splitlines())
