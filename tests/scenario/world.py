"""One host for scenarios: leases in, kernel state as text out; on a fake kernel or the real one."""

from __future__ import annotations

from collections.abc import Iterable

from backends.vxlan import VxlanConf
from backends.vxlan_net import IDLE_S, VxlanNetwork
from flanneld.contracts import Kernel, Surroundings
from flanneld.model.addr import MAC, Family, Prefix, parse_ip, parse_mac
from flanneld.model.host import ExtIface
from flanneld.model.lease import Lease, LeaseAttrs, LeaseTable
from flanneld.model.lease_codec import render_key
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.objects import Link
from flanneld.model.state import State
from flanneld.reconcile import LEASES, Reconciler, Tell
from flanneld.wake import Wake

NETWORK = Prefix.parse("10.244.0.0/16")
OWN = Prefix.parse("10.244.1.0/24")
OWN_IP = parse_ip("198.18.0.1")
OWN_MAC = parse_mac("02:00:00:00:00:01")


def peer(number: int, *, mac: str = "", ip: str = "", backend: str = "vxlan", revision: int = 0) -> Lease:
    """The lease of peer N: subnet 10.244.N.0/24, host 198.18.0.N, VTEP 02:00:00:00:00:NN."""
    data = b'{"VNI":1,"VtepMAC":"%s"}' % (mac or f"02:00:00:00:00:{number:02x}").encode()
    attrs = LeaseAttrs(parse_ip(ip or f"198.18.0.{number}"), None, backend, data)
    return Lease(Prefix.parse(f"10.244.{number}.0/24"), None, attrs, revision)


class Host:
    """A reconcile loop without its timers: ``settle`` runs cycles until nothing is left to do."""

    def __init__(
        self,
        kernel: Kernel,
        ifindex: int,
        *,
        page_ahead: int = 8192,
        direct_routing: bool = False,
        idle_limit_s: float = IDLE_S,
    ) -> None:
        conf = parse_netconf(b'{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}')
        ext = ExtIface("eth0", ifindex, 1500, OWN_IP, None, OWN_IP, None)
        around = Surroundings(ext, {Family.V4: OWN}, "flanneld /coreos.com/network", (), False)
        settings = VxlanConf(page_ahead=page_ahead, direct_routing=direct_routing)
        macs: dict[Family, MAC] = {Family.V4: OWN_MAC}
        self.path = VxlanNetwork(conf, settings, macs, around, idle_limit_s)
        self.kernel = kernel
        self.table = LeaseTable()
        self.problem: str | None = None
        self.wake = Wake()
        self.reconciler = Reconciler(kernel, self.path, self.table, self.wake, Tell(self._take_problem))

    def _take_problem(self, problem: str | None) -> None:
        self.problem = problem

    def lease(self, leases: Iterable[Lease]) -> None:
        """Replace what the store holds."""
        mine = Lease(OWN, None, LeaseAttrs(OWN_IP, None, "vxlan", b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}'))
        every = {render_key(lease.subnet, lease.subnet6): lease for lease in (mine, *leases)}
        self.table.replace_all(every, 1)
        self.wake(LEASES)

    async def look(self) -> int:
        """Settle after a full look, as after a notification that says little."""
        self.wake("test")
        return await self.settle()

    async def settle(self) -> int:
        """Run cycles as the loop would, until nothing wakes it any more; returns how many it took."""
        self.wake(LEASES)
        for count in range(10):
            reasons = await self.wake.wait(0)
            if not reasons.names:
                assert await self.unsettled() == []
                return count
            if await self.reconciler.cycle(reasons):
                self.wake("retry")
        raise AssertionError(f"still something to do after many cycles: {self.problem}")

    async def unsettled(self) -> list[str]:
        """What differs between desired and observed, as text."""
        observed = await self.kernel.read(self.path.own, self.path.desired.sysctls)
        return sorted(str(obj) for obj in self.path.desired if obj not in observed)

    async def text(self) -> str:
        """What is ours in the kernel, as an operator would write it down; settings left out."""
        observed = await self.kernel.read(self.path.own, ())
        state = State.of(obj for obj in observed if self.path.own.owns(obj))
        for link in list(state.links.values()):
            if link.vxlan:
                state.add(Link(*link[:5], link.vxlan._replace(lower=0)))
        return str(state)


def base(*more: str) -> str:
    """Expected text: what is there without any peer, plus the lines given."""
    lines = [
        "address 10.244.1.0/32 dev flannel.1",
        "link flannel.1 02:00:00:00:00:01 mtu 1450 up vxlan id 1 local 198.18.0.1 dev 0 port 8472",
        "route 10.244.0.0/16 dev flannel.1",
        *more,
    ]
    return "\n".join(sorted(lines))


def tunnelled(number: int, *, mac: str = "", ip: str = "") -> list[str]:
    """Expected lines for a peer behind the tunnel."""
    mac, ip = mac or f"02:00:00:00:00:{number:02x}", ip or f"198.18.0.{number}"
    return [
        f"fdb {mac} dst {ip} dev flannel.1",
        f"neighbour 10.244.{number}.0 lladdr {mac} permanent dev flannel.1",
        f"route 10.244.{number}.0/24 via 10.244.{number}.0 dev flannel.1 onlink",
    ]
