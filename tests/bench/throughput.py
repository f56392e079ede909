"""Throughput between two pods: through the daemon's devices, and through the same devices set up by hand.

Two labs stand beside each other and take turns, so that both meet the same machine. iperf3 is needed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from flanneld.errors import ConfigError, Unavailable
from flanneld.lab import Lab, LabSpec
from flanneld.lab.spec import POD_NETWORK
from tests.bench.stage import Command, lab_name

SECONDS = 3
NO_FIREWALL = ("--ip-masq=false", "--iptables-forward-rules=false")
"""Rules and connection tracking cost the same whoever asked for them; here devices are compared."""
MTU = {"vxlan": 1450, "host-gw": 1500}
"""Of pods, with an underlay of 1500."""


class DataPath(NamedTuple):
    """One row: a backend with settings, and the devices that it is compared with."""

    backend: Mapping[str, object]
    by_hand: str = "vxlan"
    single: bool = False
    """Every wire packet crosses by itself, as on a network card without segmentation offload; a veth otherwise
    carries packets of 64 KB whole, which hides what each costs."""


PATHS: Mapping[str, DataPath] = {
    "vxlan": DataPath({"Type": "vxlan"}),
    "vxlan/single": DataPath({"Type": "vxlan"}, single=True),
    "host-gw": DataPath({"Type": "host-gw"}, "host-gw"),
    "udp": DataPath({"Type": "udp"}),
    "udp/kernel": DataPath({"Type": "udp", "DataPath": "kernel"}),
    "udp/kernel/single": DataPath({"Type": "udp", "DataPath": "kernel"}, single=True),
    "udp/gso": DataPath({"Type": "udp", "DataPath": "gso"}),
    "udp/basic": DataPath({"Type": "udp", "DataPath": "basic"}),
}
"""Rows by the name under which they are reported; ``--backend`` picks them by what stands before the slash."""

ONE_BY_ONE = ("tso", "tx-udp-segmentation", "tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation")
"""Offloads that let one buffer stand for many packets of the wire (ethtool names)."""


def throughput(command: Command, path: DataPath) -> Iterator[tuple[str, float | None]]:
    """One TCP stream for 3 s, through each.

    Raises:
        ConfigError: a tool is not installed.
    """
    for tool in ("iperf3", *(["ethtool"] if path.single else [])):
        if not shutil.which(tool):
            raise ConfigError(f"throughput is measured with {tool}: apt-get install {tool}")
    with ExitStack() as stack:
        ours = stack.enter_context(Lab(_spec(path.backend, command)))
        hand = Lab(_spec({"Type": path.by_hand}, command))
        stack.callback(hand.down)
        hand.up(daemons=False)
        _set_up_by_hand(hand, path.by_hand)
        for lab in (ours, hand):
            if path.single:
                _packets_one_by_one(lab)
            _tcp(lab, 1)  # warm: tables, windows, caches
        measured, reference = _tcp(ours, SECONDS), _tcp(hand, SECONDS)
        yield "tcp", measured
        yield "tcp_by_hand", reference
        yield "tcp_share", measured / reference


def _spec(backend: Mapping[str, object], command: Command) -> LabSpec:
    return LabSpec(lab_name(), hosts=2, backend=backend, daemon=command.argv, daemon_flags=NO_FIREWALL, ephemeral=True)


def _set_up_by_hand(lab: Lab, kind: str) -> None:
    """What the daemon would set up, by iproute2: nothing more, nothing less."""
    macs = {1: "02:00:00:00:00:01", 2: "02:00:00:00:00:02"}
    for host in lab.hosts:
        host.daemon.subnet_file.write_text(
            f"FLANNEL_NETWORK={POD_NETWORK}\nFLANNEL_SUBNET=10.244.{host.number}.1/24\n"
            f"FLANNEL_MTU={MTU[kind]}\nFLANNEL_IPMASQ=true\n"
        )
        peer = 3 - host.number
        far = lab.host(peer).address()
        if kind == "host-gw":
            host.ip("route", "add", f"10.244.{peer}.0/24", "via", far)
            continue
        device, base = "flannel.1", f"10.244.{peer}.0"
        host.ip("link", "add", device, "address", macs[host.number], "mtu", str(MTU[kind]), "type", "vxlan",
                "id", "1", "dev", "eth0", "local", host.address(), "dstport", "8472", "nolearning")  # fmt: skip
        host.ip("addr", "add", f"10.244.{host.number}.0/32", "dev", device)
        host.ip("link", "set", device, "up")
        host.run("bridge", "fdb", "add", macs[peer], "dev", device, "dst", far)
        host.ip("neigh", "add", base, "lladdr", macs[peer], "dev", device)
        host.ip("route", "add", f"{base}/24", "via", base, "dev", device, "onlink")
    lab.attach_pods()


def _packets_one_by_one(lab: Lab) -> None:
    for host in lab.hosts:
        switches = [word for offload in ONE_BY_ONE for word in (offload, "off")]
        host.run("ethtool", "-K", "eth0", *switches, "gro", "on")


def _tcp(lab: Lab, seconds: int) -> float:
    """Gbit/s of one stream from pod 1 to pod 2, as received."""
    target = lab.host(2).pod
    server = subprocess.Popen(target.command("iperf3", "-s", "-1", "--forceflush"), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        while (line := server.stdout.readline()) and "listening" not in line:
            pass
        argv = ["iperf3", "-J", "-t", str(seconds), "-c", lab.host(2).pod_address()]
        done = lab.host(1).pod.run(*argv, timeout_s=seconds + 20)
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (KeyError, ValueError) as error:
        raise Unavailable(f"iperf3 gave no result: {error}") from error
    finally:
        server.kill()
        server.communicate()
