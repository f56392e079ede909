"""The daemon at work: wires sources, reconcile loop, rules, subnet file and health together.

Nothing here decides: each duty is a class of its own, and this file tells one what another found. All of
them run in one task group; one that raises ends the process. Those that only tell, never do (``watches.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from flanneld import __version__
from flanneld.contracts import Store, TrafficManager, TrafficRules
from flanneld.duties.checksums import look_at_offloads
from flanneld.duties.hints import HintFilter
from flanneld.duties.pager import Pager
from flanneld.duties.quarantine import LeaseGuard
from flanneld.duties.rules import RuleKeeper
from flanneld.duties.settings import SettingsWatch
from flanneld.duties.underlay import UnderlayWatch
from flanneld.errors import ConfigError, KernelError, LeaseLost, Unavailable
from flanneld.kernel.culprit import who
from flanneld.kernel.listen import HintListener, MissListener
from flanneld.kernel.memory import give_back
from flanneld.kernel.privileges import keep_at_work
from flanneld.kernel.rtnl import Rtnl
from flanneld.model import cni_conf
from flanneld.model.addr import Family
from flanneld.model.host import ExtIface
from flanneld.model.lease import LeaseTable
from flanneld.model.netconf import NetConf
from flanneld.model.options import Options
from flanneld.model.subnet_env import SubnetEnv
from flanneld.plan.drift import Repair
from flanneld.plan.rule_owner import Us
from flanneld.problems import Problems
from flanneld.reconcile import LEASES, Reconciler, Tell
from flanneld.report.audit import Audit
from flanneld.report.cni_file import CniFile
from flanneld.report.control import Control, socket_path
from flanneld.report.health import Health
from flanneld.report.subnet_file import SubnetFile
from flanneld.report.systemd import Notifier
from flanneld.sources.grants import boottime
from flanneld.startup import Standing, host_net, read_conf, refuse_restart_keys, surroundings
from flanneld.wake import Wake
from flanneld.watches import Watches

log = logging.getLogger("flanneld")

Duty = Coroutine[Any, Any, None]


class Daemon:
    """All parts of one running daemon.

    Raises:
        ConfigError: the data path cannot be built on this host.
    """

    def __init__(
        self,
        options: Options,
        standing: Standing,
        store: Store,
        kernel: Rtnl,
        file: SubnetFile,
        health: Health,
        notifier: Notifier,
    ) -> None:
        self._options, self._standing, self._store, self._kernel = options, standing, store, kernel
        self._file, self._health, self._notifier = file, health, notifier
        self._env = self._cni_conf = b""
        self._cni = CniFile(Path(options.cni_conf_dir, options.cni_conf_name)) if options.cni_conf_dir else None
        self._up = asyncio.Event()
        """Set when everything has been right for the first time."""
        self._publish = asyncio.Event()
        self._table = LeaseTable()
        self._wake = Wake()
        self._audit = Audit()
        self._since = time.time()
        self._problems = Problems(self._tell_state)
        slot, remark, remarks = self._problems.slot, self._problems.remark, self._problems.remarks_of
        self._leases_problem = slot("leases", "the list of leases has not come yet")
        self._file_problem = slot("file", "subnet.env is not written yet")
        self._cni_problem = slot("cni", self._cni.problem if self._cni else None)
        self._file_remark, self._cni_remark = remark("file"), remark("cni")
        self._path = standing.backend.data_path(
            surroundings(options, standing, self._publish.set, self._wake, self._runner_repaired, remarks("data path"))
        )
        self._watches = Watches(options, standing, store, self._path, self._table, self._wake, self._problems)
        self._guard = LeaseGuard(store, self._path, self._table, self._wake, slot("lease"))
        self._reconciler = Reconciler(
            kernel,
            self._path,
            self._table,
            self._wake,
            Tell(slot("kernel", "the data path is not set up yet"), remarks("kernel"), self._repaired),
            give_back,
        )
        self._settings = SettingsWatch(self._path, self._reconciler.damaged, self._wake)
        managers = self._managers(standing.conf)
        self._rules = RuleKeeper(
            *managers, self._wanted_rules, slot("rules", "no firewall rules yet"), remark("rules"), self._rules_repaired
        )
        self._underlay = UnderlayWatch(
            lambda: host_net(options, standing.conf),
            standing,
            self._path,
            self._underlay_changed,
            slot("underlay"),
            self._watches.overlaps.look,
        )
        self._conf_remark = remark("configuration")
        store.tell_trouble(remark("store"))

    def duties(self) -> Iterator[Duty]:
        """Everything that has to run from now on; call from the event loop."""
        pager = self._listen()
        self._underlay.look()
        self._write_env()
        self._wake("start")
        yield self._store.follow(self._table, self._leases_changed)
        yield self._guard.run()
        yield self._store.follow_config(self._conf_changed)
        yield self._reconciler.run()
        yield self._rules.run(self._options.iptables_resync_s)
        yield Control(socket_path(self._options.subnet_file), self._status, self._audit).serve()
        yield self._file.hold(self._env_now, self._file_repaired)
        if self._cni is not None:
            yield self._cni.hold(partial(self._cni_conf_now, self._cni), self._file_repaired)
        yield self._underlay.run(self._wake)
        yield self._settings.run()
        yield self._publish_changes()
        yield self._announce()
        if self._options.drop_privileges:
            yield self._give_up_privileges()
        yield pager.run()
        yield pager.refuse()
        yield from self._watches.duties(self._up)

    def _listen(self) -> Pager:
        """Begin to hear the kernel."""
        fast = self._kernel.sibling()  # misses are answered between two pieces of a long write, on its own socket
        catch_up: Callable[[], Coroutine[Any, Any, bool]] = lambda: self._store.catch_up(self._table)  # noqa: E731
        pager = Pager(fast, self._path, self._table, self._wake, catch_up, self._reconciler.take_leases)
        MissListener(pager.answer, lambda: self._wake("misses overrun")).start()
        HintListener(
            HintFilter(
                self._path,
                self._reconciler.damaged,
                self._wake,
                self._underlay.wake,
                self._reconciler.blame,
                who,
                partial(look_at_offloads, self._path, self._wake),
            ),
            lambda: self._wake("hints overrun"),
            frozenset({self._kernel.port_id, fast.port_id}),
        ).start()
        return pager

    def close(self) -> None:
        """The process ends; whatever can go on without it does."""
        if self._path.runner is not None:
            self._path.runner.close()

    # ---- configuration ----------------------------------------------------------------------------

    async def reload(self) -> None:
        """Read the configuration again (SIGHUP)."""
        self._notifier.reloading()
        try:
            self._conf_changed(await self._store.read_config())
        except (Unavailable, ConfigError) as exc:
            log.error("configuration cannot be read again, the old one is kept: %s", exc)
        self._underlay.wake("SIGHUP")
        self._notifier.reloaded()

    def _conf_changed(self, raw: bytes) -> None:
        """Take what can be taken live; say in one line what cannot, and keep the old."""
        standing = self._standing
        try:
            conf = read_conf(raw, standing, allocates=self._store.allocates)
            if conf == standing.conf:
                self._conf_remark(None)
                return
            refuse_restart_keys(standing.conf, conf, standing.subnets)
            if conf.networks() != standing.conf.networks():
                self._watches.overlaps.refuse(conf, host_net(self._options, conf))
            standing.backend.reconfigure(conf, self._path)
        except (ConfigError, KernelError) as exc:
            log.error("network configuration changed, but the old one is kept: %s", exc)
            self._conf_remark(f"the network configuration changed, but the old one is kept: {exc}")
            return
        self._conf_remark(None)
        if conf.nftables != standing.conf.nftables:
            self._rules.use(*self._managers(conf))
        log.info("network configuration changed and applied")
        standing.conf = conf
        self._rules.wake("configuration")
        self._changed("configuration")

    def _underlay_changed(self, ext: ExtIface) -> None:
        self._standing.ext = ext
        self._changed("underlay changed")

    def _changed(self, what: str) -> None:
        self._write_env()
        self._wake(what)
        self._publish.set()

    # ---- leases -----------------------------------------------------------------------------------

    def _leases_changed(self, _reason: str) -> None:
        self._leases_problem(None)
        self._wake(LEASES)
        self._guard.leases_changed()
        self._watches.room.leases_changed()

    async def _announce(self) -> None:
        """Tell those who wait for it that containers can be started here (contract 0.1 step 21, 9.22)."""
        await self._up.wait()
        await self._store.network_is_up()

    async def _give_up_privileges(self) -> None:
        """Give up what this run does not need. A run from memory needs what the store will say when it answers."""
        await self._up.wait()
        await self._guard.confirmed.wait()
        keep_at_work(self._standing.conf.backend_type)
        # threads keep what they have, and begin with what their maker has: idle ones of the old pool end
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())

    async def _publish_changes(self) -> None:
        """Publish what we say about ourselves whenever it changed."""
        standing = self._standing
        while True:
            await self._publish.wait()
            self._publish.clear()
            with contextlib.suppress(LeaseLost):  # the keeper tells
                await self._store.publish(standing.backend.lease_attrs(standing.ext, standing.identity))

    # ---- reports ----------------------------------------------------------------------------------

    def _repaired(self, repair: Repair, after_s: float, by: str) -> None:
        self._audit.note(repair.kind, repair.text, repair.what, repair.was, after_s, by)
        self._settings.note(repair)

    def _rules_repaired(self, kind: str, text: str, after_s: float) -> None:
        self._audit.note(kind, text, after_s=after_s)

    def _runner_repaired(self, text: str) -> None:
        self._audit.note("data path", text)

    def _file_repaired(self, text: str, times: int) -> None:
        log.info("%s", text)
        self._audit.note("file", text, times=times)

    def _status(self) -> dict[str, object]:
        """What ``flannelctl status`` shows; names stay, more may come."""
        standing, own, runner = self._standing, self._store.own, self._path.runner
        ext = standing.ext
        problems, room = self._problems.now(), self._watches.room.now
        return {
            "version": __version__,
            "pid": os.getpid(),
            "since": self._since,
            "network": self._options.network_id,
            "identity": standing.identity,
            "state": self._state(),
            "problems": problems,
            "remarks": self._problems.remarks(),
            "backend": standing.conf.backend_type,
            "data_path": (runner.status() if runner else "kernel tables") + self._in_software(),
            "subnets": [str(subnet) for subnet in standing.subnets.values()],
            "public": own.lease.attrs.where() if own else None,
            "lease_ends_in_s": own.expires - boottime() if own and own.expires is not None else None,
            "interface": {"name": ext.name, "mtu": ext.mtu},
            "container_mtu": standing.backend.mtu(ext),
            "leases": len(self._table),
            "subnets_free": room.free if room else None,
            "subnets_total": room.total if room else None,
            "repairs": dict(self._audit.counts),
        }

    def _in_software(self) -> str:
        offloads = self._path.desired.offloads.values()
        return ", checksums in software" if any(not offload.on for offload in offloads) else ""

    def _state(self) -> str:
        if self._guard.in_quarantine:
            return "quarantined"
        return "not ready" if self._problems.now() else "degraded" if self._problems.remarks() else "ready"

    def _write_env(self) -> None:
        standing = self._standing
        v4, v6 = standing.conf.v4, standing.conf.v6
        env = SubnetEnv(
            v4.network if v4 else None,
            standing.subnets.get(Family.V4) if v4 else None,
            v6.network if v6 else None,
            standing.subnets.get(Family.V6) if v6 else None,
            standing.backend.mtu(standing.ext),
            self._options.ip_masq,
        )
        self._env = env.render()
        self._file.update(self._env)
        self._file_problem(self._file.problem)
        options = self._options
        self._cni_conf = cni_conf.render(
            options.cni_conf_form,
            env,
            str(self._file.path.absolute()),
            options.cni_network_name,
            options.cni_bridge,
        )

    def _env_now(self) -> bytes:
        """What subnet.env should say; asked at every look at the file, so its state is told here too."""
        self._file_problem(self._file.problem)
        self._file_remark(self._file.fight)
        return self._env

    def _cni_conf_now(self, file: CniFile) -> bytes:
        self._cni_problem(file.problem)
        self._cni_remark(file.fight)
        return self._cni_conf

    def _wanted_rules(self) -> Sequence[TrafficRules]:
        options, conf = self._options, self._standing.conf
        random = not options.ip_masq_fully_random_disable
        return [
            TrafficRules(part.network, subnet.masked(), options.ip_masq, random, options.iptables_forward_rules)
            for family, subnet in self._standing.subnets.items()
            if (part := conf.family(family)) is not None
        ]

    def _tell_state(self, problems: Sequence[str]) -> None:
        self._health.set_ready(problems, self._problems.remarks())
        if problems:
            self._notifier.status("; ".join(problems))
            return
        summary = f"ready subnet={'+'.join(map(str, self._standing.subnets.values()))} leases={len(self._table)}"
        if self._path.runner is not None:
            summary += f", {self._path.runner.status()}"
        summary = "; ".join((summary, *self._problems.remarks()))
        self._notifier.ready(summary)
        if not self._up.is_set():
            log.info("%s", summary)
        self._up.set()

    def _managers(self, conf: NetConf) -> tuple[TrafficManager, TrafficManager]:
        """The firewall tool that the configuration asks for, and the other one."""
        from flanneld.kernel.iptables import Iptables
        from flanneld.kernel.nft import Nftables

        blocks = [part.network for family in conf.families() if (part := conf.family(family))]
        us = Us.of(self._options.network_id, [*blocks, *self._standing.former_networks])
        nft, iptables = Nftables(us), Iptables(us)
        return (nft, iptables) if conf.nftables else (iptables, nft)
