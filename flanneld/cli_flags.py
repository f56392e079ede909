"""The daemon's flags (contract 1.2), and the options that a command line and an environment amount to.

``flannelctl`` takes ``ETCD_FLAGS`` and ``etcd_options`` for itself, so both reach etcd the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flanneld.flag_values import (
    address,
    boolean,
    choice,
    device_name,
    file_name,
    integer,
    listen_address,
    minutes,
    module_levels,
    network_name,
    no_backtrace,
    port,
    regex,
    something,
    utf8,
)
from flanneld.goflags import Flag, from_environment
from flanneld.model.addr import Family
from flanneld.model.options import EtcdOptions, Options

ETCD_FLAGS = (
    Flag("etcd-endpoints", something, "etcd servers, separated by commas", "URLS"),
    Flag("etcd-prefix", utf8, "where the network lives in etcd"),
    Flag("etcd-cafile", str, "certificates that etcd's own is checked against", "FILE"),
    Flag("etcd-certfile", str, "our certificate for etcd", "FILE"),
    Flag("etcd-keyfile", str, "the private key of our certificate", "FILE"),
    Flag("etcd-username", utf8, "user name for etcd"),
    Flag("etcd-password", utf8, "password for etcd; better in FLANNELD_ETCD_PASSWORD, which ps hides", secret=True),
)

_KUBE_FLAGS = (
    Flag("kube-subnet-mgr", boolean, "keep leases in Kubernetes instead of etcd", ""),
    Flag("kube-api-url", str, "Kubernetes API server; default: what the kubeconfig or the pod says", "URL"),
    Flag("kube-annotation-prefix", utf8, "prefix of our annotations on nodes"),
    Flag("kubeconfig-file", str, "how to reach Kubernetes from outside of a pod", "FILE"),
    Flag("net-config-path", str, "network configuration file, with --kube-subnet-mgr", "FILE"),
    Flag("set-node-network-unavailable", boolean, "tell Kubernetes that our node's network is available", ""),
)

DAEMON_FLAGS = (
    *ETCD_FLAGS,
    Flag("iface", something, "external interface, name or address, tried in order", "NAME|IP", repeated=True),
    Flag("iface-regex", regex, "pattern for its address or name, tried after --iface", "REGEX", repeated=True),
    Flag("iface-can-reach", address(), "take the interface that leads to this address, tried last", "IP"),
    Flag("public-ip", address(Family.V4), "IPv4 address to tell peers", "IP"),
    Flag("public-ipv6", address(Family.V6), "IPv6 address to tell peers", "IP"),
    Flag("allow-overlap", boolean, "start although the cluster network overlaps networks of this host", ""),
    Flag("subnet-file", something, "file to write our subnet to", "FILE"),
    Flag("state-dir", something, "directory for the machine's identity and the lease cache", "DIR"),
    Flag(
        "subnet-lease-renew-margin",
        minutes(1, 1439),
        "renew our lease when this many minutes are left",
        "MINUTES",
        target="renew_margin_s",
        default="60",
    ),
    Flag("ip-masq", boolean, "masquerade what leaves the cluster network", ""),
    Flag("ip-masq-fully-random-disable", boolean, "masquerade without random source ports", ""),
    Flag("iptables-forward-rules", boolean, "accept forwarding from and to the cluster network", ""),
    Flag(
        "iptables-resync",
        integer(1, (1 << 31) - 1, "of seconds"),
        "check firewall rules every so many seconds",
        "SECONDS",
        target="iptables_resync_s",
    ),
    Flag("ip-blackhole-route", boolean, "drop packets to unused addresses of our own subnet", ""),
    Flag("cni-conf-dir", str, "keep a CNI configuration list in this directory, such as /etc/cni/net.d", "DIR"),
    Flag("cni-conf-name", file_name, "name of that file", "NAME"),
    Flag("cni-network-name", network_name, "name of the network in it", "NAME"),
    Flag("cni-bridge", device_name, "name of the bridge in it", "NAME"),
    Flag("cni-conf-form", choice("bridge", "flannel"), "plugins it names: bridge, or flannel (delegates)", "FORM"),
    Flag("healthz-ip", listen_address, "address of the health server", "IP"),
    Flag("healthz-port", port, "port of the health server, 0 for none", "PORT"),
    *_KUBE_FLAGS,
    Flag("drop-privileges", boolean, "give up capabilities that are not needed", ""),
    Flag("log-format", choice("text", "json"), "form of the log lines, text or json", "FORMAT"),
    Flag("v", integer(0, (1 << 31) - 1), "above 0 logs debugging lines too", "LEVEL"),
    Flag("vmodule", module_levels, "the same by module, such as etcd=1,vx*=1", "MODULE=LEVEL,…"),
    Flag("log_backtrace_at", no_backtrace, "klog's; only its default, which means off, is accepted", "FILE:LINE"),
    Flag("version", boolean, "print the version and exit", "", env=False),
)


def daemon_options(given: Mapping[str, object], environ: Mapping[str, str]) -> Options:
    """The daemon's options: command line before environment before default (contract 1.4).

    Args:
        given: fields from the command line, ``goflags.Scanned.values``.
        environ: the environment.

    Raises:
        UsageError: a variable's value is wrong.
    """
    values = _merged(given, environ, DAEMON_FLAGS)
    values.pop("version", None)
    return Options(**values)


def etcd_options(given: Mapping[str, object], environ: Mapping[str, str]) -> EtcdOptions:
    """Only the etcd part, for ``flannelctl``; other fields in ``given`` are left alone.

    Raises:
        UsageError: a variable's value is wrong.
    """
    wanted = {flag.field for flag in ETCD_FLAGS}
    return EtcdOptions(**_merged({k: v for k, v in given.items() if k in wanted}, environ, ETCD_FLAGS))


def _merged(given: Mapping[str, object], environ: Mapping[str, str], flags: tuple[Flag, ...]) -> dict[str, Any]:
    """Any, because one table feeds fields of several types; the tests hold each flag to its field's type."""
    return {**from_environment(environ, flags, given), **given}
