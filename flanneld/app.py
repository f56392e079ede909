"""Builds the parts, starts them in order, ends them on a signal.

Nothing here decides: it wires sources, reconcile loop, rules, file and health together, and says what is
being waited for. The order of the start is contract 0.1's, but readiness comes after the first peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

import backends
from flanneld.contracts import DataPath, Runner, Surroundings, TrafficManager, TrafficRules
from flanneld.duties import HintFilter, Pager, RuleKeeper, UnderlayWatch
from flanneld.errors import ConfigError, LeaseLost, Unavailable
from flanneld.kernel import procfs
from flanneld.kernel.host_net import read_host_net
from flanneld.kernel.listen import HintListener, MissListener
from flanneld.kernel.place import place
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.addr import Family, format_ip
from flanneld.model.host import ExtIface, HostNet, IfaceWish
from flanneld.model.lease import Claim, LeaseTable
from flanneld.model.netconf import NetConf
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.options import Options
from flanneld.model.subnet_env import SubnetEnv
from flanneld.plan.extiface import select
from flanneld.problems import Problems
from flanneld.reconcile import LEASES, Reconciler
from flanneld.report.health import Health
from flanneld.report.state_dir import StateDir
from flanneld.report.subnet_file import SubnetFile
from flanneld.report.systemd import Notifier
from flanneld.retry import backoff
from flanneld.sources.connect import connect
from flanneld.sources.etcd import EtcdStore
from flanneld.wake import Wake

log = logging.getLogger("flanneld")

GC_THRESHOLDS = (50_000, 20, 50)
"""Allocations before a young, and rounds before an older generation is collected; Python's own is 700, 10, 10."""

STOP_S = 5.0
"""Longest time between SIGTERM and exit."""


def run(options: Options) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: it cannot work as configured.
    """
    # Leases and kernel objects are long-lived and hold no cycles: collecting as eagerly as by default costs
    # two thirds of the time that taking thousands of them in costs (tests/bench). What was imported never dies.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    return asyncio.run(_until_signal(options))


async def _until_signal(options: Options) -> int:
    loop = asyncio.get_running_loop()
    daemon = Daemon(options)
    task = asyncio.create_task(daemon.run())

    def stop(name: str) -> None:
        log.info("%s received, stopping; the data path stays as it is", name)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second one ends us at once (contract 0.2)
        daemon.notifier.stopping()
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop, "SIGTERM")
    loop.add_signal_handler(signal.SIGINT, stop, "SIGINT")
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    try:
        await task
    except asyncio.CancelledError:
        return 0
    except BaseExceptionGroup as group:
        raise _first(group) from None
    return 0


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a task group failed of: the operator's error if there is one among them."""
    leaves: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        exc = todo.pop(0)
        if isinstance(exc, BaseExceptionGroup):
            todo += exc.exceptions
        else:
            leaves.append(exc)
    return next((exc for exc in leaves if isinstance(exc, ConfigError)), leaves[0])


class Daemon:
    """All parts of one running daemon."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.notifier = Notifier()
        self.health = Health()
        self.problems = Problems(self._tell_state)
        self.client = connect(options)
        self.store = EtcdStore(self.client, options.etcd_prefix, renew_margin_s=options.renew_margin_s)
        self.state = StateDir(Path(options.state_dir, place()), options.etcd_prefix)
        self.file = SubnetFile(Path(options.subnet_file))
        self.table = LeaseTable()
        self.wake = Wake()
        self._publish = asyncio.Event()
        self._hangup = asyncio.Event()
        self._announced = False
        self._booting = True
        self._env = b""
        self._runner: Runner | None = None

    # ---- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start, then work until cancelled."""
        self.state.lock()
        try:
            async with asyncio.TaskGroup() as tasks:
                if self.options.healthz_port > 0:
                    tasks.create_task(self.health.serve(self.options.healthz_ip, self.options.healthz_port))
                tasks.create_task(self.notifier.feed_watchdog())
                await self._start(tasks)
        finally:
            if self._runner is not None:
                self._runner.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S / 2):
                    await self.store.close()
            self.state.close()

    async def _start(self, tasks: asyncio.TaskGroup) -> None:
        identity = self.state.identity()
        self.identity = identity
        self._status("waiting for the network configuration")
        self.conf = await self._wait_for_conf()
        self.kernel = Rtnl()
        self.wish = _wish(self.options)
        families = self.conf.families()
        links = self.kernel.links()
        ours = frozenset(
            name for name, link in links.items() if link.alias == _alias(self.options) or _is_flannel(name)
        )
        self.ext, decision = select(self._host_net(), self.wish, families, ours)
        log.info("%s", decision)
        self.backend = backends.create(self.conf, links, identity)
        self.backend.mtu(self.ext)
        for text in procfs.warnings(families, self.ext.name, iptables=not self.conf.nftables):
            log.warning("%s", text)
        before = self.file.previous()
        remembered = self.state.previous_subnets()
        previous = (before.subnet or remembered[0], before.subnet6 or remembered[1])
        self._status("waiting for a lease")
        own = await self.store.acquire(self.conf, Claim(self.backend.lease_attrs(self.ext, identity), previous))
        lease = own.lease
        log.info("lease acquired subnet=%s public=%s", lease.name(), lease.attrs.where())
        self.state.remember(lease.subnet, lease.subnet6)
        self.subnets = {f: s for f, s in zip(Family, (lease.subnet, lease.subnet6), strict=True) if s}
        former = tuple(network for network in (before.network, before.network6) if network)
        self.path: DataPath = self.backend.data_path(
            Surroundings(
                self.ext,
                self.subnets,
                _alias(self.options),
                former,
                self.options.ip_blackhole_route,
                self._publish.set,
                self.wake,
            )
        )
        self._runner = self.path.runner
        self._start_tasks(tasks)

    def _start_tasks(self, tasks: asyncio.TaskGroup) -> None:
        slot = self.problems.slot
        reconciler = Reconciler(
            self.kernel, self.path, self.table, self.wake, slot("kernel", "the data path is not set up yet")
        )
        self._leases_problem = slot("leases", "the list of leases has not come yet")
        self._lease_problem = slot("lease")
        self._file_problem = slot("file", "subnet.env is not written yet")
        self.rules = RuleKeeper(*_managers(self.conf), self._wanted_rules, slot("rules", "no firewall rules yet"))
        self.underlay = UnderlayWatch(
            self._host_net,
            self.wish,
            self.conf.families(),
            self.path,
            self.backend,
            self.ext,
            self._underlay_changed,
            slot("underlay"),
        )
        fast = self.kernel.sibling()  # misses are answered between two pieces of a long write, on a socket of their own
        pager = Pager(
            fast, self.path, self.table, self.wake, lambda: self.store.catch_up(self.table), reconciler.take_leases
        )
        misses = MissListener(pager.answer, lambda: self.wake("misses overrun"))
        hints = HintListener(
            HintFilter(self.path, reconciler.damaged, self.wake, self.underlay.wake),
            lambda: self.wake("hints overrun"),
            frozenset({self.kernel.port_id, fast.port_id}),
        )
        misses.start()
        hints.start()
        self._booting = False
        self._write_env()
        self.wake("start")
        for duty in (
            self.store.follow(self.table, self._leases_changed),
            self._keep_lease(),
            self.store.follow_config(self._conf_changed),
            reconciler.run(),
            self.rules.run(self.options.iptables_resync_s),
            self.file.hold(self._env_now, lambda text: log.info("%s", text)),
            self._reload_on_hangup(),
            self.underlay.run(self.wake),
            self._publish_changes(),
            pager.run(),
            pager.refuse(),
        ):
            tasks.create_task(duty)

    def _host_net(self) -> HostNet:
        reach = self.options.iface_can_reach
        return read_host_net([reach] if reach else [])

    # ---- configuration ----------------------------------------------------------------------------

    async def _wait_for_conf(self) -> NetConf:
        """The network configuration, however long it takes to be there and right (contract 2.5, 3.8)."""
        delays, told = backoff(cap_s=1.0), ""
        while True:
            try:
                return parse_netconf(await self.store.read_config())
            except (Unavailable, ConfigError) as exc:
                if str(exc) != told:
                    log.warning("waiting for the network configuration: %s", exc)
                    told = str(exc)
            await asyncio.sleep(next(delays))

    def _conf_changed(self, raw: bytes) -> None:
        """Take what can be taken live; say in one line what cannot, and keep the old."""
        try:
            conf = parse_netconf(raw)
            if conf == self.conf:
                return
            self._refuse_restart_keys(conf)
            self.backend.reconfigure(conf, self.path)
        except ConfigError as exc:
            log.error("network configuration changed, but the old one is kept: %s", exc)
            return
        if conf.nftables != self.conf.nftables:
            self.rules.use(*_managers(conf))
        log.info("network configuration changed and applied")
        self.conf = conf
        self._write_env()
        self.rules.wake("configuration")
        self.wake("configuration")
        self._publish.set()

    def _refuse_restart_keys(self, conf: NetConf) -> None:
        if conf.backend_type != self.conf.backend_type:
            raise ConfigError(
                f"Backend.Type changed from {self.conf.backend_type} to {conf.backend_type}, which needs a restart"
            )
        if conf.families() != self.conf.families():
            raise ConfigError("EnableIPv4 or EnableIPv6 changed, which needs a restart")
        for family, subnet in self.subnets.items():
            new = conf.family(family)
            if new is None or not new.network.covers(subnet) or subnet.length != new.subnet_len:
                raise ConfigError(
                    f"our subnet {subnet} does not fit the new {family.label} network, which needs a restart"
                )

    def reload(self) -> None:
        """SIGHUP: read certificates and configuration again."""
        log.info("SIGHUP received, reading certificates and configuration again")
        self.client.reload()
        self._hangup.set()

    async def _reload_on_hangup(self) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            self.notifier.reloading()
            try:
                self._conf_changed(await self.store.read_config())
            except (Unavailable, ConfigError) as exc:
                log.error("configuration cannot be read again, the old one is kept: %s", exc)
            self.underlay.wake("SIGHUP")
            self.notifier.ready()

    # ---- leases -----------------------------------------------------------------------------------

    def _leases_changed(self, _reason: str) -> None:
        self._leases_problem(None)
        self.wake(LEASES)

    async def _keep_lease(self) -> None:
        """Renew for ever; when another host holds our subnet, say so and wait for it to go.

        Local containers keep working meanwhile; nothing of the other host's is ever overwritten.
        """
        delays, told = backoff(first_s=1.0, cap_s=30.0), ""
        while True:
            try:
                await self.store.keep(lambda _reason: self._lease_problem(None))
            except LeaseLost as exc:
                if str(exc) != told:
                    log.error(
                        "lease lost: %s; containers here keep running, but this host is not ready: delete the other's "
                        "key in etcd to get the subnet back, or restart flanneld to take another one",
                        exc,
                    )
                told = str(exc)
                self._lease_problem(told)
                await asyncio.sleep(next(delays))

    def _underlay_changed(self, ext: ExtIface) -> None:
        self.ext = ext
        self._write_env()
        self.wake("underlay changed")
        self._publish.set()

    async def _publish_changes(self) -> None:
        """Publish what we say about ourselves whenever it changed."""
        while True:
            await self._publish.wait()
            self._publish.clear()
            with contextlib.suppress(LeaseLost):  # the keeper tells
                await self.store.publish(self.backend.lease_attrs(self.ext, self.identity))

    # ---- reports ----------------------------------------------------------------------------------

    def _write_env(self) -> None:
        v4, v6 = self.conf.v4, self.conf.v6
        env = SubnetEnv(
            v4.network if v4 else None,
            self.subnets.get(Family.V4) if v4 else None,
            v6.network if v6 else None,
            self.subnets.get(Family.V6) if v6 else None,
            self.backend.mtu(self.ext),
            self.options.ip_masq,
        )
        self._env = env.render()
        self.file.update(self._env)
        self._file_problem(self.file.problem)

    def _env_now(self) -> bytes:
        """What subnet.env should say; asked at every look at the file, so its state is told here too."""
        self._file_problem(self.file.problem)
        return self._env

    def _wanted_rules(self) -> Sequence[TrafficRules]:
        wanted = []
        for family, subnet in self.subnets.items():
            conf = self.conf.family(family)
            if conf is not None:
                wanted.append(
                    TrafficRules(
                        conf.network,
                        subnet.masked(),
                        self.options.ip_masq,
                        not self.options.ip_masq_fully_random_disable,
                        self.options.iptables_forward_rules,
                    )
                )
        return wanted

    def _status(self, text: str) -> None:
        log.info("%s", text)
        self.notifier.status(text)
        self.health.set_ready((text,))

    def _tell_state(self, problems: Sequence[str]) -> None:
        if self._booting:
            return
        self.health.set_ready(problems)
        if problems:
            self.notifier.status("; ".join(problems))
            return
        summary = f"ready subnet={'+'.join(map(str, self.subnets.values()))} leases={len(self.table)}"
        if self._runner is not None:
            summary += f", {self._runner.status()}"
        self.notifier.ready(summary)
        if not self._announced:
            log.info("%s", summary)
        self._announced = True


def _wish(options: Options) -> IfaceWish:
    return IfaceWish(
        options.iface,
        options.iface_regex,
        format_ip(options.iface_can_reach) if options.iface_can_reach else "",
        format_ip(options.public_ip) if options.public_ip else "",
        format_ip(options.public_ipv6) if options.public_ipv6 else "",
    )


def _alias(options: Options) -> str:
    """``ifalias`` of our devices: which daemon and network they belong to; the kernel takes 255 bytes."""
    return f"flanneld {options.etcd_prefix}"[:255]


def _is_flannel(name: str) -> bool:
    """Whether a device is some flannel's, whose tunnel can never be the underlay of another."""
    return name.startswith("flannel")


def _managers(conf: NetConf) -> tuple[TrafficManager, TrafficManager]:
    """The firewall tool that the configuration asks for, and the other one."""
    from flanneld.kernel.iptables import Iptables
    from flanneld.kernel.nft import Nftables

    nft, iptables = Nftables(), Iptables()
    return (nft, iptables) if conf.nftables else (iptables, nft)
