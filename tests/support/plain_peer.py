"""A host whose udp backend is as plain as Go flanneld's: one bare packet a datagram, in user space, nothing else.

It stands for a Go flanneld on the wire (contract 6.48 to 6.52): TTL less one each way, any sender believed, no
offloads understood, so a checksum that somebody left to hardware stays wrong and the packet is lost, as it would be
there. Its lease carries neither type nor data (contract 3.17). Written apart from the code it is to test.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import select
import socket
import struct
import threading
from types import TracebackType

from flanneld.lab import Lab
from flanneld.lab.netns import run_in
from flanneld.lab.spec import POD_NETWORK, SUBNETS_KEY
from flanneld.model.addr import Family

PORT, MTU = 8285, 1472


class PlainPeer:
    """Runs the proxy of one lab host, whose daemon is not started, in a thread.

    Args:
        lab: where it lives.
        number: of the host, from 1.
    """

    def __init__(self, lab: Lab, number: int) -> None:
        self._lab, self._host = lab, lab.host(number)
        self._subnet = f"10.244.{100 + number}"
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> PlainPeer:
        self._tun = run_in(self._host.netns, _open_tun)
        for command in (
            f"addr add {self._subnet}.0/32 dev flannel0",
            f"link set flannel0 mtu {MTU} up",
            f"route add {POD_NETWORK} dev flannel0",
        ):
            self._host.ip(*command.split())
        self._sock = run_in(self._host.netns, lambda: _bound(self._host.address(Family.V4)))
        self._host.daemon.subnet_file.write_text(
            f"FLANNEL_NETWORK={POD_NETWORK}\nFLANNEL_SUBNET={self._subnet}.1/24\nFLANNEL_MTU={MTU}\n"
        )
        self._host.attach_pod()
        lease = json.dumps({"PublicIP": self._host.address(Family.V4), "PublicIPv6": None}, separators=(",", ":"))
        self._lab.etcd.put(f"{SUBNETS_KEY}{self._subnet}.0-24", lease)
        self._peers = {
            ipaddress.ip_network(key.removeprefix(SUBNETS_KEY).replace("-", "/")): json.loads(value)["PublicIP"]
            for key, value in self._lab.etcd.items(SUBNETS_KEY).items()
        }
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._stopper)  # hangs up the reading end
        self._thread.join()
        self._sock.close()
        for descriptor in (self._tun, self._stop):
            os.close(descriptor)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._tun, self._sock.fileno(), self._stop], [], [])
            if self._stop in ready:
                return
            if self._tun in ready:
                self._send(bytearray(os.read(self._tun, 65536)))
            if self._sock.fileno() in ready:
                packet = bytearray(self._sock.recv(65536))
                if len(packet) >= 20 and _one_hop_less(packet):
                    os.write(self._tun, packet)

    def _send(self, packet: bytearray) -> None:
        if packet[0] >> 4 != 4 or not _one_hop_less(packet):
            return
        destination = ipaddress.ip_address(bytes(packet[16:20]))
        for subnet, address in self._peers.items():
            if destination in subnet:
                self._sock.sendto(packet, (address, PORT))


def _open_tun() -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    iff_tun, iff_no_pi, tunsetiff = 0x0001, 0x1000, 0x400454CA  # include/uapi/linux/if_tun.h
    fcntl.ioctl(descriptor, tunsetiff, struct.pack("=16sH22x", b"flannel0", iff_tun | iff_no_pi))
    return descriptor


def _bound(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, PORT))
    return sock


def _one_hop_less(packet: bytearray) -> bool:
    """Decrement the TTL and sum the header anew; False when the packet has reached its end."""
    packet[8] -= 1
    packet[10:12] = bytes(2)
    header = packet[: (packet[0] & 15) * 4]
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet[10:12] = struct.pack("!H", ~total & 0xFFFF)
    return packet[8] > 0
