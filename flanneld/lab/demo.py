"""``flannelctl lab demo``: a whole cluster, shown and judged, in plain text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

from flanneld.lab.lab import Lab, check_machine, timed
from flanneld.lab.probe import Matrix, egress_source, full_size_ping, ping_matrix
from flanneld.lab.spec import LabSpec
from flanneld.lab.transfer import DATAGRAMS, TCP_BYTES, tcp_transfer, udp_transfer
from flanneld.model.addr import Family
from flanneld.report.cni_file import first_conf
from flanneld.report.table import render_table

LOSS_PACKETS = 20
WITHOUT_DATA_PATH = frozenset({"alloc"})
"""Backends that hand out subnets and leave it to somebody else to connect them (contract 6.55)."""

STORES = {"etcd": "etcd", "kube": "API server"}

Write = Callable[[str], None]


def run(spec: LabSpec, write: Write) -> bool:
    """Build the lab, show what it does, take it down.

    Args:
        spec: the lab to build.
        write: called with each line of output.

    Returns:
        Whether every first packet, every later one, every full-size one, every transfer and every connection to
        the outside got through, as far as the backend promises it.

    Raises:
        FlannelError: the lab could not be built.
    """
    begun = time.monotonic()
    check_machine(spec)
    lab = Lab(spec)
    backend = str(spec.backend.get("Type", "udp"))
    moves_packets = backend not in WITHOUT_DATA_PATH
    where = "" if spec.store == "etcd" else ", leases on Kubernetes nodes"
    write(f"Building a cluster of {spec.hosts} hosts on this machine (backend {backend}{where})")
    lab.up(lambda what: timed(write, what))
    try:
        (_show_nodes if spec.store == "kube" else _show_leases)(lab, write)
        _show_subnet_files(lab, write)
        if spec.cni:
            _show_cni(lab, write)
        if not moves_packets:
            write(f"\nPod to pod: {backend} leases subnets and moves no packets; connecting them is yours to do")
        problems: list[str] = []
        for family in spec.families:
            problems += _judge_overlay(lab, family, write) if moves_packets else ()
            problems += _judge_egress(lab, family, write)
    finally:
        with timed(lambda line: write("\n" + line), f"taken down: daemons, {STORES[spec.store]}, links, namespaces"):
            lab.down()
    took = f"in {time.monotonic() - begun:.1f} s"
    if problems:
        write(f"\nFAILED {took}:")
        for problem in problems:
            write(f"  {problem}")
    else:
        reached = "every other and the outside; no first packet was lost" if moves_packets else "the outside"
        write(f"\nOK {took}: every pod reached {reached}.")
    return not problems


def _judge_overlay(lab: Lab, family: Family, write: Write) -> Iterable[str]:
    """Measure one family between pods, show the figures and yield a sentence for each that is not as it should be."""
    write(f"\nPod to pod over {family.label}: round trip of the very first packet, milliseconds")
    matrix = ping_matrix(lab, family)
    write_matrix(matrix, len(lab.hosts), write)
    for (source, target), outcome in matrix.items():
        if outcome.lost:
            why = outcome.complaint or "no answer"
            yield f"the first {family.label} packet from pod{source} to pod{target} was lost: {why}"

    later = ping_matrix(lab, family, LOSS_PACKETS)
    sent, lost = sum(o.sent for o in later.values()), sum(o.lost for o in later.values())
    write(f"  and {sent} packets after it: {lost} lost")
    if lost:
        yield f"{lost} of {sent} later {family.label} packets were lost"

    if len(lab.hosts) > 1:
        size, outcome = full_size_ping(lab, 1, 2, family)
        write(f"  {size}-byte packets, unfragmented: {'pass' if not outcome.lost else 'DO NOT PASS'}")
        if outcome.lost:
            yield f"{family.label} packets of {size} bytes, as FLANNEL_MTU promises, do not pass"
        yield from _judge_transfers(lab, family, write)


def _judge_transfers(lab: Lab, family: Family, write: Write) -> Iterable[str]:
    """Have each pod send to the next one, and compare what arrived by its SHA-256."""
    write(f"\nTransfers over {family.label}, checked by SHA-256: {TCP_BYTES >> 20} MiB of TCP, {DATAGRAMS} datagrams")
    for source in range(1, len(lab.hosts) + 1):
        target = source % len(lab.hosts) + 1
        tcp, udp = tcp_transfer(lab, source, target, family), udp_transfer(lab, source, target, family)
        way = f"pod{source} to pod{target}"
        verdict = {True: "intact", False: "DAMAGED"}
        write(f"  {way:<16} TCP {verdict[tcp.is_intact]:<9} UDP {verdict[udp.is_intact]}")
        for kind, outcome in (("TCP", tcp), ("UDP", udp)):
            if not outcome.is_intact:
                yield f"{kind} over {family.label} from {way}: {outcome.complaint}"


def _judge_egress(lab: Lab, family: Family, write: Write) -> Iterable[str]:
    """Connect each pod to the outside, show what is seen there, and yield a sentence for each that is wrong."""
    write(f"\nPod to the outside over {family.label}: the address that the outside host sees")
    for host in lab.hosts:
        seen, expected = egress_source(lab, host.number, family), host.address(family)
        write(f"  pod{host.number:<3} {host.pod_address(family):<22} seen as {seen or 'no connection'}")
        if seen != expected:
            yield f"pod{host.number} reaches the outside as {seen or 'nobody'} instead of its host's {expected}"


def write_matrix(matrix: Matrix, hosts: int, write: Write) -> None:
    """Print first-packet latencies, senders as rows."""
    numbers = range(1, hosts + 1)
    write("  from\\to " + "".join(f"{f'pod{target}':>8}" for target in numbers))
    for source in numbers:
        cells = []
        for target in numbers:
            outcome = matrix.get((source, target))
            if outcome is None:
                cells.append("·")
            else:
                cells.append("LOST" if outcome.first_ms is None else f"{outcome.first_ms:.2f}")
        write(f"  {f'pod{source}':<8}" + "".join(f"{cell:>8}" for cell in cells))


def _show_leases(lab: Lab, write: Write) -> None:
    host = lab.host(1)
    write("\nLeases, as `flannelctl leases` shows them on h1")
    flannelctl = (sys.executable, "-m", "flanneld.ctl.main", "leases")
    where = (f"--etcd-endpoints={lab.etcd.endpoints}", f"--state-dir={host.daemon.state_dir}")
    _indented(host.run(*flannelctl, *where).stdout, write)


def _show_nodes(lab: Lab, write: Write) -> None:
    write("\nNodes, as the Kubernetes API shows them: pod CIDRs, and what flanneld has written")
    rows = []
    for node in lab.kube.nodes():
        kept = {key.rpartition("/")[2]: value for key, value in (node["metadata"].get("annotations") or {}).items()}
        addresses = [kept[key] for key in ("public-ip", "public-ipv6") if key in kept]
        conditions = {entry["type"]: entry["status"] for entry in node["status"].get("conditions") or ()}
        rows.append([
            node["metadata"]["name"],
            " ".join(node["spec"].get("podCIDRs") or ["-"]),
            kept.get("backend-type", "-"),
            " ".join(addresses) or "-",
            " ".join(kept[key] for key in ("backend-data", "backend-v6-data") if key in kept) or "-",
            conditions.get("NetworkUnavailable", "-"),
        ])  # fmt: skip
    head = ["NODE", "POD CIDRS", "BACKEND", "PUBLIC IP", "DATA", "NETWORKUNAVAILABLE"]
    _indented(render_table(head, rows), write)


def _show_subnet_files(lab: Lab, write: Write) -> None:
    write("\nsubnet.env on each host")
    files = {host.name: host.subnet_env() for host in lab.hosts}
    keys = list(dict.fromkeys(key for values in files.values() for key in values))
    rows = [[name, *(values.get(key, "-") for key in keys)] for name, values in files.items()]
    _indented(render_table(["", *keys], rows), write)


def _show_cni(lab: Lab, write: Write) -> None:
    write("\nPods made by the plugins of the CNI configuration that flanneld wrote on each host")
    rows = []
    for host in lab.hosts:
        conf = host.cni.configuration()
        pods = " ".join(host.pod_address(family) for family in lab.spec.families)
        plugins = " ".join(
            f"{plugin['type']} {plugin.get('ipam', {}).get('type', '')}".strip() for plugin in conf["plugins"]
        )
        rows.append([host.name, first_conf(host.cni.conf_dir), conf["name"], plugins, host.pod.name, pods])
    _indented(render_table(["", "FILE", "NETWORK", "PLUGINS", "POD", "ADDRESS"], rows), write)


def _indented(text: str, write: Write) -> None:
    for line in text.splitlines():
        write(f"  {line}")
