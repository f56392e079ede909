"""What flannel's firewall rules do to packets, claimed once for every tool that writes them (contract 8.16, F08)."""

from __future__ import annotations

import pytest

from flanneld.model.addr import Family
from tests.support.firewall import ADDRESSES, Bed, source_seen


@pytest.mark.parametrize("family", Family, ids=lambda f: f.label)
class PacketWalk:
    """A test module derives its ``TestPackets`` from this and has a fixture ``masqueraded``, a bed with our rules."""

    def test_pod_to_outside_comes_from_the_host(self, masqueraded: Bed, family: Family) -> None:
        at = ADDRESSES[family]
        assert source_seen(masqueraded.pod, masqueraded.outside, at.outside) == at.host

    def test_pod_to_a_pod_elsewhere_keeps_its_source(self, masqueraded: Bed, family: Family) -> None:
        at = ADDRESSES[family]
        assert source_seen(masqueraded.pod, masqueraded.far, at.far) == at.pod

    def test_a_pod_elsewhere_to_own_pod_keeps_its_source(self, masqueraded: Bed, family: Family) -> None:
        at = ADDRESSES[family]
        assert source_seen(masqueraded.far, masqueraded.pod, at.pod) == at.far

    def test_outside_to_own_pod_keeps_its_source(self, masqueraded: Bed, family: Family) -> None:
        at = ADDRESSES[family]
        assert source_seen(masqueraded.outside, masqueraded.pod, at.pod) == at.outside

    def test_host_to_overlay_from_its_underlay_address_is_masqueraded(self, masqueraded: Bed, family: Family) -> None:
        """Contract 8.16: Go flanneld's nft rules leave a source that the peer cannot answer."""
        at = ADDRESSES[family]
        assert source_seen(masqueraded.host, masqueraded.far, at.far, source=at.host) == at.overlay

    @pytest.mark.parametrize("mark", [0x4000, 0xC001], ids=hex)
    def test_marked_packets_keep_their_source(self, masqueraded: Bed, family: Family, mark: int) -> None:
        """Contract 11.22: other bits of the mark belong to others and do not matter."""
        at = ADDRESSES[family]
        assert source_seen(masqueraded.host, masqueraded.far, at.far, source=at.host, mark=mark) == at.host

    def test_another_mark_does_not_stop_masquerading(self, masqueraded: Bed, family: Family) -> None:
        at = ADDRESSES[family]
        assert source_seen(masqueraded.host, masqueraded.far, at.far, source=at.host, mark=0x8000) == at.overlay
