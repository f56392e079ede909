"""Identity and MAC addresses derived from it: contract 6.11, failures F04 and F19."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flanneld.model.addr import format_mac
from flanneld.model.identity import derive_identity, mac_for, machine_mark

MACHINE = "4c0bd8d5a6b84d0f9f1d6e9b7b8f3a21"


def test_values_never_change_between_versions() -> None:
    """A new identity or MAC after an upgrade would be a new host to the cluster."""
    identity = derive_identity(MACHINE, "/var/lib/flanneld")
    assert identity == "dc249e5da5e8845298b9f3431ccd386c"
    assert format_mac(mac_for(identity, "flannel.1")) == "7a:6f:b1:be:6d:01"


def test_machine_and_directory_both_count() -> None:
    made = {
        derive_identity(MACHINE, "/a"),
        derive_identity(MACHINE, "/b"),
        derive_identity(MACHINE[::-1], "/a"),
        derive_identity(MACHINE + "/a", ""),
    }
    assert len(made) == 4


def test_machine_id_cannot_be_read_from_what_is_shown() -> None:
    shown = derive_identity(MACHINE, "/a") + machine_mark(MACHINE)
    assert MACHINE not in shown


@given(st.text(max_size=40), st.text(max_size=15))
def test_mac_is_stable_unicast_and_locally_administered(identity: str, device: str) -> None:
    mac = mac_for(identity, device)
    assert len(mac) == 6
    assert mac[0] & 0x03 == 0x02
    assert mac == mac_for(identity, device)


def test_devices_of_one_host_and_hosts_of_one_device_differ() -> None:
    macs = {mac_for(f"{host:032x}", f"flannel.{vni}") for host in range(100) for vni in range(10)}
    assert len(macs) == 1000
