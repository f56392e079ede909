"""What is measured, in which unit, and the figures to beat.

``GO`` are Go flanneld's figures, measured once on a 2-core machine like the one the targets were set for;
beside them in the same run, with ``--daemon``, they mean more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """One kind of figure."""

    title: str
    unit: str
    higher_is_better: bool = False
    plotted: bool = False
    """Whether its cost against cluster size is worth a picture."""


METRICS: Mapping[str, Metric] = {
    "env": Metric("start to subnet.env", "s", plotted=True),
    "ready": Metric("start to ready", "s"),
    "reach": Metric("start to every peer reachable without a lost first packet", "s"),
    "reach_lag": Metric("… of that, after subnet.env", "s"),
    "programmed": Metric("start to all peers programmed", "s", plotted=True),
    "cpu": Metric("CPU used by then", "s", plotted=True),
    "rss": Metric("resident memory", "MiB", plotted=True),
    "one_p50": Metric("one new lease to programmed, p50", "ms", plotted=True),
    "one_p99": Metric("one new lease to programmed, p99", "ms"),
    "burst": Metric("1000 new leases at once to programmed", "s", plotted=True),
    "delete": Metric("all leases deleted at once to kernel clean", "s", plotted=True),
    "idle": Metric("idle CPU", "%"),
    "paged_ready": Metric("start to ready, peers on demand", "s"),
    "paged_rss": Metric("resident memory, peers on demand", "MiB"),
    "paged_entries": Metric("kernel entries, on demand, 100 active peers", ""),
    "miss_p50": Metric("first packet to a peer not paged in, p50", "ms"),
    "miss_p99": Metric("first packet to a peer not paged in, p99", "ms"),
    "misses": Metric("1000 misses at once: all answered", "ms"),
    "misses_lost": Metric("1000 misses at once: packets lost", ""),
    "kube_env": Metric("Kubernetes: start to subnet.env", "s"),
    "kube_ready": Metric("Kubernetes: start to ready", "s"),
    "kube_programmed": Metric("Kubernetes: start to all peers programmed", "s"),
    "kube_cpu": Metric("Kubernetes: CPU used by then", "s"),
    "kube_rss": Metric("Kubernetes: resident memory", "MiB"),
    "kube_peak": Metric("Kubernetes: resident memory, highest ever", "MiB"),
    "kube_idle": Metric("Kubernetes: CPU while all nodes beat every 5 minutes", "%"),
    "tcp_share": Metric("TCP one stream, share of the same devices set up by hand", "", higher_is_better=True),
    "tcp": Metric("TCP one stream", "Gbit/s", higher_is_better=True),
    "tcp_by_hand": Metric("TCP one stream, devices set up by hand", "Gbit/s", higher_is_better=True),
}

Cell = tuple[str, str, int]
"""Metric, backend, number of leases (0 where it does not matter)."""

TARGETS: Mapping[Cell, float] = {
    ("kube_rss", "vxlan", 5000): 80,
    ("kube_peak", "vxlan", 5000): 80,
    **{("env", backend, 100): 0.25 for backend in ("vxlan", "host-gw", "udp", "alloc")},
    **{("env", backend, 5000): 0.40 for backend in ("vxlan", "host-gw", "udp", "alloc")},
    ("reach_lag", "vxlan", 5000): 0.02,
    ("programmed", "vxlan", 5000): 0.55,
    ("programmed", "host-gw", 5000): 0.50,
    ("cpu", "vxlan", 5000): 0.55,
    ("cpu", "host-gw", 5000): 0.50,
    **{("one_p50", backend, 5000): 1.5 for backend in ("vxlan", "host-gw")},
    **{("one_p99", backend, 5000): 4.0 for backend in ("vxlan", "host-gw")},
    ("burst", "vxlan", 5000): 0.15,
    ("burst", "host-gw", 5000): 0.12,
    **{("delete", backend, 5000): 0.25 for backend in ("vxlan", "host-gw")},
    **{("rss", backend, 100): 34.0 for backend in ("vxlan", "host-gw", "udp", "alloc")},
    **{("rss", backend, 5000): 44.0 for backend in ("vxlan", "host-gw", "udp", "alloc")},
    **{("idle", backend, 5000): 0.2 for backend in ("vxlan", "host-gw", "udp", "alloc")},
    ("ready", "vxlan", 50_000): 1.5,
    ("programmed", "vxlan", 50_000): 3.0,
    ("rss", "vxlan", 50_000): 130.0,
    ("paged_ready", "vxlan", 50_000): 1.5,
    ("paged_entries", "vxlan", 50_000): 110,
    ("miss_p50", "vxlan", 50_000): 0.5,
    ("miss_p99", "vxlan", 50_000): 3.0,
    ("misses", "vxlan", 50_000): 100.0,
    ("misses_lost", "vxlan", 50_000): 0,
    **{("tcp_share", backend, 0): 0.95 for backend in ("vxlan", "host-gw")},
    ("tcp_share", "udp/kernel", 0): 0.9,
    ("tcp_share", "udp/kernel/single", 0): 0.65,
}

GO: Mapping[Cell, float] = {
    ("env", "vxlan", 100): 0.15,
    ("env", "vxlan", 1000): 0.30,
    ("env", "vxlan", 5000): 0.81,
    ("reach", "vxlan", 5000): 2.2,
    ("programmed", "vxlan", 100): 0.19,
    ("programmed", "vxlan", 1000): 0.54,
    ("programmed", "vxlan", 5000): 2.20,
    ("programmed", "host-gw", 100): 0.19,
    ("programmed", "host-gw", 1000): 1.12,
    ("programmed", "host-gw", 5000): 28.0,
    ("cpu", "vxlan", 5000): 1.29,
    ("cpu", "host-gw", 5000): 29.8,
    ("one_p50", "vxlan", 5000): 1.8,
    ("one_p99", "vxlan", 5000): 4.4,
    ("one_p50", "host-gw", 5000): 10.8,
    ("one_p99", "host-gw", 5000): 25.8,
    ("burst", "vxlan", 5000): 0.51,
    ("burst", "host-gw", 5000): 12.5,
    ("delete", "vxlan", 5000): 0.57,
    ("delete", "host-gw", 5000): 0.66,
    ("rss", "vxlan", 100): 40,
    ("rss", "vxlan", 5000): 46,
    ("rss", "host-gw", 5000): 53,
    ("idle", "vxlan", 5000): 0.4,
    ("tcp_share", "vxlan", 0): 1.0,
}
