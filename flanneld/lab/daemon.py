"""One flanneld of the lab: start, stop, kill, ask. Works with Go's flanneld too (same flags)."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flanneld.errors import ConfigError, Unavailable
from flanneld.lab import http
from flanneld.lab.child import Child, spawn
from flanneld.lab.etcd import Etcd
from flanneld.lab.kube import Kube
from flanneld.lab.spec import HEALTH_PORT, LabSpec

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 6.0
"""A daemon promises to stop within 5 s."""
LOG_TAIL_LINES = 5


def own_command() -> tuple[str, ...]:
    """The ``flanneld`` that belongs to this interpreter's environment, else the one on PATH."""
    beside = Path(sys.executable).with_name("flanneld")
    found = str(beside) if beside.exists() else shutil.which("flanneld")
    if not found:
        raise ConfigError("no flanneld command found: install it where flannelctl is, or name one with --daemon")
    return (found,)


class Daemon:
    """The daemon of one host; its files stand in the host's directory."""

    def __init__(self, spec: LabSpec, number: int, directory: Path, store: Etcd | Kube) -> None:
        self._netns = spec.netns(f"h{number}")
        self._name = f"h{number}"
        self._directory = directory
        self._spec = spec
        self._store = store
        self._number = number
        self.command: Sequence[str] = spec.daemon
        """Replace it before ``start`` to run another daemon on this host; empty = our own."""
        self.subnet_file = directory / "subnet.env"
        self.state_dir = directory / "state"
        self.cni_conf_dir = directory / "cni" / "net.d"
        self.log_file = directory / "flanneld.log"
        self.xtables_lock = directory / "xtables.lock"
        """Every iptables program on this host should use it: ``XTABLES_LOCKFILE``."""

    def flags(self) -> list[str]:
        """What every daemon of the lab is started with."""
        return [
            *self._store.daemon_flags(self._number),
            "--iface=eth0",
            f"--subnet-file={self.subnet_file}",
            "--ip-masq",
            f"--healthz-port={HEALTH_PORT}",
            *self._spec.daemon_flags,
        ]

    def variables(self) -> dict[str, str]:
        """What makes the programs of this host, ``flannelctl`` and iptables, meet this daemon and its store."""
        flags = [*self._store.daemon_flags(self._number), f"--subnet-file={self.subnet_file}"]
        pairs = (flag.removeprefix("--").partition("=") for flag in flags)
        return {
            **{"FLANNELD_" + name.upper().replace("-", "_"): value or "true" for name, _, value in pairs},
            # by variable, not by flag: Go's flanneld does not know it, and ignores unknown variables only
            "FLANNELD_STATE_DIR": str(self.state_dir),
            # hosts do not share a lock file; this one would otherwise be the machine's
            "XTABLES_LOCKFILE": str(self.xtables_lock),
            **self._store.daemon_env(self._number),
        }

    def start(self, *flags: str, env: dict[str, str] | None = None) -> None:
        """Start it, with further flags; does not wait until it is ready."""
        if self.is_running():
            raise ConfigError(f"the daemon of {self._name} already runs")
        self._directory.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FLANNELD_")}
        environment |= {
            **self.variables(),
            **({"FLANNELD_CNI_CONF_DIR": str(self.cni_conf_dir)} if self._spec.cni else {}),
            **(env or {}),
        }
        argv = [*(self.command or own_command()), *self.flags(), *flags]
        spawn(self._netns, argv, self.log_file, self._pid_file, environment)

    def stop(self) -> None:
        """Ask it to stop (SIGTERM) and wait.

        Raises:
            Unavailable: it had to be killed after 6 s.
        """
        child = Child.read(self._pid_file)
        if child is not None and not child.end(STOP_TIMEOUT_S):
            raise Unavailable(f"the daemon of {self._name} ignored SIGTERM for {STOP_TIMEOUT_S:.0f} s")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if child := Child.read(self._pid_file):
            child.signal(signal.SIGKILL)
            child.wait_gone(STOP_TIMEOUT_S)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if child := Child.read(self._pid_file):
            child.signal(number)

    @property
    def pid(self) -> int | None:
        """Its process id; None when it does not run."""
        child = Child.read(self._pid_file)
        return child.pid if child else None

    def is_running(self) -> bool:
        """Whether its process lives."""
        return self.pid is not None

    def log(self) -> str:
        """All it has logged since the lab is up."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def ask(self, page: str) -> tuple[int, str]:
        """Fetch a page such as ``/readyz`` from its health port; status 0 when nobody answers."""
        return http.get(self._netns, "127.0.0.1", HEALTH_PORT, page)

    def is_ready(self) -> bool:
        """Whether ``/readyz`` says so."""
        return self.ask("/readyz")[0] == 200

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until ``/readyz`` says so.

        Raises:
            Unavailable: it ended, or is not ready in time; the sentence quotes the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if not self.is_running():
                raise Unavailable(f"the daemon of {self._name} ended; its log ends:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                why = self.ask("/readyz")[1].strip()
                raise Unavailable(
                    f"the daemon of {self._name} is not ready after {timeout_s:.0f} s ({why}); "
                    f"its log ends:\n{self._log_tail()}"
                )
            time.sleep(0.02)

    def _log_tail(self) -> str:
        return "\n".join(f"    {line}" for line in self.log().splitlines()[-LOG_TAIL_LINES:])

    @property
    def _pid_file(self) -> Path:
        return self._directory / "flanneld.pid"
