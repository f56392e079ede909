"""Who this machine is, and the MAC addresses that follow from it. Pure: derivation only.

Both must come out the same after a restart, a reboot and the loss of every file but the machine id, and
different on every other machine; hence hashes, no randomness.
"""

from __future__ import annotations

import hashlib

from flanneld.model.addr import MAC

# Changing a label gives every host a new identity or MAC: never do.
_IDENTITY_LABEL = "flanneld identity v1"
_MACHINE_LABEL = "flanneld machine v1"
_MAC_LABEL = "flanneld mac v1"


def derive_identity(machine_id: str, state_dir: str) -> str:
    """The identity that we write into our lease: 32 hex digits.

    Args:
        machine_id: the machine's id; machine-id(5) asks that it is never shown, so only its hash leaves us.
        state_dir: absolute path of the state directory; tells apart several hosts on one machine (the lab).
    """
    return _hash(_IDENTITY_LABEL, machine_id, state_dir).hex()[:32]


def machine_mark(machine_id: str) -> str:
    """What to keep beside an identity to recognise the machine it was made on: 64 hex digits."""
    return _hash(_MACHINE_LABEL, machine_id).hex()


def mac_for(identity: str, device: str) -> MAC:
    """The MAC address of one of our devices: locally administered, unicast (contract 6.11).

    Args:
        identity: this machine's, see ``derive_identity``.
        device: name of the device, which contains the VNI; one machine's devices all differ.
    """
    first, *rest = _hash(_MAC_LABEL, identity, device)[:6]
    # IEEE 802-2014 section 8.2: bit 0 of the first octet is multicast, bit 1 is "locally administered"
    return MAC(bytes([first & 0xFE | 0x02, *rest]))


def _hash(*parts: str) -> bytes:
    """SHA-256 over the parts, NUL between them so that no two lists of parts read alike."""
    return hashlib.sha256("\0".join(parts).encode()).digest()
