"""What a container runtime does for a pod's network: run the plugins of a CNI configuration list, for real.

Source: CNI specification 0.4.0, https://github.com/containernetworking/cni/blob/spec-v0.4.0/SPEC.md. Whatever
containerd and CRI-O do differently from it where it matters here is said in place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flanneld.errors import ConfigError, Unavailable
from flanneld.lab.netns import NETNS_DIR
from flanneld.report.cni_file import first_conf

PLUGIN_DIRS = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
"""Of upstream's archives, of Debian, of Fedora."""
PLUGINS = ("bridge", "host-local", "portmap")
"""Those that the ``bridge`` form of our configuration names."""
TIMEOUT_S = 30.0

Json = dict[str, Any]
"""Any, because what a plugin takes and gives is its own business."""


class PortMapping(NamedTuple):
    """A port of the host that leads into the pod."""

    host: int
    pod: int
    protocol: str = "tcp"


class _Added(NamedTuple):
    """What is remembered of an ADD."""

    conf: Json
    ports: Sequence[PortMapping]
    result: Json


class Runtime:
    """The runtime of one host.

    Args:
        netns: name of the host's namespace.
        conf_dir: where it finds its configuration, as ``/etc/cni/net.d``.
        directory: for what it and the plugins remember; one for each host.
    """

    def __init__(self, netns: str, conf_dir: Path, directory: Path) -> None:
        self.conf_dir = conf_dir
        self._netns = netns
        self._directory = directory
        self._var = directory / "var"
        """Stands in for ``/var/lib`` while a plugin runs, so that hosts do not share ``/var/lib/cni``."""

    def configuration(self) -> Json:
        """The list that runtimes take: the first file of the directory.

        Raises:
            Unavailable: there is none, or it is not one.
        """
        name = first_conf(self.conf_dir)
        if not name:
            raise Unavailable(f"no CNI configuration in {self.conf_dir}: flanneld writes it once it has a subnet")
        try:
            conf: Json = json.loads((self.conf_dir / name).read_bytes())
            return {"name": conf["name"], "cniVersion": conf["cniVersion"], "plugins": list(conf["plugins"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"{self.conf_dir / name} is no CNI configuration list ({error!r})") from error

    def add(self, pod: str, ports: Sequence[PortMapping] = ()) -> Json:
        """ADD: connect a pod's namespace as ``eth0``; its name is the container's id too.

        Returns:
            The result of the last plugin: interfaces, addresses, routes.

        Raises:
            Unavailable: there is no configuration, or a plugin refused; nothing of the pod is left then.
        """
        conf = self.configuration()
        result: Json = {}
        try:
            for plugin in conf["plugins"]:
                result = self._run("ADD", plugin, conf, pod, ports, result)
        except Unavailable:
            self._delete(pod, _Added(conf, ports, result))  # as runtimes do
            raise
        cache = self._cache(pod)
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(_Added(conf, ports, result)))
        return result

    def delete(self, pod: str) -> None:
        """DEL: disconnect a pod; one that was not added is no error.

        As containerd does it, with the configuration of the day. CRI-O and podman take the one it was added with,
        which is what we do when there is no other.

        Raises:
            Unavailable: a plugin refused.
        """
        if self.has(pod):
            added = self._added(pod)
            self._delete(pod, added._replace(conf=self.configuration()) if first_conf(self.conf_dir) else added)
            self._cache(pod).unlink()

    def has(self, pod: str) -> bool:
        """Whether a pod is connected, as far as we know."""
        return self._cache(pod).exists()

    def _delete(self, pod: str, added: _Added) -> None:
        for plugin in reversed(added.conf["plugins"]):
            self._run("DEL", plugin, added.conf, pod, added.ports, added.result)

    def _added(self, pod: str) -> _Added:
        conf, ports, result = json.loads(self._cache(pod).read_text())
        return _Added(conf, [PortMapping(*port) for port in ports], result)

    def _cache(self, pod: str) -> Path:
        return self._var / "cni" / "results" / pod

    def _run(
        self, command: str, plugin: Json, conf: Json, pod: str, ports: Sequence[PortMapping], previous: Json
    ) -> Json:
        """Run one plugin in the host's namespace and hand back its result."""
        argv = ["ip", "netns", "exec", self._netns, "sh", "-c", 'mount --bind "$0" /var/lib && exec "$@"']
        argv += [str(self._var), _binary(plugin["type"])]
        self._var.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_NETNS": str(NETNS_DIR / pod),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": ":".join(PLUGIN_DIRS),
            # hosts do not share a lock file; this one would otherwise be the machine's
            "XTABLES_LOCKFILE": str(self._directory / "xtables.lock"),
        }
        text = json.dumps(_execution_conf(plugin, conf, ports, previous))
        done = subprocess.run(argv, input=text, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            raise Unavailable(f"{command} {pod}: plugin {plugin['type']}: {_complaint(done)}")
        answer: Json = json.loads(done.stdout) if command == "ADD" else {}
        return answer


def check_plugins() -> None:
    """Make sure that the plugins are there that our configuration names.

    Raises:
        ConfigError: one is not.
    """
    for name in PLUGINS:
        _binary(name)


def has_plugins() -> bool:
    """Whether they are."""
    return all(map(_find, PLUGINS))


def _find(plugin: str) -> str | None:
    return shutil.which(plugin, path=":".join(PLUGIN_DIRS))


def _execution_conf(plugin: Json, conf: Json, ports: Sequence[PortMapping], previous: Json) -> Json:
    """What the plugin gets on stdin (specification, "Deriving execution configuration from plugin configuration")."""
    derived = {key: value for key, value in plugin.items() if key != "capabilities"}
    derived |= {"name": conf["name"], "cniVersion": conf["cniVersion"]}
    if plugin.get("capabilities", {}).get("portMappings") and ports:
        mappings = [{"hostPort": p.host, "containerPort": p.pod, "protocol": p.protocol} for p in ports]
        derived["runtimeConfig"] = {"portMappings": mappings}
    if previous:
        derived["prevResult"] = previous
    return derived


def _binary(plugin: str) -> str:
    found = _find(plugin)
    if not found:
        where = "apt-get install containernetworking-plugins" if plugin in PLUGINS else "no Debian package has it"
        raise ConfigError(f"there is no CNI plugin {plugin} in {', '.join(PLUGIN_DIRS)}: {where}")
    return found


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What a plugin said, from its error object or else as it stands."""
    try:
        error: Mapping[str, object] = json.loads(done.stdout)
        return " ".join(str(error[key]) for key in ("msg", "details") if error.get(key))
    except (ValueError, KeyError, TypeError):
        return done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
