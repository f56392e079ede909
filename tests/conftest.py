"""What a test needs of the machine, found out by doing it once in a scratch namespace.

A test whose need is not met is skipped, and the skip names it. ``--require=netns,vxlan,nft,iptables,etcd,cni``
makes that a failure: CI promises these, so a test that silently stops running there is a defect.
"""

from __future__ import annotations

import functools
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from flanneld.errors import FlannelError
from flanneld.lab import Lab, LabSpec, cni, netns
from flanneld.lab.etcd import binary
from flanneld.lab.spec import IPv6Mode
from tests.support import debian, programs, vm

MARKS = {"kernel": "netns", "etcd": "etcd"}
"""Capability that a mark stands for; any other is asked for by ``@pytest.mark.needs("vxlan")``."""


settings.register_profile("busy machine", deadline=None)  # how long an example takes is no claim of ours
settings.load_profile("busy machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="CAPABILITIES",
        help=f"fail instead of skip where one of these is missing: {','.join(PROBES)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*capabilities): of the machine, such as vxlan, nft or iptables")
    if unknown := _required(config) - set(PROBES):
        raise pytest.UsageError(f"--require knows {', '.join(PROBES)}, not {', '.join(sorted(unknown))}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs = [capability for mark, capability in MARKS.items() if item.get_closest_marker(mark)]
    needs += [capability for mark in item.iter_markers("needs") for capability in mark.args]
    for capability in dict.fromkeys(needs):
        if lack := missing(capability):
            sentence = f"this machine lacks {capability}: {lack}"
            if capability in _required(item.config):
                pytest.fail(sentence, pytrace=False)
            pytest.skip(sentence)


def _required(config: pytest.Config) -> set[str]:
    return {word.strip() for word in str(config.getoption("--require")).split(",") if word.strip()}


@functools.cache
def missing(capability: str) -> str:
    """Why this machine cannot do something; empty when it can."""
    return PROBES[capability]()


def _no_netns() -> str:
    if os.geteuid() != 0:
        return "not root"
    return _refused("true")


def _no_etcd() -> str:
    try:
        done = subprocess.run([binary("etcd"), "--version"], capture_output=True, text=True, timeout=30)
    except (FlannelError, OSError) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


def _no_udp_kernel() -> str:
    from tests.support.udp_hosts import lacking  # here, so that other tests do not pay for it

    return missing("netns") or lacking()


def _no_cni() -> str:
    try:
        cni.check_plugins()
    except FlannelError as error:
        return str(error)
    return missing("netns")


def _refused(*commands: str) -> str:
    """Run shell commands in a scratch namespace; what the first that fails says."""
    if os.geteuid() != 0:
        return "not root"
    name = f"flprobe-{secrets.token_hex(3)}"
    try:
        netns.add([name])
        for command in commands:
            argv = ["ip", "netns", "exec", name, "sh", "-c", command]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
            if done.returncode:
                return done.stderr.strip() or f"{command!r} failed"
    except (FlannelError, OSError) as error:
        return str(error)
    finally:
        netns.remove([name])
    return ""


PROBES: dict[str, Callable[[], str]] = {
    "netns": _no_netns,
    "vxlan": lambda: _refused("ip link add vx type vxlan id 1 dstport 8472 nolearning"),
    "nft": lambda: _refused(
        "nft 'table ip t { chain c { type nat hook postrouting priority 100; oifname x masquerade fully-random; }; }'"
    ),
    "iptables": lambda: _refused("iptables -w -t nat -A POSTROUTING -m comment --comment probe -j MASQUERADE"),
    "ethtool": lambda: _refused("command -v ethtool"),
    "etcd": _no_etcd,
    "cni": _no_cni,
    "udp_kernel": _no_udp_kernel,
    "vm": vm.lacking,
    "debian": debian.lacking,
    "systemd-nspawn": programs.no_nspawn,
    "buildah": programs.no_buildah,
    "podman": programs.no_podman,
    "faketime": programs.no_faketime,
    "hadolint": lambda: programs.no_script("hadolint"),
    "kubernetes-validate": lambda: programs.no_script("kubernetes-validate"),
    "kubectl": lambda: programs.no_script("kubectl"),
    "helm": lambda: programs.no_module("helm_python"),
    "yamllint": lambda: programs.no_script("yamllint"),
    "cel": lambda: programs.no_module("cel"),
}

MakeLab = Callable[..., Lab]


@pytest.fixture
def make_lab() -> Iterator[MakeLab]:
    """Describe a lab with a name of its own; it is taken down after the test, whatever happened."""
    made: list[Lab] = []

    def make(hosts: int = 3, *, ipv6: IPv6Mode = "off", **spec: object) -> Lab:
        name = f"t{secrets.token_hex(4)}"
        lab = Lab(LabSpec(name, hosts=hosts, ipv6=ipv6, ephemeral=True, **spec))  # type: ignore[arg-type]
        made.append(lab)
        return lab

    yield make
    for lab in made:
        lab.down()
