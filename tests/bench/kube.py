"""A daemon among the nodes of a Kubernetes cluster: start, memory, and what others' heartbeats cost."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from flanneld.errors import Unavailable
from flanneld.lab import Lab, netns
from flanneld.lab.child import Child, spawn
from flanneld.lab.kube import PORT
from tests.bench.cases import Subject
from tests.bench.hollow import peers
from tests.bench.observe import Watcher
from tests.bench.stage import Command, Stage

FILL_TIMEOUT_S = 120.0


def kube(subject: Subject) -> Iterator[tuple[str, float | None]]:
    """Start among ``size`` nodes of 20 KiB of managed fields each, then rest while they beat."""
    with KubeStage(subject.command, subject.backend, subject.size) as stage:
        start = stage.start(subject.settings.timeout_s, ready=True)
        yield "kube_env", start.env_s
        yield "kube_ready", start.ready_s
        if stage.peers[0].kernel_keys(stage.backend):
            yield "kube_programmed", start.programmed_s
        yield "kube_cpu", start.cpu_s
        time.sleep(subject.settings.settle_s)
        yield "kube_rss", stage.usage().rss_mib
        if subject.settings.idle_s:
            before, began = stage.usage().fine_cpu_s, time.monotonic()
            time.sleep(subject.settings.idle_s)
            yield "kube_idle", (stage.usage().fine_cpu_s - before) / (time.monotonic() - began) * 100
        yield "kube_peak", stage.peak_mib()


class KubeStage(Stage):
    """The same stage with nodes instead of etcd's keys; they stay as they are."""

    def __init__(self, command: Command, backend: str, size: int, settings: Mapping[str, object] | None = None) -> None:
        super().__init__(command, backend, size, settings)
        self.lab = Lab(dataclasses.replace(self.lab.spec, store="kube"))
        self.host = self.lab.host(1)
        self._server: Child | None = None

    def __enter__(self) -> KubeStage:
        self.lab.up(daemons=False)
        try:
            self._make_peers_reachable()
            self._serve()
            self.watcher = Watcher(self.host.netns)
            self.peers = peers(2, self.size)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._server:
            self._server.signal(signal.SIGKILL)
        super().__exit__(kind, error, at)

    def peak_mib(self) -> float:
        """The most that the daemon ever held."""
        found = 0.0
        for pid in netns.pids([self.host.netns]):
            status = Path(f"/proc/{pid}/status").read_text()
            found += int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024
        return found

    def _serve(self) -> None:
        """Put a server with all the nodes into the place of the lab's own."""
        kube, spec = self.lab.kube, self.lab.spec
        kube.stop()
        directory = kube.ca_file.parent
        words = (spec.member_address(1), str(PORT), str(directory), self.backend, str(self.size))
        argv = [sys.executable, "-m", "tests.bench.kube_server", *words]
        log = directory / "bench.log"
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self._server = spawn(spec.netns("switch"), argv, log, directory / "bench.pid", environ)
        deadline = time.monotonic() + FILL_TIMEOUT_S
        while not kube.is_serving():
            if not self._server.is_alive() or time.monotonic() > deadline:
                raise Unavailable(f"the API server of the benchmark does not serve: {log.read_text()[-300:]}")
            time.sleep(0.05)
