"""A whole lab: bring it up, find it again from another process, take it down whatever state it is in."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from flanneld.errors import ConfigError
from flanneld.lab import child, cni, netns, wiring
from flanneld.lab.child import Child
from flanneld.lab.daemon import Daemon
from flanneld.lab.etcd import Etcd
from flanneld.lab.kube import Kube
from flanneld.lab.node import Host, Node
from flanneld.lab.spec import EXTRA, LabSpec

LABS_DIR = Path("/run/flannel-lab")
"""On tmpfs: state of the running machine, gone with a reboot, as the namespaces are."""
KILL_TIMEOUT_S = 5.0
TOOLS = ("ip", "ping")
_NETNS = re.compile(r"fl-([a-z0-9]{1,10})-(?:switch|router|outside|h\d+|pod\d+)")

Step = Callable[[str], contextlib.AbstractContextManager[None]]
"""Wraps each step of ``up``; gets its description."""


def _silent(_: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class Lab:
    """A cluster in namespaces.

    As a context manager it is up inside the block and gone after it::

        with Lab(LabSpec("t1", hosts=2, backend={"Type": "vxlan", "PageAhead": 0})) as lab:
            lab.host(1).pod.run("ping", "-c1", lab.host(2).pod_address())
    """

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self.directory = LABS_DIR / spec.name
        self.etcd = Etcd(spec, self.directory)
        self.kube = Kube(spec, self.directory)
        self.store: Etcd | Kube = self.kube if spec.store == "kube" else self.etcd
        """The one of the two that runs."""
        self.hosts = [self._make_host(number) for number in range(1, spec.hosts + 1)]
        self.switch = Node(spec, "switch")
        self.router = Node(spec, "router")
        self.outside = Node(spec, "outside")

    def _make_host(self, number: int) -> Host:
        directory = self.directory / f"h{number}"
        return Host(self.spec, number, directory, Daemon(self.spec, number, directory, self.store))

    @staticmethod
    def load(name: str) -> Lab:
        """Find a lab that another process has built.

        Raises:
            ConfigError: there is none of that name.
        """
        try:
            return Lab(LabSpec.from_json(json.loads((LABS_DIR / name / "lab.json").read_text())["spec"]))
        except FileNotFoundError:
            known = ", ".join(names()) or "none"
            raise ConfigError(f"there is no lab {name!r}; labs that are up: {known}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{LABS_DIR / name}/lab.json is not readable; `flannelctl lab down` removes it"
            ) from error

    def host(self, number: int) -> Host:
        """Host number ``number``, counted from 1."""
        return self.hosts[number - 1]

    def node(self, name: str) -> Node:
        """Any node by its name, such as ``h2``, ``pod1`` or ``outside``.

        Raises:
            ConfigError: the lab has no such node.
        """
        if name not in self.spec.nodes():
            raise ConfigError(f"lab {self.spec.name!r} has no node {name!r}; it has {', '.join(self.spec.nodes())}")
        return next((host for host in self.hosts if host.name == name), None) or Node(self.spec, name)

    def up(self, step: Step = _silent, daemons: bool = True) -> None:
        """Build everything and wait until every host's pod is connected; on failure nothing is left.

        Args:
            step: wraps each step, for progress.
            daemons: start flanneld on every host; without, store and underlay are up, the rest is the caller's.

        Raises:
            FlannelError: why it cannot be built, in one sentence.
        """
        check_machine(self.spec)
        self._claim()
        try:
            spec = self.spec
            where = f"{_count(spec.hosts, 'host')} on {_count(spec.segments, 'segment')}"
            with step(f"underlay, router, outside: {where}"):
                wiring.build(spec)
            with step(self.store.title):
                self.store.set_up()
            if daemons:
                with step(f"flanneld: {_count(spec.hosts, 'daemon')} started at once, ready"):
                    self.start_daemons()
                made = "a bridge and a container per host, as subnet.env says"
                with step(f"pods: {'by the CNI plugins, as flanneld configures them' if spec.cni else made}"):
                    self.attach_pods()
        except BaseException:  # Ctrl-C included: whatever stopped us, leave nothing behind
            self.down()
            raise

    def start_daemons(self) -> None:
        """Start all daemons at once and wait until each is ready."""
        for host in self.hosts:
            host.daemon.start()
        for host in self.hosts:
            host.daemon.wait_ready()

    def attach_pods(self) -> None:
        """Connect every host's pod to the subnet its daemon has leased."""
        for host in self.hosts:
            host.attach_pod()

    def down(self) -> bool:
        """Remove everything; tells whether there was anything. Never fails on what is half built or broken."""
        return remove(self.spec.name)

    def _claim(self) -> None:
        """Make the lab's directory ours, sweeping away what a dead owner left."""
        sweep()
        if self.directory.exists() or netns.listing(self.spec.prefix):
            name = self.spec.name
            raise ConfigError(f"a lab {name!r} exists already: `flannelctl lab down --name {name}` removes it")
        for host in self.hosts:
            host.directory.mkdir(parents=True)
        owner = Child.of(os.getpid())
        state = {"spec": self.spec.to_json(), "owner": owner, "since": time.time()}
        (self.directory / "lab.json").write_text(json.dumps(state, indent=1) + "\n")

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()


def names() -> list[str]:
    """Labs that have files or namespaces on this machine, sorted."""
    files = {path.name for path in LABS_DIR.iterdir() if path.is_dir()} if LABS_DIR.is_dir() else set()
    spaces = {found[1] for name in netns.listing("fl-") if (found := _NETNS.fullmatch(name))}
    return sorted(files | spaces)


def remove(name: str) -> bool:
    """Take a lab down by its name alone, as a crash may have left nothing else; tells whether it existed."""
    with _undisturbed():
        return _remove(name)


def _remove(name: str) -> bool:
    spaces = netns.listing(f"fl-{name}-")
    directory = LABS_DIR / name
    # Whoever lives in our namespaces is ours: etcd, daemons, and a ping that a test forgot. No farewells:
    # all they could save is removed next, and etcd would spend 5 s on handing over its leadership.
    child.kill_all(netns.pids(spaces), KILL_TIMEOUT_S)
    netns.remove(spaces)
    existed = bool(spaces) or directory.exists()
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        LABS_DIR.rmdir()
    return existed


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for the 20 ms that cleaning up takes; a second, impatient one would interrupt it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def sweep() -> list[str]:
    """Remove ephemeral labs (demo, tests) whose owner has died; returns their names."""
    return [name for name in names() if _is_orphan(LABS_DIR / name / "lab.json") and remove(name)]


def _is_orphan(state_file: Path) -> bool:
    try:
        state: dict[str, Any] = json.loads(state_file.read_text())
        owner = Child(*state["owner"])
        spec: Mapping[str, object] = state["spec"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # being made right now, or not ours to judge: `lab down` takes it by name
    return bool(spec.get("ephemeral")) and not owner.is_alive()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_machine(spec: LabSpec) -> None:
    """Look for what a lab needs.

    Raises:
        ConfigError: something is missing; the sentence says how to get it.
    """
    if os.geteuid() != 0:
        raise ConfigError("the lab builds network namespaces and so must run as root")
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        raise ConfigError(f"the lab needs {' and '.join(missing)}: apt-get install iproute2 iputils-ping")
    if not importlib.util.find_spec("pyroute2"):
        raise ConfigError(f"the lab needs pyroute2: {EXTRA}")
    if spec.cni:
        cni.check_plugins()


@contextlib.contextmanager
def timed(write: Callable[[str], None], what: str) -> Iterator[None]:
    """A step for ``Lab.up`` that tells what was done and how long it took."""
    begun = time.monotonic()
    try:
        yield
    except Exception:
        write(f"  {what:<66} failed")
        raise
    write(f"  {what:<66} {time.monotonic() - begun:5.2f} s")
