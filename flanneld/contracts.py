"""Every seam of the daemon on one page: what each part needs from its neighbours.

``Store`` and ``TrafficManager`` have one implementation per lease store and per firewall tool;
``Backend`` one per data path; ``Kernel`` a real one and a fake that the same scenarios verify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from flanneld.errors import KernelError
from flanneld.model.addr import IP, MAC, Family, Prefix
from flanneld.model.host import ExtIface
from flanneld.model.lease import Changed, Claim, Lease, LeaseAttrs, LeaseTable, OwnLease
from flanneld.model.netconf import NetConf
from flanneld.model.objects import Neighbour
from flanneld.model.state import Desired, State
from flanneld.plan.diff import Op
from flanneld.plan.ownership import Ownership
from flanneld.plan.traffic import TrafficRules as TrafficRules  # part of this page

Wake = Callable[[str], None]
"""Tell the reconcile loop that something may have changed; the text is the reason, a hint only."""


class Store(Protocol):
    """Where the network configuration and the leases live: etcd or Kubernetes."""

    allocates: bool
    """Whether subnets are cut out of ``Network`` by ``SubnetLen``; False where a controller names them
    (contract 9.5, 9.15)."""

    @property
    def own(self) -> OwnLease | None:
        """Our lease as last confirmed; stays what it was while the store is away."""
        ...

    @property
    def mark(self) -> str:
        """What tells this store, at this point of its history, from another one or an older state of it."""
        ...

    def expect(self, mark: str) -> None:
        """The mark that an earlier run saw last: a store that lies behind it was replaced."""
        ...

    async def read_config(self) -> bytes:
        """The network configuration as stored.

        Raises:
            Unavailable: the store cannot be asked now.
            ConfigError: there is none; the sentence says how to write one.
        """
        ...

    async def follow_config(self, changed: Callable[[bytes], None]) -> None:
        """Call ``changed`` with each new text of the configuration, for ever."""
        ...

    def tell_trouble(self, tell: Callable[[str | None], None]) -> None:
        """Have ``tell`` called with what keeps the store from being followed, and with None when nothing does."""
        ...

    async def acquire(self, conf: NetConf, claim: Claim) -> OwnLease:
        """Lease a subnet, trying for as long as it takes and logging what is waited for.

        Raises:
            ConfigError: it can never work with this configuration (no subnets in the range at all, the
                subnet that was named for us lies outside of it).
        """
        ...

    async def operator_addresses(self) -> tuple[IP | None, IP | None]:
        """The public addresses (IPv4, IPv6) that an operator has set for this host in the store; they go
        before flags (contract 9.3).

        Raises:
            Unavailable: the store cannot be asked now.
        """
        ...

    async def network_is_up(self) -> None:
        """Containers can be started here: tell those who wait for it (contract 9.22); returns when that is done."""
        ...

    async def keep(self, changed: Changed) -> None:
        """Renew our lease and guard its key, for ever; ``changed`` is told as soon as it is known to be ours.

        Raises:
            LeaseLost: another host holds our subnet now. Called again it looks whether that is still so, or leases
                another one where it is so for good.
            LeaseMoved: we have another subnet.
        """
        ...

    async def publish(self, attrs: LeaseAttrs) -> None:
        """Write new attributes (new address, new MAC) to our key, by compare-and-swap."""
        ...

    async def follow(self, table: LeaseTable, changed: Changed) -> None:
        """Keep ``table`` equal to the store, for ever: one list, then the watch."""
        ...

    async def catch_up(self, table: LeaseTable) -> bool:
        """Put leases into ``table`` that were written but whose news is still under way; tells whether any.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        ...

    def reload(self) -> None:
        """Read certificates and credentials again (SIGHUP)."""
        ...

    async def close(self) -> None:
        """Let go of connections. Leases stay (contract 0.4)."""
        ...


class TrafficManager(Protocol):
    """One firewall tool: nftables or iptables."""

    name: str

    async def ensure(self, wanted: Sequence[TrafficRules]) -> Sequence[str]:
        """Make our rules equal to ``wanted`` (at most one per family) and nobody else's different.

        Returns:
            One sentence per change made; empty when everything was right already.

        Raises:
            KernelError: the rules could not be put in place.
        """
        ...

    async def remove(self) -> Sequence[str]:
        """Remove every rule, chain and table that flannel (ours or Go's) made with this tool."""
        ...

    def watch(self, wake: Wake) -> None:
        """Begin to call ``wake`` when somebody else changes our rules."""
        ...

    def close(self) -> None:
        """Stop watching. Rules stay (contract 0.4)."""
        ...


class Failure(NamedTuple):
    """An operation that the kernel refused."""

    op: Op
    error: KernelError


class Kernel(Protocol):
    """What the reconcile loop needs of a kernel; ``tests/support/fake_kernel.py`` is the other one."""

    async def read(self, own: Ownership, settings: Iterable[str]) -> State:
        """Everything of ours, what stands in our way, and the present values of some settings."""
        ...

    def onlink(self, addresses: Sequence[IP]) -> dict[IP, str]:
        """By address, the interface through which the kernel reaches it without a gateway; others are absent."""
        ...

    async def apply(self, ops: Sequence[Op]) -> list[Failure]:
        """Do all operations in order; one that fails does not stop the rest."""
        ...


class Runner(Protocol):
    """What moves packets beside the kernel's tables, for backends that need more than entries in them."""

    def prepare(self) -> None:
        """Make the devices that the planner expects; before each full look.

        Raises:
            KernelError: they cannot be made.
        """
        ...

    def apply(self) -> None:
        """Take the data path's present peers and interface; after each cycle.

        Raises:
            KernelError: refused; the next cycle tries again.
        """
        ...

    def status(self) -> str:
        """How packets are moved, for people."""
        ...

    def close(self) -> None:
        """The daemon ends; whatever can go on without it does (contract 0.4)."""
        ...


class DataPath(Protocol):
    """A backend at work on this host: what should be, and the answers to the kernel's questions. Pure."""

    desired: Desired
    """Everything wanted at this moment; changes in place."""
    own: Ownership
    runner: Runner | None

    @property
    def watches_routes(self) -> bool:
        """Whether routes of others decide something, so that their changes wake the loop."""
        ...

    def public_addresses(self, leases: Iterable[Lease]) -> Sequence[IP]:
        """Addresses whose routes decide something."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether ``desired`` lacks nothing but changed leases; False at first and after a configuration."""
        ...

    def settle(
        self, leases: Mapping[str, Lease], observed: State, direct: Mapping[IP, str], *, fill: bool
    ) -> dict[str, str]:
        """Take all leases into ``desired``; returns, by lease, why it is not used."""
        ...

    def update(self, changes: Mapping[str, Lease | None], direct: Mapping[IP, str]) -> dict[str, str]:
        """Take changed leases (None = gone) into ``desired``; returns as ``settle``."""
        ...

    def is_unknown(self, device: str, ip: IP | None) -> bool:
        """Whether an address lies in space that anybody might have leased just now."""
        ...

    def answer(self, asked: Iterable[tuple[str, IP | None, MAC | None]]) -> list[Op]:
        """What to write for the kernel's questions: the way to a peer, or a refusal."""
        ...

    def answer_is_right(self, entry: Neighbour) -> bool:
        """Whether a non-permanent neighbour on our device may stay."""
        ...

    def page_out(self, device: str, idle_s: Mapping[MAC, float], answered: Iterable[Neighbour]) -> list[Op]:
        """Which idle peers of a device to take out of the tables; none where nothing is paged."""
        ...

    def wants_page_out(self) -> Sequence[str]:
        """Devices that hold more peers than they should."""
        ...

    def configure(self, ext: ExtIface) -> None:
        """Take an external interface that changed.

        Raises:
            ConfigError: it cannot work on this interface; nothing was changed.
        """
        ...

    def isolate(self, on: bool) -> None:
        """Have no peers and let nothing into the network from here, or serve as before; a full cycle has to follow.

        Containers of this host keep their addresses, each other and the outside.
        """
        ...


@runtime_checkable
class Tunnel(Protocol):
    """What a data path has beside ``DataPath`` when the kernel wraps its packets in UDP and a network card may be
    left the checksums inside (failures F03)."""

    @property
    def tunnel_port(self) -> int:
        """UDP port that peers send to."""
        ...

    @property
    def may_distrust_card(self) -> bool:
        """Whether checksums are still left to the card, and the operator leaves it to us to change that."""
        ...

    def distrust_card(self) -> None:
        """From now on have checksums filled in before packets enter the tunnel; a full cycle has to follow."""
        ...


class Surroundings(NamedTuple):
    """What a data path is built on, besides the network configuration."""

    ext: ExtIface
    subnets: Mapping[Family, Prefix]
    """Our own, by family."""
    alias: str
    """``ifalias`` that marks our devices."""
    previous_networks: tuple[Prefix, ...]
    """Cluster networks of the previous run, so that what is left of it is known as ours."""
    blackhole: bool
    """``--ip-blackhole-route``."""
    republish: Callable[[], None] = lambda: None
    """To be called when ``lease_attrs`` says something else than before."""
    look: Wake = lambda _reason: None
    """To be called when something of the data path broke."""
    repaired: Callable[[str], None] = lambda _text: None
    """To be called with one sentence when the runner has put back what somebody else had taken away."""
    remark: Callable[[Sequence[str]], None] = lambda _sentences: None
    """To be called with all that works and is not as it should be, a sentence each, whenever that changes."""


class Backend(Protocol):
    """One kind of data path, configured. Made by ``backends.create``."""

    def lease_attrs(self, ext: ExtIface, identity: str) -> LeaseAttrs:
        """What this host publishes."""
        ...

    def mtu(self, ext: ExtIface) -> int:
        """Largest packet a container may send, in bytes (contract 6.2).

        Raises:
            ConfigError: too little remains on this interface.
        """
        ...

    def data_path(self, around: Surroundings) -> DataPath:
        """Begin work on this host.

        Raises:
            ConfigError: it cannot work on this interface.
        """
        ...

    def reconfigure(self, conf: NetConf, path: DataPath) -> None:
        """Take a changed network configuration while running.

        Raises:
            ConfigError: the change needs a restart; names the key. Nothing was changed.
        """
        ...
