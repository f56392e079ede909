"""SIGTERM ends the daemon within five seconds whatever hangs, contract 0.2: here a resolver whose servers are away."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from flanneld.lab.daemon import own_command
from tests.support.netns import Netns

pytestmark = pytest.mark.kernel

SERVERS = "".join(f"nameserver 192.0.2.{number}\n" for number in (1, 2, 3))


def test_sigterm_ends_a_daemon_whose_resolver_hangs(tmp_path: Path) -> None:
    """The C library's look-up cannot be interrupted: with three servers away it takes half a minute."""
    servers = tmp_path / "resolv.conf"
    servers.write_text(SERVERS)
    with Netns("fh") as host:
        host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far0")
        host.run("ip", "addr", "add", "192.0.2.5/24", "dev", "eth0")
        for name in ("eth0", "far0"):
            host.run("ip", "link", "set", name, "up")
        for number in (1, 2, 3):  # packets leave, and nobody answers
            host.run("ip", "neigh", "add", f"192.0.2.{number}", "lladdr", "02:00:00:00:00:01", "dev", "eth0")
        daemon = host.spawn(
            *("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(servers)),
            *own_command(),
            *("--etcd-endpoints=http://etcd.example:2379", f"--state-dir={tmp_path}"),
            f"--subnet-file={tmp_path}/subnet.env",
        )
        assert daemon.stdout
        assert "waiting for the network configuration" in daemon.stdout.readline()
        began = time.monotonic()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
        assert time.monotonic() - began < 5.0
