"""When certificates end, read from their files. Only the time: whether they fit is said by TLS when it is tried.

The standard library shows no certificate that is not a CA's, so the few fields before the time are stepped over here.

Source: RFC 5280 section 4.1 (TBSCertificate, Validity); X.690 section 8.1 (tags and lengths).
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _VERSION = 0x30, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18


def first_ends(path: Path) -> datetime | None:
    """When the first certificate of a file ends, which is the one that a client shows; None if that cannot be read."""
    return next(iter(_ends(path)), None)


def last_ends(path: Path) -> datetime | None:
    """When the last of a file's certificates ends: of several CAs, one that is valid is enough. None as above."""
    return max(_ends(path), default=None)


def not_after(der: bytes) -> datetime:
    """When a certificate ends.

    Raises:
        ValueError: not a certificate.
    """
    certificate = _inside(der, _SEQUENCE)
    fields = _inside(certificate, _SEQUENCE)
    if fields[:1] == bytes((_VERSION,)):
        fields = _after(fields)
    for _serial_signature_issuer in range(3):
        fields = _after(fields)
    ends = _after(_inside(fields, _SEQUENCE))
    kind, start, end = _element(ends)
    text = ends[start:end].decode("ascii")
    if kind == _UTC_TIME:  # RFC 5280 section 4.1.2.5.1: two digits from 50 on are of the last century
        text = ("19" if text[:2] >= "50" else "20") + text
    elif kind != _GENERALIZED_TIME:
        raise ValueError("no time where a certificate's end stands")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _ends(path: Path) -> list[datetime]:
    try:
        blocks = _BLOCK.findall(path.read_text("ascii", "replace"))
        return [not_after(ssl.PEM_cert_to_DER_cert(block)) for block in blocks]
    except (OSError, ValueError):
        return []  # TLS says what is wrong with it


def _inside(data: bytes, kind: int) -> bytes:
    found, start, end = _element(data)
    if found != kind:
        raise ValueError(f"tag {found:#x} where a certificate has {kind:#x}")
    return data[start:end]


def _after(data: bytes) -> bytes:
    return data[_element(data)[2] :]


def _element(data: bytes) -> tuple[int, int, int]:
    """Tag, and where the content begins and ends."""
    if len(data) < 2:
        raise ValueError("cut short")
    size, start = data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start], "big")
    if start + size > len(data):
        raise ValueError("cut short")
    return data[0], start, start + size
