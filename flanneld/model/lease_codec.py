"""The text of leases: the grammar of subnet keys and the JSON of their values.

The only place that spells the JSON field names and the key form. Reads whatever a Go flanneld can
read, writes only what it can read too: one key or value it cannot parse makes every running Go
flanneld drop all its peers (contract 3.15). Backend data stays raw; its backend decodes it.
"""

from __future__ import annotations

import re

import msgspec

from flanneld.errors import ConfigError, PeerDataError
from flanneld.model.addr import IP, Family, Prefix, format_ip, parse_ip
from flanneld.model.lease import LeaseAttrs

# Searched for, not matched: any text may stand before it, the end is exact (contract 3.13).
_KEY = re.compile(rb"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f0-9:]+)-(\d+))?\Z")

_KEY_BYTES = 1024
"""Longest key looked at; the search takes quadratic time over a hostile run of digits."""

_VALUE_BYTES = 16 << 10
"""Longest value looked at. One takes 200 bytes; backends of Go flanneld that put more into it are not ours."""

_BRACKETS = 64
"""Most opening brackets in a value: what is nested deeper than Python's stack would come up at some later reader."""

_NO_V4 = Prefix(IP(bytes(4)), 0)
"""What stands for "no IPv4 subnet" in the key of an IPv6-only lease. The grammar demands an IPv4
part; Go flanneld's own walk of an empty range writes this one (contract 3.24). Keys stay distinct
between hosts, because the IPv6 part follows."""


def parse_key(key: bytes) -> tuple[Prefix | None, Prefix | None]:
    """The IPv4 and IPv6 subnets that a key names; host bits as written.

    Args:
        key: the whole key in the store, or any tail of it that holds the subnet.

    Raises:
        PeerDataError: Go flanneld would not read it either, or it claims every address there is.

    Source: contract 3.11 to 3.14; flannel pkg/subnet, ParseSubnetKey.
    """
    found = _KEY.search(key) if len(key) <= _KEY_BYTES else None
    if found is None:
        raise PeerDataError(f"key {shown(key)} does not end in a subnet such as 10.5.2.0-24")
    ip, length, ip6, length6 = found.groups()
    try:
        subnet: Prefix | None = Prefix(parse_ip(ip.decode()), _length(length, Family.V4))
        subnet6 = Prefix(parse_ip(ip6.decode()), _length(length6, Family.V6)) if ip6 else None
    except ValueError as error:
        raise PeerDataError(f"key {shown(key)} names no subnet: {error}") from error
    if subnet == _NO_V4 and subnet6:
        subnet = None
    for claimed in (subnet, subnet6):
        if claimed and claimed.length == 0:
            raise PeerDataError(f"key {shown(key)} claims every {claimed.family.label} address")
    return subnet, subnet6


def render_key(subnet: Prefix | None, subnet6: Prefix | None) -> str:
    """The last element of a lease's key, e.g. ``10.5.52.0-24`` or ``10.5.52.0-24&fd00:12::-56``.

    Raises:
        ConfigError: Go flanneld could not read the key (contract 3.15).

    Source: contract 3.11, 3.12; for IPv6-only leases ``_NO_V4`` above.
    """
    v4 = subnet or _NO_V4
    text = f"{format_ip(v4.ip)}-{v4.length}"
    if subnet6:
        text += f"&{format_ip(subnet6.ip)}-{subnet6.length}"
    try:
        readable = parse_key(text.encode()) == (subnet, subnet6)
    except PeerDataError:
        readable = False
    if not readable:
        raise ConfigError(
            f"subnet {'+'.join(str(p) for p in (subnet, subnet6) if p) or 'none'} cannot be written as an etcd key "
            "that flannel reads; choose another SubnetLen or Network"
        )
    return text


def _length(digits: bytes, family: Family) -> int:
    # Go parses into 5 or 7 bits: a /32 or /128 is out of range, leading zeros are not (contract 3.13).
    significant = digits.lstrip(b"0") or b"0"
    if len(significant) > 3 or int(significant) >= family.bits:
        raise ValueError(f"its {family.label} prefix length is above {family.bits - 1}")
    return int(significant)


class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    """The value as every flanneld spells it; anything else takes the slow path."""

    PublicIP: str | None = None
    PublicIPv6: str | None = None
    BackendType: str = ""
    BackendData: msgspec.Raw = msgspec.Raw()
    BackendV6Data: msgspec.Raw = msgspec.Raw()
    FlanneldID: str = ""


_FIELDS = {name.casefold(): name for name in _Wire.__struct_fields__}
_decode_wire = msgspec.json.Decoder(_Wire).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def decode_attrs(value: bytes) -> LeaseAttrs:
    """Decode the value of a subnet key.

    Field names match in any case, unknown fields are ignored, ``0.0.0.0`` and ``null`` mean absent.

    Raises:
        PeerDataError: not an object, a field of a wrong type, an address that is none, or far too much of all.

    Source: contract 3.16, 3.18, 13.5.
    """
    check_size(value, "value")
    try:
        value.decode()  # what stays raw nobody has looked at
        try:
            wire = _decode_wire(value)
        except msgspec.ValidationError:
            wire = _decode_loose(value)
        return LeaseAttrs(
            _public_ip(wire.PublicIP, Family.V4),
            _public_ip(wire.PublicIPv6, Family.V6),
            word(wire.BackendType, "BackendType"),
            _raw(wire.BackendData),
            _raw(wire.BackendV6Data),
            word(wire.FlanneldID, "FlanneldID"),
        )
    except (ValueError, RecursionError) as error:  # msgspec: DecodeError, UnicodeDecodeError, deep nesting
        raise PeerDataError(f"value {shown(value)} is not a lease: {error}") from error


def check_size(value: bytes, what: str) -> None:
    """Refuse what is too large for a lease, before anybody reads it.

    Raises:
        PeerDataError: the sentence says in which way.
    """
    if len(value) > _VALUE_BYTES:
        raise PeerDataError(f"{what} is too large for a lease: more than {_VALUE_BYTES >> 10} KiB")
    if value.count(b"[") + value.count(b"{") > _BRACKETS:
        raise PeerDataError(f"{what} is too large for a lease: more than {_BRACKETS} objects and lists in it")


def encode_attrs(attrs: LeaseAttrs) -> bytes:
    """Encode a lease's value, byte for byte as Go flanneld does, with our ``FlanneldID`` at the end.

    Raises:
        ConfigError: backend data that is not JSON, which no reader would survive (contract 3.15).

    Source: contract 3.16, 13.2.
    """
    parts = [b'{"PublicIP":"', (format_ip(attrs.public_ip) if attrs.public_ip else "0.0.0.0").encode(), b'"']
    parts += [b',"PublicIPv6":', _json(format_ip(attrs.public_ip6)) if attrs.public_ip6 else b"null"]
    if attrs.backend_type:
        parts += [b',"BackendType":', _json(attrs.backend_type)]
    for name, data in ((b"BackendData", attrs.data), (b"BackendV6Data", attrs.data6)):
        if data:
            parts += [b',"', name, b'":', _compact(data)]
    if attrs.identity:
        parts += [b',"FlanneldID":', _json(attrs.identity)]
    return b"".join([*parts, b"}"])


def _decode_loose(value: bytes) -> _Wire:
    """Decode field names of any case, ignoring others; in Go's manner ``null`` leaves a field as it is."""
    known = {
        field: raw
        for name, raw in _decode_fields(value).items()
        if (field := _FIELDS.get(name.casefold())) and bytes(raw) != b"null"
    }
    return _decode_wire(b"{%s}" % b",".join(b'"%s":%s' % (name.encode(), bytes(raw)) for name, raw in known.items()))


def _public_ip(text: str | None, family: Family) -> IP | None:
    if text is None:
        return None
    ip = parse_ip(text)
    if len(ip) * 8 != family.bits:
        raise ValueError(f"{text!r} is not an {family.label} address")
    return ip if any(ip) else None


def word(text: str, field: str) -> str:
    """A name that comes up in sentences and is compared as it is; wild text is nobody's."""
    if len(text) > 64 or not (text.isascii() and text.isprintable()):
        raise ValueError(f"{field} is no name of up to 64 printable characters")
    return text


def _raw(data: msgspec.Raw) -> bytes:
    raw = bytes(data)
    return b"" if raw == b"null" else raw


def _json(text: str) -> bytes:
    return msgspec.json.encode(text)


def _compact(data: bytes) -> bytes:
    try:
        return msgspec.json.format(data, indent=-1)
    except msgspec.DecodeError as error:
        raise ConfigError(f"backend data {shown(data)} is not JSON: {error}") from error


def shown(text: bytes) -> str:
    """Foreign bytes for a sentence: printable, bounded."""
    part = text if len(text) <= 120 else text[:120] + b"..."
    return repr(part.decode("utf-8", "backslashreplace"))
