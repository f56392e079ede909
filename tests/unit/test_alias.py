"""The mark on our devices: what a network's name of any length becomes (failures F21)."""

from __future__ import annotations

import pytest

from flanneld.model.options import Options
from flanneld.startup import alias_of

IFALIAS_BYTES = 255
"""What the kernel takes. Source: include/uapi/linux/if.h, IFALIASZ."""


@pytest.mark.parametrize(
    "prefix", ["/" + "x" * 400, "/" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 200, "/" + "\U0001f600" * 99]
)
def test_the_kernel_takes_the_mark_of_any_network(prefix: str) -> None:
    alias = alias_of(Options(etcd_prefix=prefix))
    assert len(alias.encode()) <= IFALIAS_BYTES
    assert alias.startswith(f"flanneld {prefix[:40]}")


def test_networks_whose_long_names_begin_alike_have_marks_of_their_own() -> None:
    one, other = (alias_of(Options(etcd_prefix=f"/{'x' * 300}/{name}")) for name in ("a", "b"))
    assert one != other


def test_the_mark_of_an_ordinary_network_is_its_name() -> None:
    assert alias_of(Options()) == "flanneld /coreos.com/network"
