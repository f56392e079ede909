"""The network configuration: parse once, validate every rule, hand out a frozen value.

Contract section 2. Errors name the key, the value and the remedy. Which backends there are is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flanneld.errors import ConfigError
from flanneld.model.addr import IP, Family, Prefix, format_ip, parse_ip
from flanneld.model.conf_json import decode_object, encode_object, wrong
from flanneld.model.netconf import FamilyConf, NetConf

_ABSENT = object()
_EXAMPLE = {Family.V4: "10.5.0.0/16", Family.V6: "fd00:5::/48"}


class _Limits(NamedTuple):
    """What differs between the families. Source: contract 2.6, 2.7."""

    prefix: str
    """Of the key names."""
    usual_len: int
    """Length of a subnet when none is given and the network has room for four of them."""
    max_len: int
    """Longest subnet: it must hold a bridge address and two containers."""


_LIMITS = {Family.V4: _Limits("", 24, 30), Family.V6: _Limits("IPv6", 64, 126)}


def parse_netconf(raw: bytes | str, *, allocates: bool = True) -> NetConf:
    """Read a network configuration.

    Args:
        raw: JSON text.
        allocates: subnets are cut out of the network by ``SubnetLen``; where somebody else names them,
            only the form of ``SubnetLen``, ``SubnetMin`` and ``SubnetMax`` matters (contract 9.5).

    Unlike Go flannel this refuses a range without a single subnet (contract 2.6g), because a host would
    then wait for a lease for ever.

    Raises:
        ConfigError: one sentence that names the key, its value and the remedy.
    """
    if not raw.strip():
        raise ConfigError('the network configuration is empty: write one such as {"Network": "10.5.0.0/16"}')
    keys = _by_lower_case(decode_object(raw, "the network configuration"))
    v4 = _family(keys, Family.V4, allocates, default=True)
    v6 = _family(keys, Family.V6, allocates, default=False)
    if v4 is None and v6 is None:
        raise ConfigError("EnableIPv4 is false and EnableIPv6 is not true: enable at least one of them")
    backend_type, backend = _backend(keys)
    return NetConf(v4, v6, _boolean(keys, "EnableNFTables", False), backend_type, backend)


def _by_lower_case(members: Mapping[str, object]) -> dict[str, object]:
    """Keys in lower case; the last spelling of a key wins, but null leaves a flag or number as it was.

    So Go's decoder has it (encoding/json, Unmarshal); contract 2.2.
    """
    keys: dict[str, object] = {}
    for name, value in members.items():
        if value is not None or name.lower() not in _NULL_IS_NO_CHANGE:
            keys[name.lower()] = value
    return keys


_NULL_IS_NO_CHANGE = frozenset(("enableipv4", "enableipv6", "enablenftables", "subnetlen", "ipv6subnetlen"))


def _boolean(keys: Mapping[str, object], key: str, default: bool) -> bool:
    value = keys.get(key.lower(), default)
    if not isinstance(value, bool):
        raise wrong(key, value, "use true or false")
    return value


def _backend(keys: Mapping[str, object]) -> tuple[str, bytes]:
    """Type and raw JSON of the backend (contract 2.3)."""
    if "backend" not in keys:
        return "udp", b"{}"
    backend = keys["backend"]
    if backend is None:
        backend = {}
    if not isinstance(backend, dict):
        raise wrong("Backend", backend, 'write an object such as {"Type": "vxlan"}')
    kind: object = ""
    for name, value in backend.items():
        if name.lower() == "type" and value is not None:
            kind = value
    if not isinstance(kind, str):
        raise wrong("Backend.Type", kind, 'use the name of a backend, such as "vxlan"')
    if not kind:
        raise ConfigError('Backend.Type is missing: name the backend, such as {"Type": "vxlan"}')
    return kind.lower(), encode_object(backend)


def _family(keys: Mapping[str, object], family: Family, allocates: bool, default: bool) -> FamilyConf | None:
    """One family with its defaults applied, in the order of contract 2.6; None when disabled."""
    enable, prefix = f"Enable{family.label}", _LIMITS[family].prefix
    if not _boolean(keys, enable, default):
        _check_form(keys, family)
        return None
    name = f"{prefix}Network"
    network = _network(keys, name, family)
    if network is None or (network.length == 0 and not any(network.ip)):
        shown = "is missing" if network is None else f"is the whole of {family.label}"
        raise ConfigError(f'{name} {shown}: set it to a range such as "{_EXAMPLE[family]}", or {enable} to false')
    if network.family is not family:
        raise wrong(name, str(network), f'use an {family.label} range such as "{_EXAMPLE[family]}"')
    network = network.masked()
    if not allocates:
        _check_form(keys, family)
        return FamilyConf(network, max(network.length, _LIMITS[family].usual_len), network.first, network.last)
    subnet_len = _subnet_len(keys, network)
    step = 1 << (family.bits - subnet_len)
    low = _bound(keys, f"{prefix}SubnetMin", network, subnet_len, network.first + step)
    high = _bound(keys, f"{prefix}SubnetMax", network, subnet_len, network.last + 1 - step)
    if low > high:
        first, last = (str(Prefix.of_int(n, subnet_len, family)) for n in (low, high))
        raise ConfigError(
            f"{prefix}SubnetMin {first} lies above {prefix}SubnetMax {last}, so there is no subnet to lease: "
            "swap them or leave both out"
        )
    return FamilyConf(network, subnet_len, low, high)


def _check_form(keys: Mapping[str, object], family: Family) -> None:
    """Check the form of a disabled family's keys, which Go flannel also reads in any case."""
    prefix = _LIMITS[family].prefix
    _network(keys, f"{prefix}Network", family)
    _length(keys, f"{prefix}SubnetLen", "use a whole number")
    for bound in ("SubnetMin", "SubnetMax"):
        _address(keys, f"{prefix}{bound}", family)


def _network(keys: Mapping[str, object], key: str, family: Family) -> Prefix | None:
    """The range as written; None when absent. An IPv4 range is well-formed under the IPv6 key (contract 2.2)."""
    if key.lower() not in keys:
        return None
    value = keys[key.lower()]
    try:
        found = Prefix.parse(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or (family is Family.V4 and found.family is not family):
        raise wrong(key, value, f'use an {family.label} range such as "{_EXAMPLE[family]}"')
    return found


def _subnet_len(keys: Mapping[str, object], network: Prefix) -> int:
    """Length of each host's subnet, given or derived (contract 2.6 b and c)."""
    limits = _LIMITS[network.family]
    key, low, high = f"{limits.prefix}SubnetLen", network.length + 2, limits.max_len
    if low > high:
        raise wrong(f"{limits.prefix}Network", str(network), f"use a range of /{high - 2} or larger, to have subnets")
    remedy = f"use a number from {low} to {high}, or leave it out"
    length = _length(keys, key, remedy)
    if length and not low <= length <= high:
        raise wrong(key, length, remedy)
    if length:
        return length
    return limits.usual_len if low <= limits.usual_len else low


def _length(keys: Mapping[str, object], key: str, remedy: str) -> int:
    value = keys.get(key.lower(), 0)
    if type(value) is not int or value < 0:  # a JSON true is an int to isinstance
        raise wrong(key, value, remedy)
    return value


def _bound(keys: Mapping[str, object], key: str, network: Prefix, subnet_len: int, default: int) -> int:
    """First or last subnet as an integer, given or derived (contract 2.6 d to f)."""
    ip = _address(keys, key, network.family)
    if ip is None or not any(ip):
        return default
    text = format_ip(ip)
    if ip not in network:
        raise wrong(key, text, f"use an address inside {network}, or leave it out")
    number = int.from_bytes(ip, "big")
    aligned = Prefix(ip, subnet_len).masked()
    if number != aligned.first:
        raise wrong(key, text, f"use the first address of a /{subnet_len}, such as {format_ip(aligned.ip)}")
    return number


def _address(keys: Mapping[str, object], key: str, family: Family) -> IP | None:
    """An address; IPv6 ones may be IPv4 in form, which then lie outside of any network."""
    value = keys.get(key.lower(), _ABSENT)
    if value is _ABSENT or (value is None and family is Family.V6):  # contract 2.2 allows null here for IPv6 only
        return None
    example = format_ip(Prefix.parse(_EXAMPLE[family]).ip)
    try:
        found = parse_ip(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or (family is Family.V4 and len(found) != family.bits // 8):
        raise wrong(key, value, f'use an {family.label} address such as "{example}"')
    return found
