"""The kinds of values that flags take: each turns text into a value or says which text it wants.

A ValueError from here is the remedy alone; ``goflags.parse_value`` puts the flag and its value before it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

from flanneld.model.addr import IP, Family, family_of, parse_ip
from flanneld.model.plain import plain

_TRUE = frozenset(("1", "t", "T", "true", "TRUE", "True"))
_FALSE = frozenset(("0", "f", "F", "false", "FALSE", "False"))


def boolean(text: str) -> bool:
    """Go's words for true and false. Source: Go ``strconv.ParseBool``; contract 1.1."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("use true or false")


def integer(low: int, high: int, unit: str = "") -> Callable[[str], int]:
    """Whole numbers from ``low`` to ``high``, also as 0x, 0o or 0b (contract 1.1).

    Args:
        low: smallest one accepted.
        high: largest one accepted.
        unit: for the sentence, ``of minutes``.
    """
    remedy = f"use a number {unit + ' ' if unit else ''}from {low} to {high}"

    def parse(text: str) -> int:
        number = _go_int(text)
        if number is None or not low <= number <= high:
            raise ValueError(remedy)
        return number

    return parse


def minutes(low: int, high: int) -> Callable[[str], int]:
    """Minutes from ``low`` to ``high``; the value is in seconds."""
    parse = integer(low, high, "of minutes")
    return lambda text: parse(text) * 60


def port(text: str) -> int:
    """A TCP port; 0 or less means none, and the value is 0 then (contract 1.2)."""
    number = _go_int(text)
    if number is None or number > 65535:
        raise ValueError("use a port from 1 to 65535, or 0 for no server")
    return max(number, 0)


def address(family: Family | None = None) -> Callable[[str], IP | None]:
    """An IP address of one family or of either; empty text = None."""
    remedy = {None: "use an IP address", Family.V4: "use an IPv4 address", Family.V6: "use an IPv6 address"}[family]

    def parse(text: str) -> IP | None:
        if not text:
            return None
        try:
            ip = parse_ip(text)
        except ValueError:
            raise ValueError(remedy) from None
        if family not in (None, family_of(ip)):
            raise ValueError(remedy)
        return ip

    return parse


def listen_address(text: str) -> str:
    """An IP address of this host to listen on, kept as text."""
    try:
        parse_ip(text)
    except ValueError:
        raise ValueError("use an IP address, 0.0.0.0 for all of them") from None
    return text


def something(text: str) -> str:
    """Text that must not be empty."""
    if not text:
        raise ValueError("it must not be empty")
    return text


def utf8(text: str) -> str:
    """Text that goes over a wire; the operating system hands us bytes of any kind."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it must be UTF-8") from None
    return text


def file_name(text: str) -> str:
    """The name of a file in some directory, of a kind that CNI runtimes look at."""
    if "/" in text or text.startswith(".") or not text.endswith((".conflist", ".conf", ".json")):
        raise ValueError("use a file name that ends in .conflist, without a directory")
    return text


def network_name(text: str) -> str:
    """The name of a CNI network. Source: CNI specification 1.0, "name" of a network configuration."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", text):
        raise ValueError("use letters, digits, dots, dashes and underscores, a letter or digit first")
    return text


def device_name(text: str) -> str:
    """The name of a network device. Source: Linux, dev_valid_name and IFNAMSIZ."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", text):
        raise ValueError("use at most 15 letters, digits, dots, dashes and underscores")
    return text


def choice(*words: str) -> Callable[[str], str]:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError("use " + " or ".join(words))
        return text

    return parse


def regex(text: str) -> str:
    """A regular expression, kept as text once it is known to compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning for "[[": it does compile
            re.compile(something(text))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"use a regular expression ({plain(str(error)[:200])})") from None
    return text


def module_levels(text: str) -> tuple[tuple[str, int], ...]:
    """klog's ``--vmodule``: ``etcd=1,vx*=2``."""
    levels = []
    for part in filter(None, text.split(",")):
        pattern, _, level = part.partition("=")
        number = _go_int(level)
        if not pattern or number is None:
            raise ValueError("use module=level pairs such as etcd=1,vxlan=1")
        levels.append((pattern, number))
    return tuple(levels)


def no_backtrace(text: str) -> str:
    """klog's ``--log_backtrace_at``, of which only "off" is accepted."""
    if text not in ("", ":0"):
        raise ValueError("use --vmodule instead, no line can be given a backtrace here")
    return text


def _go_int(text: str) -> int | None:
    """A number as Go's ``strconv.ParseInt(text, 0, 64)`` reads it: 010 is octal; None when it is none."""
    if not re.fullmatch(r"[+-]?[0-9][0-9a-fA-FxXoO_]{0,79}", text):
        return None
    for base in (0, 8):
        try:
            number = int(text, base)
        except ValueError:
            continue
        return number if -(1 << 63) <= number < 1 << 63 else None
    return None
