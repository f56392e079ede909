"""From nothing to a lease: what has to be known before the daemon can begin to work.

Configuration, external interface, backend, lease, in this order; waits for whatever passes, and says for
what; what can never work raises ``ConfigError`` (contract 0.1 steps 9 to 14).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import backends
from flanneld.contracts import Backend, Store, Surroundings
from flanneld.errors import ConfigError, KernelError, Unavailable
from flanneld.kernel import procfs
from flanneld.kernel.host_net import read_host_net
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.addr import IP, Family, Prefix, format_ip
from flanneld.model.host import ExtIface, HostNet, IfaceWish
from flanneld.model.lease import Claim
from flanneld.model.netconf import FamilyConf, NetConf
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.options import Options
from flanneld.plan.bridges import misplaced
from flanneld.plan.extiface import select
from flanneld.plan.overlap import Mine
from flanneld.preflight import look_for_overlaps
from flanneld.report.state_dir import StateDir
from flanneld.report.subnet_file import SubnetFile
from flanneld.retry import backoff
from flanneld.sources.outage import Outage

log = logging.getLogger("flanneld")

_ALIAS_BYTES = 255
"""Source: include/uapi/linux/if.h, IFALIASZ, which counts a NUL."""


@dataclass(slots=True)
class Standing:
    """What this host is and has. Configuration and interface may change while it runs, the rest stays."""

    identity: str
    """Who we are; 32 hex digits."""
    conf: NetConf
    wish: IfaceWish
    """What the operator said about the interface."""
    ext: ExtIface
    backend: Backend
    subnets: Mapping[Family, Prefix]
    """Our lease."""
    former_networks: tuple[Prefix, ...]
    """Cluster networks that an earlier run wrote into subnet.env."""
    told_overlaps: frozenset[str] = frozenset()
    """Overlaps with networks of this host that are in the log already."""


async def start_up(
    options: Options, store: Store, state: StateDir, file: SubnetFile, kernel: Rtnl, say: Callable[[str], None]
) -> Standing:
    """Find out all that has to be known, and lease a subnet.

    Args:
        options: what the operator asked for.
        store: where configuration and leases are.
        state: what this host remembers.
        file: the subnet file, for what an earlier run left in it.
        kernel: for the devices that are there.
        say: called with what is being waited for.

    Raises:
        ConfigError: no interface, unknown backend, settings that cannot work here.
    """
    delays, told = backoff(first_s=0.5, cap_s=10.0), Told(say)
    while True:
        try:
            return await _attempt(options, store, state, file, kernel, told)
        except (Unavailable, KernelError) as exc:
            told.log(logging.ERROR, f"cannot start yet, trying again: {exc}")
            told.wait_for(str(exc), again=True)
        await asyncio.sleep(next(delays))


class Told:
    """What start-up says, each thing once however often it has to begin again."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._shown = ""
        self._waited: set[str] = set()
        self._logged: set[str] = set()

    def wait_for(self, text: str, *, again: bool = False) -> None:
        """Show what is being waited for; ``again``: also if it was shown before something else."""
        if text == self._shown or (text in self._waited and not again):
            return
        self._shown = text
        self._waited.add(text)
        self._say(text)

    def log(self, level: int, text: str) -> None:
        """Log a line that was not logged yet."""
        if text not in self._logged:
            self._logged.add(text)
            log.log(level, "%s", text)


async def _attempt(
    options: Options, store: Store, state: StateDir, file: SubnetFile, kernel: Rtnl, told: Told
) -> Standing:
    """See ``start_up``; ``Unavailable`` when the store was away, or its configuration has to change first."""
    identity = state.identity()
    told.wait_for("waiting for the network configuration")
    conf = await _wait_for_conf(store)
    wish = wish_of(options, await _operator_addresses(store))
    links = kernel.links()
    ours = frozenset(name for name, link in links.items() if link.alias == alias_of(options) or is_flannel(name))
    ext, decision = select(host_net(options), wish, conf.families(), ours)
    told.log(logging.INFO, decision)
    backend = backends.create(conf, links, identity)
    backend.mtu(ext)
    before, remembered = file.previous(), state.previous_subnets()
    known = tuple(filter(None, (before.subnet, before.subnet6, *remembered)))
    overlapping = await look_for_overlaps(options, conf, Mine(ext, ours, known, store.allocates))
    for text in overlapping:
        told.log(logging.WARNING, text)
    for text in procfs.warnings(conf.families(), ext.name, iptables=not conf.nftables):
        told.log(logging.WARNING, text)
    told.wait_for("waiting for a lease")
    previous = (before.subnet or remembered[0], before.subnet6 or remembered[1])
    try:
        own = (await store.acquire(conf, Claim(backend.lease_attrs(ext, identity), previous))).lease
    except ConfigError as exc:
        if store.allocates:
            raise
        # Ending would only be repeated by whoever starts us: the configuration file is read again instead
        raise Unavailable(str(exc)) from exc
    subnets = {f: s for f, s in zip(Family, (own.subnet, own.subnet6), strict=True) if s}
    log.info("lease acquired subnet=%s public=%s", own.name(), own.attrs.where())
    networks = [*conf.networks(), *filter(None, (before.network, before.network6))]
    for text in misplaced(host_net(options), ext.name, networks, subnets):
        log.warning("%s", text)
    state.remember(own.subnet, own.subnet6)
    return Standing(
        identity,
        conf if store.allocates else with_lengths_of(subnets, conf),
        wish,
        ext,
        backend,
        subnets,
        tuple(network for network in (before.network, before.network6) if network),
        frozenset(overlapping),
    )


async def _wait_for_conf(store: Store) -> NetConf:
    """The network configuration, however long it takes to be there and right (contract 2.5, 3.8)."""
    delays, told = backoff(cap_s=1.0), ""
    while True:
        try:
            return parse_netconf(await store.read_config(), allocates=store.allocates)
        except (Unavailable, ConfigError) as exc:
            if str(exc) != told:
                log.warning("waiting for the network configuration: %s", exc)
                told = str(exc)
        await asyncio.sleep(next(delays))


async def _operator_addresses(store: Store) -> tuple[IP | None, IP | None]:
    """What the store says about our public addresses, however long it takes to say it."""
    delays, outage = (
        backoff(cap_s=5.0),
        Outage(log, "waiting for the store of leases", "the store of leases answers"),
    )
    while True:
        try:
            addresses = await store.operator_addresses()
        except Unavailable as exc:
            outage.failed(exc)
        else:
            outage.over()
            return addresses
        await asyncio.sleep(next(delays))


def read_conf(raw: bytes, standing: Standing, *, allocates: bool) -> NetConf:
    """A changed network configuration, as this host understands it.

    Raises:
        ConfigError: it cannot be read.
    """
    conf = parse_netconf(raw, allocates=allocates)
    return conf if allocates else with_lengths_of(standing.subnets, conf)


def with_lengths_of(subnets: Mapping[Family, Prefix], conf: NetConf) -> NetConf:
    """The configuration with the length of the subnet that we were given, which ``SubnetLen`` says nothing about."""

    def fit(family: Family) -> FamilyConf | None:
        part, subnet = conf.family(family), subnets.get(family)
        return part._replace(subnet_len=subnet.length) if part and subnet else part

    return conf._replace(v4=fit(Family.V4), v6=fit(Family.V6))


def surroundings(
    options: Options,
    standing: Standing,
    republish: Callable[[], None],
    look: Callable[[str], None],
    repaired: Callable[[str], None],
    remark: Callable[[Sequence[str]], None],
) -> Surroundings:
    """What a data path is built on."""
    return Surroundings(
        standing.ext,
        standing.subnets,
        alias_of(options),
        standing.former_networks,
        options.ip_blackhole_route,
        republish,
        look,
        repaired,
        remark,
    )


def refuse_restart_keys(old: NetConf, new: NetConf, subnets: Mapping[Family, Prefix]) -> None:
    """Refuse a changed configuration that a running daemon cannot take, whatever its backend.

    Raises:
        ConfigError: what changed; the sentence says that it needs a restart.
    """
    if new.backend_type != old.backend_type:
        raise ConfigError(f"Backend.Type changed from {old.backend_type} to {new.backend_type}, which needs a restart")
    if new.families() != old.families():
        raise ConfigError("EnableIPv4 or EnableIPv6 changed, which needs a restart")
    for family, subnet in subnets.items():
        part = new.family(family)
        if part is None or not part.network.covers(subnet) or subnet.length != part.subnet_len:
            raise ConfigError(f"our subnet {subnet} does not fit the new {family.label} network, which needs a restart")


def host_net(options: Options, conf: NetConf | None = None) -> HostNet:
    """The host's network now, with the kernel's answer about ``--iface-can-reach``; with a configuration, also the
    routes into the cluster network."""
    return read_host_net([options.iface_can_reach] if options.iface_can_reach else [], conf.networks() if conf else ())


def wish_of(options: Options, in_store: tuple[IP | None, IP | None] = (None, None)) -> IfaceWish:
    """What the operator said about the external interface; addresses set in the store go before flags."""
    public_ip, public_ipv6 = in_store[0] or options.public_ip, in_store[1] or options.public_ipv6
    return IfaceWish(
        options.iface,
        options.iface_regex,
        format_ip(options.iface_can_reach) if options.iface_can_reach else "",
        format_ip(public_ip) if public_ip else "",
        format_ip(public_ipv6) if public_ipv6 else "",
    )


def alias_of(options: Options) -> str:
    """``ifalias`` of our devices: which daemon and network they belong to; the kernel takes 255 bytes.

    A longer name ends in its hash, so that networks whose names begin alike do not take each other's devices.
    """
    alias = f"flanneld {options.network_id}"
    if len(alias.encode()) <= _ALIAS_BYTES:
        return alias
    digest = hashlib.sha256(alias.encode()).hexdigest()[:8]
    return f"{alias.encode()[: _ALIAS_BYTES - 9].decode(errors='ignore')}-{digest}"


def is_flannel(name: str) -> bool:
    """Whether a device is some flannel's, whose tunnel can never be the underlay of another."""
    return name.startswith("flannel")
