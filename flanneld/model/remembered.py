"""What a host remembers of its network, as text: configuration, own lease, everybody's leases. Pure.

One header; one line a lease, its age (``Lease.created``) and then the value as etcd holds it; one line with the
checksum of all before it. So ``less`` shows it, ``jq`` takes it apart, and a torn, rotten or edited file is known
as such::

    {"kind":"flanneld-cache","version":1,"network":"/coreos.com/network",…,"config":"{…}","leases":2}
    ["10.5.2.0-24","10.5.2.0/24",null,17,{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan",…}]
    ["10.5.9.0-24","10.5.9.0/24",null,25,{"PublicIP":"192.0.2.9",…}]
    sha256:5a3f…
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar

import msgspec

from flanneld.errors import FlannelError, PeerDataError
from flanneld.model.addr import IP, Family, Prefix, format_ip, parse_ip
from flanneld.model.lease import Lease
from flanneld.model.lease_codec import decode_attrs, encode_attrs

_MARK = b"sha256:"

VERSION = 1


class Header(msgspec.Struct, tag_field="kind", tag="flanneld-cache", frozen=True, kw_only=True):
    """Everything but the leases."""

    version: Literal[1] = 1
    network: str
    """``Options.network_id``."""
    identity: str
    """Whose memory it is: a directory copied to another machine must not speak for it."""
    boot: str
    """``boot_id`` of the run of the machine that wrote it."""
    saved: float
    """When it was written, in seconds since the epoch."""
    store: str
    """What tells the store from another or an older one; ``Store.mark``."""
    config: str
    """The network configuration as the store holds it."""
    own: str
    """Key of our own lease, which is among the leases."""
    expires: float | None
    """When our own lease runs out, in seconds since the epoch; None = never."""
    lost: bool = False
    """Whether another host had our subnet when this was written: then nobody starts from it unasked."""
    operator: tuple[str, str] = ("", "")
    """``Store.operator_addresses``, empty where there is none."""
    leases: int
    """How many lines follow."""


class Newer(ValueError):
    """A format that came after this program."""

    def __init__(self, version: int) -> None:
        super().__init__(f"a newer flanneld wrote it (format {version}, this one knows up to {VERSION})")
        self.version = version


class Remembered(NamedTuple):
    """A file whose checksum is right."""

    header: Header
    rows: bytes

    def leases(self) -> dict[str, Lease]:
        """The leases by key. Revisions are of a past that the store may not share, so they are 0.

        A lease that an older version took and this one refuses is left out, as it would be from the store.

        Raises:
            ValueError: a line of another form, in spite of the checksum.
        """
        rows = self.rows.splitlines()
        if len(rows) != self.header.leases:
            raise ValueError(f"it holds {len(rows)} leases and says {self.header.leases}")
        return {key: lease for key, lease in map(_read_row, rows) if lease}

    def own(self) -> Lease | None:
        """Our own lease; without reading the others, for which there may be no need.

        Raises:
            ValueError: as ``leases``.
        """
        at = (b"\n" + self.rows).find(b"\n[" + msgspec.json.encode(self.header.own) + b",")
        return _read_row(self.rows[at:].partition(b"\n")[0])[1] if at >= 0 else None

    def operator(self) -> tuple[IP | None, IP | None]:
        """See ``Store.operator_addresses``."""
        v4, v6 = (parse_ip(text) if text else None for text in self.header.operator)
        return v4, v6


def encode(header: Header, leases: Mapping[str, Lease]) -> Iterator[bytes]:
    """The file, piece by piece; what cannot be written as text, a key of wild bytes, is left out.

    Args:
        header: all but the leases; its count is set here.
        leases: by key.
    """
    rows = [row for key, lease in leases.items() if (row := _row(key, lease))]
    digest = hashlib.sha256()
    head = msgspec.json.encode(msgspec.structs.replace(header, leases=len(rows))) + b"\n"
    for piece in (head, *rows):
        digest.update(piece)
        yield piece
    yield _MARK + digest.hexdigest().encode() + b"\n"


def decode(raw: bytes) -> Remembered:
    """Read a file and check it.

    Raises:
        Newer: of a version to come.
        ValueError: truncated, damaged, of another kind; the text says which.
    """
    _refuse_newer(raw)
    body, found, checksum = raw.rpartition(_MARK)
    if not found or not checksum.endswith(b"\n"):
        raise ValueError("it has no checksum at its end, so it is cut short or no memory of leases")
    if hashlib.sha256(body).hexdigest().encode() != checksum.strip():
        raise ValueError("its checksum is wrong, so it was damaged or edited")
    head, _, rows = body.partition(b"\n")
    return Remembered(_decoded(_decode_head, head), rows)


class _Head(msgspec.Struct, tag_field="kind", tag="flanneld-cache"):
    """What the first line has in any version, those to come included."""

    version: int


def _refuse_newer(raw: bytes) -> None:
    try:
        head = msgspec.json.decode(raw[: raw.find(b"\n") + 1], type=_Head)
    except (ValueError, RecursionError):
        return  # the checksum says what it is
    if head.version > VERSION:
        raise Newer(head.version)


_Row = tuple[str, str | None, str | None, int, msgspec.Raw]
_decode_row = msgspec.json.Decoder(_Row).decode
_decode_head = msgspec.json.Decoder(Header).decode
T = TypeVar("T")


def _decoded(decode: Callable[[bytes], T], raw: bytes) -> T:
    try:
        return decode(raw)  # msgspec's other errors are ValueErrors
    except RecursionError as error:
        raise ValueError("something in it is nested too deeply") from error


def _row(key: str, lease: Lease) -> bytes:
    try:
        subnets = (str(lease.subnet) if lease.subnet else None, str(lease.subnet6) if lease.subnet6 else None)
        return msgspec.json.encode((key, *subnets, lease.created, msgspec.Raw(encode_attrs(lease.attrs)))) + b"\n"
    except (FlannelError, UnicodeEncodeError):
        return b""


def _read_row(line: bytes) -> tuple[str, Lease | None]:
    key, subnet, subnet6, created, value = _decoded(_decode_row, line)
    try:
        attrs = decode_attrs(bytes(value))
    except PeerDataError:
        return key, None
    return key, Lease(_prefix(subnet, Family.V4), _prefix(subnet6, Family.V6), attrs, created=created)


def _prefix(text: str | None, family: Family) -> Prefix | None:
    if text is None:
        return None
    prefix = Prefix.parse(text)
    if prefix.family is not family:
        raise ValueError(f"{text!r} is not {family.label}")
    return prefix


def texts(addresses: Iterable[IP | None]) -> tuple[str, str]:
    """``Header.operator`` of what a store says."""
    v4, v6 = (format_ip(ip) if ip else "" for ip in addresses)
    return v4, v6
