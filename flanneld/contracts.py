"""Every seam of the daemon on one page: what each part needs from its neighbours.

``Store`` and ``TrafficManager`` have one implementation per lease store and per firewall tool;
``Backend`` one per data path; ``Kernel`` a real one and a fake that the same scenarios verify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from flanneld.errors import KernelError
from flanneld.model.addr import IP, Prefix
from flanneld.model.lease import Changed, LeaseAttrs, LeaseTable, OwnLease
from flanneld.model.netconf import NetConf
from flanneld.model.state import State
from flanneld.plan.diff import Op
from flanneld.plan.ownership import Ownership

Wake = Callable[[str], None]
"""Tell the reconcile loop that something may have changed; the text is the reason, a hint only."""


class Claim(NamedTuple):
    """What we ask the store for."""

    attrs: LeaseAttrs
    """Our value, complete (contract 13.3); ``attrs.identity`` is this machine's."""
    previous: tuple[Prefix | None, Prefix | None]
    """Subnets (IPv4, IPv6) from subnet.env or the state directory; (None, None) = none known."""


class Store(Protocol):
    """Where the network configuration and the leases live: etcd, later Kubernetes."""

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

    async def acquire(self, conf: NetConf, claim: Claim) -> OwnLease:
        """Lease a subnet, trying for as long as it takes and logging what is waited for.

        Raises:
            ConfigError: it can never work (credentials refused, no subnets in the range at all).
        """
        ...

    async def keep(self, changed: Changed) -> None:
        """Renew our lease and guard its key, for ever.

        Raises:
            LeaseLost: another host holds our subnet now.
        """
        ...

    async def publish(self, attrs: LeaseAttrs) -> None:
        """Write new attributes (new address, new MAC) to our key, by compare-and-swap."""
        ...

    async def follow(self, table: LeaseTable, changed: Changed) -> None:
        """Keep ``table`` equal to the store, for ever: one list, then the watch."""
        ...

    async def close(self) -> None:
        """Let go of connections. Leases stay (contract 0.4)."""
        ...


class TrafficRules(NamedTuple):
    """Firewall rules wanted for one family (contract section 8)."""

    network: Prefix
    """C, the cluster network."""
    subnet: Prefix
    """P, our own subnet, host bits cleared."""
    masquerade: bool
    """``--ip-masq``."""
    fully_random: bool
    """Ask for port randomisation; dropped when the tool or kernel lacks it."""
    forward: bool
    """``--iptables-forward-rules``."""


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
