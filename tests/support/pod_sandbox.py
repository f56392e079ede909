"""What a kubelet and a container runtime make of a DaemonSet's pod, as far as it matters to the daemon.

The container gets a root file system of its own, read-only where the manifest says so, exactly the manifest's volumes,
its capabilities, environment and ``no_new_privs``; ``/proc/sys`` and ``/sys`` are read-only, as runtimes mount them for
containers without privileges, and ``/dev`` has next to nothing. What is left out: the seccomp filter, AppArmor and
SELinux, the resource limits.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support import manifests
from tests.support.manifests import Object

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
DEVICES = ("null", "zero", "full", "random", "urandom")


class Cluster(NamedTuple):
    """What a pod gets that is not in its DaemonSet."""

    volumes: Mapping[str, Mapping[str, str]] = {}
    """Files of ConfigMaps and Secrets, by the object's name and the file's."""
    service_account: Mapping[str, str] = {}
    """Files of the account's token volume."""
    variables: Mapping[str, str] = {}
    """Of the services, such as ``KUBERNETES_SERVICE_HOST``."""
    names: Mapping[str, str] = {}
    """Addresses by host name, in the node's ``/etc/hosts``."""


class PodSandbox:
    """One pod's container on one host; a context manager that ends its process.

    Args:
        netns: network namespace of the host, for a pod with ``hostNetwork``.
        daemonset: what the pod is made from.
        directory: one of this host: ``directory/host`` is the host's file system as its pods see it.
        cluster: what the cluster gives to its pods.
        container: one of the pod's; the daemon's unless told.
    """

    def __init__(
        self, netns: str, daemonset: Object, directory: Path, cluster: Cluster, container: Object | None = None
    ) -> None:
        self._netns = netns
        self._spec = manifests.pod_spec(daemonset)
        self._container = container or manifests.flanneld(daemonset)
        self._directory: Path = directory / daemonset["metadata"]["name"]
        self._cluster = cluster
        self._node = directory.name
        self.host = directory / "host"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PodSandbox:
        root = self._directory / "root"
        root.mkdir(parents=True)
        (self._directory / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in self._cluster.names.items()))
        script = "\n".join(["set -e", *self._mounts(root), self._entry(root)])
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(["ip", "netns", "exec", self._netns, *inside], stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, timeout_s: float) -> int:
        """Wait until the program has ended by itself; its exit status."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """As the kubelet stops a container: SIGTERM, and SIGKILL when the time of grace is over, which is a failure."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(self._spec["terminationGracePeriodSeconds"])
            except subprocess.TimeoutExpired:
                self._process.kill()  # as the kubelet does
                self._process.wait()
                raise

    @property
    def pid(self) -> int:
        """Of the daemon: every program on the way to it is replaced by the next."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def status(self, field: str) -> str:
        """A line of ``/proc/PID/status``, such as ``CapEff``."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{field}:"))

    def _mounts(self, root: Path) -> list[str]:
        lines = [f"mount -t tmpfs -o mode=755 image {root}", f"cd {root}"]
        lines += [
            "mkdir -p usr etc proc sys dev run tmp var/lib opt/bin",
            "for d in bin sbin lib lib64; do cp -a /$d .; done",
        ]
        lines += ["cp -a /etc/alternatives /etc/ld.so.cache /etc/nsswitch.conf /etc/passwd /etc/group etc/"]
        lines += [f"cp {self._directory}/hosts etc/hosts"]
        lines += ["mount -t proc proc proc", "mount --bind proc/sys proc/sys", "mount -o remount,bind,ro proc/sys"]
        lines += ["mount -t sysfs -o ro sysfs sys"]
        for path in dict.fromkeys(("/usr", sys.base_prefix, str(REPOSITORY), sys.prefix)):
            lines += _bind(path, path, is_directory=True, read_only=True)
        lines += [f"touch dev/{name}; mount --bind /dev/{name} dev/{name}" for name in DEVICES]
        lines += [f"ln -s {Path(sys.executable).with_name(name)} opt/bin/{name}" for name in ("flanneld", "flannelctl")]
        for mount in self._container["volumeMounts"]:
            source, is_directory = self._volume(mount["name"])
            lines += _bind(source, mount["mountPath"], is_directory, mount.get("readOnly", False))
        if self._spec["automountServiceAccountToken"]:
            token = self._written("token", self._cluster.service_account)
            lines += _bind(token, SERVICE_ACCOUNT, is_directory=True, read_only=True)
        if self._container["securityContext"]["readOnlyRootFilesystem"]:
            lines.append(f"mount -o remount,ro {root}")
        return lines

    def _volume(self, name: str) -> tuple[str, bool]:
        (volume,) = [each for each in self._spec["volumes"] if each["name"] == name]
        if "hostPath" not in volume:
            source = volume.get("configMap", {}).get("name") or volume["secret"]["secretName"]
            return self._written(name, self._cluster.volumes[source]), True
        path, kind = volume["hostPath"]["path"], volume["hostPath"]["type"]
        if path.startswith("/dev/"):
            return path, False
        ours = self.host / path.removeprefix("/")
        if kind == "DirectoryOrCreate":
            ours.mkdir(parents=True, exist_ok=True)
        elif kind == "FileOrCreate":
            ours.parent.mkdir(parents=True, exist_ok=True)
            ours.touch()
        assert ours.exists(), f"the kubelet would not start this pod: {path} is missing"
        return str(ours), ours.is_dir()

    def _written(self, name: str, files: Mapping[str, str]) -> str:
        directory = self._directory / "volumes" / name
        directory.mkdir(parents=True)
        for file, text in files.items():
            (directory / file).write_text(text)
        return str(directory)

    def _entry(self, root: Path) -> str:
        context = self._container["securityContext"]
        bounding = ",".join(["-all", *(f"+{name.lower()}" for name in context["capabilities"]["add"])])
        limits = [f"--bounding-set={bounding}", "--inh-caps=-all", f"--reuid={context['runAsUser']}"]
        if not context["allowPrivilegeEscalation"]:
            limits.append("--no-new-privs")
        variables = {"PATH": "/opt/bin:/usr/sbin:/usr/bin", **self._cluster.variables}
        for each in self._container.get("env") or ():
            assert each["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
            variables[each["name"]] = self._node
        env = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        command = [*self._container["command"], *self._container["args"]]
        return f"exec chroot {root} {shlex.join([*env, 'setpriv', *limits, *command])}"


def _bind(source: str, target: str, is_directory: bool, read_only: bool) -> Sequence[str]:
    inner = target.removeprefix("/")
    make = f"mkdir -p {inner}" if is_directory else f"mkdir -p {Path(inner).parent}; touch {inner}"
    lock = [f"mount -o remount,bind,ro {inner}"] if read_only else []
    return [make, f"mount --bind {source} {inner}", *lock]
