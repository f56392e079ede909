"""One run of the daemon, from the parsed options to the exit status: signals, start-up, work, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import backends
from flanneld.contracts import Store
from flanneld.daemon import Daemon
from flanneld.errors import ConfigError, KernelError, LeaseMoved
from flanneld.kernel.place import place
from flanneld.kernel.privileges import given_up, held, keep_at_start
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.options import Options
from flanneld.remembering import Remembering
from flanneld.report.health import Health
from flanneld.report.host_lock import hold_host
from flanneld.report.lease_cache import LeaseCache
from flanneld.report.state_dir import StateDir
from flanneld.report.subnet_file import SubnetFile
from flanneld.report.systemd import Notifier
from flanneld.sources.connect import open_store
from flanneld.startup import start_up

log = logging.getLogger("flanneld")

GC_THRESHOLDS = (50_000, 20, 50)
"""Allocations before a young, and rounds before an older generation is collected; Python's own is 700, 10, 10."""

SWITCH_S = 0.0002
"""For so long may a thread (that counts or saves leases) keep the loop from going on. Python's own is 5 ms, which each
miss and each lease would wait meanwhile: p99 of a lease among 5000 was 9 to 11 ms, and is 4 to 6 (tests/bench)."""

PLACE, AT_FIRST = "_FLANNELD_PLACE", "_FLANNELD_CAPABILITIES"
"""Variables that hand ``place()``, and what we might do at first, on to the program that we may become
(``_begin_anew``)."""

CLOSE_S = 2.5
"""Longest time for taking leave of etcd: half of what passes between SIGTERM and exit at most."""

END_S = 4.5
"""From SIGTERM until the process ends whatever hangs."""


def run(options: Options) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigError: it cannot work as configured.
        KernelError: the kernel gives no sockets.
    """
    # Leases and kernel objects are long-lived and hold no cycles: collecting as eagerly as by default costs
    # two thirds of the time that taking thousands of them in costs (tests/bench). What was imported never dies.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_S)
    os.environ.setdefault(PLACE, place())  # tells by process 1, which we may not look at any more afterwards
    os.environ.setdefault(AT_FIRST, f"{held():x}")
    if options.drop_privileges:
        keep_at_start((os.path.dirname(os.path.abspath(options.subnet_file)), options.state_dir, options.cni_conf_dir))
    try:
        return asyncio.run(_until_signal(options))
    except LeaseMoved as moved:
        _begin_anew(moved)


async def _until_signal(options: Options) -> int:
    loop = asyncio.get_running_loop()
    notifier, hangup = Notifier(), asyncio.Event()
    task = asyncio.create_task(_work(options, notifier, hangup))

    def stop(name: str) -> None:
        log.info("%s received, stopping; the data path stays as it is", name)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second one ends us at once (contract 0.2)
        notifier.stopping()
        signal.signal(signal.SIGALRM, _end_at_last)
        signal.setitimer(signal.ITIMER_REAL, END_S)
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop, "SIGTERM")
    loop.add_signal_handler(signal.SIGINT, stop, "SIGINT")
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    try:
        await task
    except asyncio.CancelledError:
        return 0
    except BaseExceptionGroup as group:
        first = _first(group)
        if isinstance(first, LeaseMoved) and task.cancelling():
            return 0  # in the moment in which we were to stop
        raise first from None
    return 0


def _end_at_last(_number: int, _frame: object) -> NoReturn:
    """End without waiting for threads: one that looks up a name in the C library cannot be interrupted, and takes half
    a minute where the name servers are away."""
    logging.shutdown()
    os._exit(0)


def _begin_anew(reason: LeaseMoved) -> NoReturn:
    """Replace this process by a new run of itself.

    The subnet is at the root of everything (device, rules, files), and a start finds and adopts what is there
    without losing a packet; so does the kernel keep what is going on until then. The pid stays, so no
    supervisor sees an end. Locks and sockets go with the old program (O_CLOEXEC).

    Raises:
        ConfigError: there is no such program any more.
    """
    log.warning("%s; beginning anew with it", reason)
    logging.shutdown()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves, no shell
    except OSError as exc:  # an upgrade took the old one away
        raise ConfigError(
            f"flanneld cannot begin anew: {sys.executable} cannot be run ({exc.strerror}), start it again"
        ) from exc


async def _work(options: Options, notifier: Notifier, hangup: asyncio.Event) -> None:
    """Start up, then work until cancelled."""
    health, kernel = Health(), Rtnl()
    state = StateDir(Path(options.state_dir, os.environ[PLACE]), options.network_id)
    file = SubnetFile(Path(options.subnet_file))

    def say(text: str) -> None:
        log.info("%s", text)
        notifier.status(text)
        health.set_ready((text,))

    async with contextlib.AsyncExitStack() as at_exit:
        state.lock()
        at_exit.callback(state.close)
        at_exit.enter_context(hold_host(options.network_id, file.path))
        cache = LeaseCache(state.file(".cache"), options.network_id, state.identity())
        accepts = partial(backends.create, links={}, identity=state.identity())
        store = Remembering(open_store(options, os.environ), cache, accepts=accepts)
        at_exit.push_async_callback(_close_in_time, store)
        tasks = await at_exit.enter_async_context(asyncio.TaskGroup())
        if options.healthz_port > 0:
            tasks.create_task(health.serve(options.healthz_ip, options.healthz_port))
        tasks.create_task(notifier.feed_watchdog())
        standing = await start_up(options, store, state, file, kernel, say)
        _require_what_was_given_up(standing.conf.backend_type)
        daemon = Daemon(options, standing, store, kernel, file, health, notifier)
        at_exit.callback(daemon.close)
        for duty in daemon.duties():
            tasks.create_task(duty)
        while True:
            await hangup.wait()
            hangup.clear()
            log.info("SIGHUP received, reading certificates and configuration again")
            store.reload()
            await daemon.reload()


def _require_what_was_given_up(backend_type: str) -> None:
    """End rather than go on with less for ever: whoever starts us gives it back, and the data path stays until then.

    Raises:
        ConfigError: the backend changed, and an earlier run in this process gave up what the new one needs.
    """
    if gone := given_up(backend_type, int(os.environ[AT_FIRST], 16)):
        raise ConfigError(
            f"the backend is {backend_type} by now and needs {', '.join(gone)}, which this process gave up when it "
            "served another one: start flanneld again"
        )


async def _close_in_time(store: Store) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await store.close()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a task group failed of: an error meant for others if there is one among them."""
    leaves: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        exc = todo.pop(0)
        if isinstance(exc, BaseExceptionGroup):
            todo += exc.exceptions
        else:
            leaves.append(exc)
    return next((exc for exc in leaves if isinstance(exc, ConfigError | KernelError | LeaseMoved)), leaves[0])
