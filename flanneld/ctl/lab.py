"""``flannelctl lab``: flags in, ``flanneld.lab`` called, tables out."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from flanneld.errors import ConfigError, UsageError
from flanneld.flag_values import boolean, choice, integer, something
from flanneld.goflags import Flag, scan, usage
from flanneld.lab import demo
from flanneld.lab.cni import has_plugins
from flanneld.lab.lab import Lab, names, remove, timed
from flanneld.lab.node import Host
from flanneld.lab.spec import MAX_HOSTS, LabSpec
from flanneld.report.table import render_table

HEAD = """\
usage: flannelctl lab up [flags] [-- flags for every flanneld]    build a cluster and leave it running
       flannelctl lab demo [flags] [-- flags for every flanneld]  build one, show that it works, take it down
       flannelctl lab status [--name NAME] [-o json]              what runs
       flannelctl lab exec [--name NAME] NODE [COMMAND ...]       run a command (a shell) on h1, pod1, outside, …
       flannelctl lab down [--name NAME]                          take it down, after a crash too

Hosts are network namespaces; packets, kernel tables, firewall and etcd are real. Needs root.
With --store kube the lab plays the Kubernetes API and the controller that gives nodes their pod CIDRs."""


def _json_object(text: str) -> Mapping[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"use a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("use a JSON object in braces")  # noqa: TRY004  # the flag scanner's word for "wrong value"
    return value


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError("use KEY=VALUE such as PageAhead=0")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a bare word is a string, so that people need not quote


NAME = Flag("name", something, "name of the lab", "NAME")
OUTPUT = Flag("o", choice("text", "json"), "form of the output, text or json", "FORMAT", target="output")
BUILD_FLAGS = (
    Flag("hosts", integer(1, MAX_HOSTS), "number of hosts", "N"),
    Flag("backend", something, "type of the backend", "TYPE"),
    Flag("set", _setting, "a key of the backend's configuration, such as PageAhead=0", "KEY=VALUE", repeated=True),
    Flag("config", _json_object, "further keys of the network configuration", "JSON"),
    Flag("ipv6", choice("off", "on", "only"), "off, on (dual stack) or only", "WHICH"),
    Flag("segments", integer(1, 2), "layer 2 segments, hosts taking turns, a router between", "N"),
    Flag(
        "store", choice("etcd", "kube"), "where leases are kept: etcd, or the nodes of a small Kubernetes API", "STORE"
    ),
    Flag("etcd-members", integer(1, 3), "etcd members, 1 or 3", "N"),
    Flag("mtu", integer(576, 65535), "MTU of the underlay in bytes", "BYTES"),
    Flag("cni", boolean, "make the pods with this machine's CNI plugins; with --store kube if there are any", ""),
    Flag("daemon", shlex.split, "command to run as daemon instead of our flanneld", "CMD"),
    NAME,
)
DEFAULTS = SimpleNamespace(
    hosts=3, backend="vxlan", segments=1, store="etcd", etcd_members=1, ipv6="off", mtu=1500, cni=False
)


def main(argv: Sequence[str]) -> int:
    """Run ``flannelctl lab``; returns the exit status."""
    if not argv:
        raise UsageError(f"say what to do: lab {'|'.join(_ACTIONS)}; lab --help tells more")
    action, rest = argv[0], list(argv[1:])
    if action in ("-h", "-help", "--help", "help") or (rest[:1] in (["-h"], ["--help"])):
        print(usage(HEAD, (*BUILD_FLAGS, OUTPUT), DEFAULTS))
        return 0
    if action not in _ACTIONS:
        raise UsageError(f"there is no command lab {action!r}: use {', '.join(_ACTIONS)}")
    return _ACTIONS[action](rest)


def _up(argv: list[str]) -> int:
    spec = _spec(argv, default_name="lab")
    _terminate_like_interrupt()
    lab = Lab(spec)
    lab.up(lambda what: timed(_say, what))
    _say(f"lab {spec.name!r} is up: flannelctl lab status | exec h1 | down")
    if spec.store == "kube":
        kubectl = f"kubectl --kubeconfig={lab.kube.kubeconfig_file}"
        _say(f"its nodes: flannelctl lab exec --name {spec.name} h1 {kubectl} get nodes")
    return 0


def _demo(argv: list[str]) -> int:
    spec = _spec(argv, default_name="demo", ephemeral=True)
    _terminate_like_interrupt()
    return 0 if demo.run(spec, _say) else 1


def _down(argv: list[str]) -> int:
    given = _flags(argv, (NAME,))
    name = str(given["name"]) if "name" in given else _only_lab()
    if not remove(name):
        raise ConfigError(f"there is no lab {name!r}; labs that are up: {', '.join(names()) or 'none'}")
    _say(f"lab {name!r} is gone")
    return 0


def _exec(argv: list[str]) -> int:
    start = 0
    while start < len(argv) and argv[start].startswith("-"):
        start += 1 if "=" in argv[start] else 2
    given = _flags(argv[:start], (NAME,))
    if start >= len(argv):
        raise UsageError("lab exec needs a node, such as h1, pod1 or outside")
    node = Lab.load(str(given["name"]) if "name" in given else _only_lab()).node(argv[start])
    command = argv[start + 1 :] or [os.environ.get("SHELL", "/bin/sh")]
    environment = {**os.environ, **(node.daemon.variables() if isinstance(node, Host) else {})}
    sys.stdout.flush()
    # becomes that command, with its terminal and exit status
    os.execvpe("ip", node.command(*command), environment)  # noqa: S606


def _status(argv: list[str]) -> int:
    given = _flags(argv, (NAME, OUTPUT))
    wanted = [str(given["name"])] if "name" in given else names()
    report = [_describe(Lab.load(name)) for name in wanted]
    if given.get("output") == "json":
        print(json.dumps(report, indent=2))
        return 0
    if not report:
        _say("no lab is up: flannelctl lab up")
    for lab in report:
        kind = "etcd" if "etcd" in lab else "kube"
        what = {"etcd": "etcd", "kube": "Kubernetes API"}[kind]
        _say(f"lab {lab['name']}: backend {lab['backend']}, {what} {lab[kind]}, files in {lab['directory']}")
        columns = ("node", "underlay", "daemon", "ready", "subnet", "mtu")
        rows = [[str(host[column]) for column in columns] for host in lab["hosts"]]
        _say(render_table([column.upper() for column in columns], rows))
    return 0


def _describe(lab: Lab) -> dict[str, Any]:
    hosts = []
    for host in lab.hosts:
        env = host.subnet_env()
        subnets = [subnet for family in lab.spec.families if (subnet := host.gateway(family))]
        hosts.append(
            {
                "node": host.name,
                "netns": host.netns,
                "underlay": " ".join(host.address(family) for family in lab.spec.families),
                "daemon": f"pid {pid}" if (pid := host.daemon.pid) else "not running",
                "ready": "yes" if host.daemon.is_ready() else "no",
                "subnet": " ".join(subnets) or "-",
                "mtu": env.get("FLANNEL_MTU", "-"),
            }
        )
    return {
        "name": lab.spec.name,
        "backend": lab.spec.backend.get("Type", "udp"),
        lab.spec.store: lab.store.status(),
        "directory": str(lab.directory),
        "hosts": hosts,
    }


def _spec(argv: list[str], default_name: str, ephemeral: bool = False) -> LabSpec:
    split = argv.index("--") if "--" in argv else len(argv)
    given = _flags(argv[:split], BUILD_FLAGS)
    backend = {"Type": given.pop("backend", DEFAULTS.backend), **dict(given.pop("set", ()))}
    # a Kubernetes node without CNI plugins starts no pod at all, so there they are the rule
    given.setdefault("cni", given.get("store") == "kube" and not given.get("daemon") and has_plugins())
    return LabSpec(
        name=given.pop("name", default_name),
        backend=backend,
        daemon=tuple(given.pop("daemon", ())),
        daemon_flags=tuple(argv[split + 1 :]),
        ephemeral=ephemeral,
        **given,
    )


def _flags(argv: Sequence[str], flags: Sequence[Flag]) -> dict[str, Any]:
    """Any, because each flag has a type of its own; LabSpec checks ranges again."""
    return scan(argv, flags).values


def _only_lab() -> str:
    known = names()
    if len(known) != 1:
        raise ConfigError(f"name the lab with --name; labs that are up: {', '.join(known) or 'none'}")
    return known[0]


def _terminate_like_interrupt() -> None:
    """SIGTERM and a closed terminal clean up as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _say(line: str) -> None:
    print(line, flush=True)


_ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "up": _up,
    "demo": _demo,
    "status": _status,
    "exec": _exec,
    "down": _down,
}
