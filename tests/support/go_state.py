"""What Go flanneld does to a host at start, done by the contract's clauses with ordinary tools.

Go flanneld writes everything while it starts and then only when leases change; when it ends, all of it stays
(contract 0.4). So its start is all that a test of swapping needs. ``FLANNELD_GO`` names a real binary instead.

Not here, because no swap depends on it: renewals, the watch, IPv6, and retries.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.spec import CONFIG_KEY, SUBNETS_KEY
from flanneld.model.addr import Prefix
from flanneld.model.subnet_env import SubnetEnv

BINARY = shutil.which(os.environ.get("FLANNELD_GO", ""))
LEASE_S = 86400  # contract 3.19


class GoFlanneld(Protocol):
    """A Go flanneld on one host of a lab."""

    def start(self) -> None:
        """Start it and wait until its peers are programmed."""
        ...

    def stop(self) -> None:
        """Stop it; what it made stays."""
        ...


def go_flanneld(lab: Lab, number: int) -> GoFlanneld:
    """The real one where the environment names it, else the one that acts by the contract."""
    return RealGo(lab.host(number)) if BINARY else SimulatedGo(lab, number)


class RealGo:
    """The binary that ``FLANNELD_GO`` names, started in place of our daemon."""

    def __init__(self, host: Host) -> None:
        self._daemon = host.daemon

    def start(self) -> None:
        """See ``GoFlanneld``."""
        self._daemon.command = (str(BINARY),)
        self._daemon.start()
        self._daemon.wait_ready()

    def stop(self) -> None:
        """See ``GoFlanneld``."""
        self._daemon.stop()
        self._daemon.command = ()


class Peer(NamedTuple):
    """Another host, from its lease."""

    subnet: str
    address: str
    data: Mapping[str, object]


class SimulatedGo:
    """Go flanneld's start, for the backends vxlan and host-gw with IPv4."""

    def __init__(self, lab: Lab, number: int) -> None:
        self._lab, self._host = lab, lab.host(number)
        config = json.loads(lab.etcd.get(CONFIG_KEY) or "{}")
        self._network: str = config["Network"]
        self._backend: dict[str, object] = config["Backend"]
        self._nftables = bool(config.get("EnableNFTables"))

    def start(self) -> None:
        """See ``GoFlanneld``."""
        if self._backend["Type"] == "vxlan":
            self._vxlan_device()
        subnet = self._lease()
        if self._backend["Type"] == "vxlan":
            self._address(subnet)
        (self._nft_rules if self._nftables else self._iptables_rules)(self._network, str(subnet))
        self._subnet_env(subnet)
        programme = {"vxlan": self._tunnel, "host-gw": self._route}[str(self._backend["Type"])]
        for peer in self.peers():
            programme(peer)

    def stop(self) -> None:
        """See ``GoFlanneld``: nothing is taken away (contract 0.4)."""

    # ---- leases -----------------------------------------------------------------------------------

    def peers(self) -> list[Peer]:
        """All leases of other hosts of this backend (contract 3.33, 6.3)."""
        found = []
        for key, value in self._lab.etcd.items(SUBNETS_KEY).items():
            lease = json.loads(value)
            if lease["PublicIP"] != self._host.address() and lease.get("BackendType") == self._backend["Type"]:
                subnet = key.removeprefix(SUBNETS_KEY).replace("-", "/")
                found.append(Peer(subnet, lease["PublicIP"], lease.get("BackendData", {})))
        return found

    def _lease(self) -> Prefix:
        """Whose PublicIP is ours is ours and is overwritten; else subnet.env; else a free one (contract 3.20)."""
        etcd, own = self._lab.etcd, self._host.address()
        value = {"PublicIP": own, "PublicIPv6": None, "BackendType": self._backend["Type"]}
        if self._backend["Type"] == "vxlan":
            value["BackendData"] = {"VNI": 1, "VtepMAC": self._link()["address"]}
        keys = etcd.items(SUBNETS_KEY)
        before = self._host.subnet_env().get("FLANNEL_SUBNET", "").replace(".1/", ".0-")
        mine = next((key for key, text in keys.items() if json.loads(text)["PublicIP"] == own), "")
        free = (f"{SUBNETS_KEY}10.244.{number}.0-24" for number in range(90, 100))
        key = mine or (SUBNETS_KEY + before if before else next(key for key in free if key not in keys))
        grant = etcd.ctl("lease", "grant", str(LEASE_S)).split()[1]
        etcd.put(key, json.dumps(value, separators=(",", ":")), lease=grant)
        return Prefix.parse(key.removeprefix(SUBNETS_KEY).replace("-", "/"))

    def _subnet_env(self, subnet: Prefix) -> None:
        mtu = 1450 if self._backend["Type"] == "vxlan" else 1500
        env = SubnetEnv(Prefix.parse(self._network), subnet, None, None, mtu, ip_masq=True)
        self._host.daemon.subnet_file.write_bytes(env.render())

    # ---- vxlan ------------------------------------------------------------------------------------

    def _link(self) -> dict[str, object]:
        links: list[dict[str, object]] = json.loads(self._host.run("ip", "-j", "-d", "link", "show").stdout)
        return next((link for link in links if link["ifname"] == "flannel.1"), {})

    def _vxlan_device(self) -> None:
        """Keep a device that agrees, make any other anew with a random MAC (contract 6.9, 6.11 to 6.13)."""
        if self.device_complaint() == "":
            return
        if self._link():
            self._host.ip("link", "del", "flannel.1")
        mac = ":".join(f"{octet:02x}" for octet in (0x0E, *secrets.token_bytes(5)))
        self._host.ip(
            *("link", "add", "flannel.1", "address", mac, "mtu", "1450", "txqueuelen", "0", "type", "vxlan"),
            *("id", "1", "dev", "eth0", "local", self._host.address(), "dstport", "8472", "nolearning"),
        )
        self._host.run("sysctl", "-qw", "net/ipv6/conf/flannel.1/accept_ra=0", check=False)

    def device_complaint(self) -> str:
        """Why Go would not keep the device that is there; empty when it would (contract 6.12)."""
        link = self._link()
        info = link.get("linkinfo") or {}
        if not isinstance(info, dict) or info.get("info_kind") != "vxlan":
            return "no vxlan device"
        data = info["info_data"]
        wanted = {"id": 1, "link": "eth0", "local": self._host.address(), "port": 8472}
        different = [key for key, value in wanted.items() if data.get(key, value) != value]
        return " ".join([*different, *(key for key in ("l2miss", "gbp", "group") if data.get(key))])

    def _address(self, subnet: Prefix) -> None:
        """Contract 6.14."""
        base = f"{str(subnet).partition('/')[0]}/32"
        network = Prefix.parse(self._network)
        for line in self._host.ip("-o", "-4", "addr", "show", "dev", "flannel.1").splitlines():
            there = line.split()[3]
            if there != base and network.covers(Prefix.parse(there)):
                self._host.ip("addr", "del", there, "dev", "flannel.1")
        self._host.ip("addr", "replace", base, "dev", "flannel.1")
        self._host.ip("link", "set", "flannel.1", "up")

    def _tunnel(self, peer: Peer) -> None:
        """Contract 6.15."""
        base, mac = peer.subnet.partition("/")[0], str(peer.data["VtepMAC"])
        self._host.ip("neigh", "replace", base, "lladdr", mac, "nud", "permanent", "dev", "flannel.1")
        self._host.run(*("bridge", "fdb", "replace", mac, "dev", "flannel.1", "dst", peer.address, "self", "permanent"))
        self._host.ip("route", "replace", peer.subnet, "via", base, "dev", "flannel.1", "onlink")

    # ---- host-gw ----------------------------------------------------------------------------------

    def _route(self, peer: Peer) -> None:
        """Contract 6.24, 6.27: whatever else has the destination is deleted; what agrees is kept."""
        for _ in range(2):
            there = self._routes(peer)
            if not there or self._agrees(there[0], peer):
                break
            self._host.ip("route", "del", peer.subnet)
        if not self._routes(peer):
            self._host.ip("route", "add", peer.subnet, "via", peer.address, "dev", "eth0")

    def remove_route(self, peer: Peer) -> None:
        """A peer's lease is gone: delete by destination, gateway and device, whatever the protocol (contract 6.25)."""
        self._host.ip("route", "del", peer.subnet, "via", peer.address, "dev", "eth0")

    def _routes(self, peer: Peer) -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads(self._host.ip("-j", "route", "show", "exact", peer.subnet))
        return found

    def _agrees(self, route: Mapping[str, object], peer: Peer) -> bool:
        return (route.get("gateway"), route.get("dev")) == (peer.address, "eth0")

    # ---- rules ------------------------------------------------------------------------------------

    def _iptables_rules(self, network: str, subnet: str) -> None:
        """Chains made or flushed; then one restore with a delete before each append (contract 8.6, 8.7)."""
        for table, chain, rules in iptables_rules(network, subnet):
            made = self._host.run("iptables", "-w", "-t", table, "-N", chain, check=False)
            if made.returncode:
                self._host.run("iptables", "-w", "-t", table, "-F", chain)
            lines = []
            for rule in rules:
                exists = self._host.run("sh", "-c", f"iptables -w -t {table} -C {rule}", check=False).returncode == 0
                lines += [f"-D {rule}", f"-A {rule}"] if exists else [f"-A {rule}"]
            text = "\n".join([f"*{table}", *lines, "COMMIT", ""])
            self._host.run("iptables-restore", "--noflush", "-w", stdin=text)

    def _nft_rules(self, network: str, subnet: str) -> None:
        """Both tables always; chains flushed and refilled in one transaction (contract 8.14 to 8.18)."""
        self._host.run("nft", "-f", "-", stdin=nft_file(network, subnet))


def iptables_rules(network: str, subnet: str) -> list[tuple[str, str, list[str]]]:
    """Table, chain and rules of both kinds, the jump first, as contract 8.2 and 8.5 list them."""
    masq, forward = '-m comment --comment "flanneld masq"', '-m comment --comment "flanneld forward"'
    postrtg = "FLANNEL-POSTRTG"
    return [
        (
            "nat",
            postrtg,
            [
                f"POSTROUTING {masq} -j {postrtg}",
                f"{postrtg} -m mark --mark 0x4000/0x4000 {masq} -j RETURN",
                f"{postrtg} -s {subnet} -d {network} {masq} -j RETURN",
                f"{postrtg} -s {network} -d {subnet} {masq} -j RETURN",
                f"{postrtg} ! -s {network} -d {subnet} {masq} -j RETURN",
                f"{postrtg} -s {network} ! -d 224.0.0.0/4 {masq} -j MASQUERADE --random-fully",
                f"{postrtg} ! -s {network} -d {network} {masq} -j MASQUERADE --random-fully",
            ],
        ),
        (
            "filter",
            "FLANNEL-FWD",
            [
                f"FORWARD {forward} -j FLANNEL-FWD",
                f"FLANNEL-FWD -s {network} {forward} -j ACCEPT",
                f"FLANNEL-FWD -d {network} {forward} -j ACCEPT",
            ],
        ),
    ]


def nft_file(network: str, subnet: str) -> str:
    """One ``nft -f`` transaction with Go flanneld's rules, as contract 8.14 to 8.18 list them."""
    table = "ip flannel-ipv4"
    return f"""\
add table ip6 flannel-ipv6 {{ comment "rules for flannel-ipv6" ; }}
add table {table} {{ comment "rules for flannel-ipv4" ; }}
add chain {table} postrtg {{ type nat hook postrouting priority 100 ; policy accept ; }}
add chain {table} forward {{ type filter hook forward priority 0 ; policy accept ; }}
flush chain {table} postrtg
flush chain {table} forward
add rule {table} postrtg meta mark 0x4000 return
add rule {table} postrtg ip saddr {subnet} ip daddr {network} return
add rule {table} postrtg ip saddr {network} ip daddr {subnet} return
add rule {table} postrtg ip saddr != {subnet} ip daddr {network} return
add rule {table} postrtg ip saddr {network} ip daddr != 224.0.0.0/4 masquerade fully-random
add rule {table} postrtg ip saddr != {network} ip daddr {network} masquerade fully-random
add rule {table} forward ip saddr {network} accept
add rule {table} forward ip daddr {network} accept
"""
