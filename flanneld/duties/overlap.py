"""Tells of networks of this host that come to overlap the cluster's while the daemon runs (failure F22).

Never a reason to stop: what works goes on, and whoever made the other network has to know.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flanneld.contracts import DataPath
from flanneld.errors import ConfigError
from flanneld.model.host import HostNet
from flanneld.model.netconf import NetConf
from flanneld.plan.overlap import Mine, Overlap, overlaps, refusal, sentences
from flanneld.problems import Notices, Remarks
from flanneld.startup import Standing, is_flannel

log = logging.getLogger("flanneld")


class OverlapWatch:
    """Judges each snapshot of the host; says each overlap once in the log, and as a remark while it lasts.

    Args:
        standing: what this host is and has, as of now.
        path: for our devices.
        remark: where overlaps are shown.
        allowed: ``--allow-overlap``: nothing is said.
        allocates: ``Store.allocates``.
    """

    def __init__(self, standing: Standing, path: DataPath, remark: Remarks, *, allowed: bool, allocates: bool) -> None:
        self._standing, self._path = standing, path
        self._allowed, self._allocates = allowed, allocates
        self._notices = Notices(log, remark, standing.told_overlaps)

    def look(self, net: HostNet) -> bool:
        """Judge a snapshot that has the routes into the cluster network; returns whether something overlaps."""
        found = sentences(self._overlaps(self._standing.conf, net))
        self._notices.say(found)
        return bool(found)

    def refuse(self, conf: NetConf, net: HostNet) -> None:
        """Judge a changed configuration.

        Raises:
            ConfigError: this host would be cut off by it.
        """
        if sentence := refusal(self._overlaps(conf, net)):
            raise ConfigError(sentence)

    def _overlaps(self, conf: NetConf, net: HostNet) -> Sequence[Overlap]:
        if self._allowed:
            return []
        devices = self._path.own.devices | {link.name for link in net.links if is_flannel(link.name)}
        return overlaps(
            conf, net, Mine(self._standing.ext, devices, tuple(self._standing.subnets.values()), self._allocates)
        )
