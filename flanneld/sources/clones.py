"""Two machines with one identity, alive at once: how they come to know it, and which of them gives way.

The one whose lease is older stays. It is the one that sees the other's lease being written, and answers with a
write of its own, so that the other sees that in turn (design/lease-protocol.md).
"""

from __future__ import annotations

import logging

from flanneld.errors import LeaseLost, PeerDataError
from flanneld.model.lease import LeaseAttrs
from flanneld.model.lease_codec import decode_attrs
from flanneld.plan.guard import clashes, is_clone
from flanneld.sources.own_key import OwnKey

log = logging.getLogger("flanneld.lease")

REMEDY = (
    "one machine is a clone of the other: write another id (32 hex digits) to machine-id in the --state-dir of one of "
    "them and restart flanneld there"
)


class Clones:
    """What is known of a clone of this machine.

    Args:
        key: ours.
    """

    def __init__(self, key: OwnKey) -> None:
        self._key = key
        self._name = ""
        """Key of its lease; empty = there is none."""
        self._answered = 0
        """Revision of its write that we have answered."""

    def saw(self, name: str, attrs: LeaseAttrs) -> bool:
        """Take note of a lease that was written just now, whosesoever; tells whether ``face`` has something to do."""
        own = self._key.confirmed
        if own is None or name == own.key or not is_clone(attrs, self._key.wanted):
            return False
        self._name = name
        return True

    async def face(self, created: int) -> bool:
        """See to a clone, if there is one.

        Args:
            created: revision at which our key was made.

        Returns:
            Whether our lease has to be written, so that the clone notices us.

        Raises:
            LeaseLost: peers cannot reach both of us, and the clone was there first.
            Unavailable: etcd cannot be asked now.
        """
        if not self._name:
            return False
        key = self._key
        listing = await key.history.get(key.keys.lease(self._name))
        kv = listing.kvs[0] if listing.kvs else None
        found = _decode(kv.value) if kv else None
        if kv is None or found is None or not is_clone(found, key.wanted):
            self._name, self._answered = "", 0
            return False
        sentence = f"machine at {found.where()} has our identity {key.wanted.identity} too, {REMEDY}"
        if clashes(found, key.wanted) and created > kv.create_revision:
            raise LeaseLost(sentence)
        if not self._answered:
            log.warning("identity used twice: %s", sentence)
        answered, self._answered = self._answered, kv.mod_revision
        return answered != kv.mod_revision


def _decode(value: bytes) -> LeaseAttrs | None:
    try:
        return decode_attrs(value)
    except PeerDataError:
        return None
