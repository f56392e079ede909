"""Nodes whose annotations are wrong in every way: each costs itself and one line, and nobody else anything.

Who may write the annotations of which node is for the API server to say: deploy/kubernetes has an admission policy.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from flanneld.flood import BURST
from tests.support.kube import MakeKubeHost, Site, published
from tests.support.wait import until

DEEP = "[" * 10_000 + "]" * 10_000
BAD: dict[str, dict[str, str | None]] = {
    "no address": {"public_ip": "reboot"},
    "another family": {"public_ip": "fd00::1"},
    "two addresses": {"public_ip": "192.0.2.1,192.0.2.2"},
    "an address with a line end": {"public_ip": "192.0.2.1\nE0101 00:00:00.000000 1 flanneld] forged"},
    "terminal codes": {"public_ip": "\x1b[2J\x1b]0;x\x07\u202e"},
    "NUL": {"public_ip": "192.0.2.1\0"},
    "a long address": {"public_ip": "1" * 200_000},
    "no JSON": {"backend_data": "{"},
    "deep": {"backend_data": DEEP},
    "within the stack here, beyond it elsewhere": {"backend_data": '{"a":' * 970 + "1" + "}" * 970},
    "huge": {"backend_data": '{"VtepMAC":"02:00:00:00:00:09","x":"' + "y" * 200_000 + '"}'},
    "a type that is none": {"backend_type": "vxlan\nE0101"},
    "a long type": {"backend_type": "x" * 100_000},
}


@pytest.mark.parametrize("wrong", BAD)
async def test_a_bad_annotation_costs_its_node_and_one_line(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    await site.create("good", "10.5.2.0/24", annotations=published())
    a = host()
    a.follow()
    await until(lambda: a.subnets() == {"good": "10.5.2.0/24"})
    with caplog.at_level(logging.WARNING, "flanneld"):
        await site.create("bad", "10.5.3.0/24", annotations=published("192.0.2.66"))
        await until(lambda: "bad" in a.peers)
        await site.annotate("bad", published(**{"public_ip": "192.0.2.66", **BAD[wrong]}))  # type: ignore[arg-type]
        await until(lambda: "bad" not in a.peers)
        for number in range(3):  # a node's heartbeats are no news
            await site.annotate("bad", {"heartbeat": str(number)})
        await site.create("later", "10.5.4.0/24", annotations=published("192.0.2.44"))
        await until(lambda: "later" in a.peers)
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"node={site.node('bad')}" in line
    assert len(line) < 400
    assert line.isprintable()
    assert a.subnets() == {"good": "10.5.2.0/24", "later": "10.5.4.0/24"}


async def test_hundreds_of_bad_nodes_are_told_in_bounded_lines(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    count = BURST + 200
    with caplog.at_level(logging.WARNING, "flanneld"):
        for at in range(0, count, 50):
            await asyncio.gather(
                *(
                    site.create(f"bad{n}", f"10.5.{n % 256}.0/24", annotations=published("nowhere"))
                    for n in range(at, at + 50)
                )
            )
        await site.create("good", "10.6.2.0/24", annotations=published())
        a = host()
        a.follow()
        await until(lambda: a.subnets() == {"good": "10.6.2.0/24"})
        await until(lambda: any("more nodes" in line for line in caplog.messages))
    assert len(caplog.messages) <= BURST + 5
