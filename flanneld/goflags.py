"""Command lines in the syntax of Go's ``flag`` package, and environment variables that stand in for flags.

Knows nothing of any particular flag: ``cli_flags.py`` has the daemon's table, ``flannelctl`` its own. Unlike
Go's, nothing is ignored and nothing wrong ends with status 0 (contract 1.6, 11.51): it is a UsageError.

Why not argparse: it takes every word that begins with ``-`` for a flag, so ``--etcd-password -x`` fails where
Go takes the next word as it is; it prints and exits by itself; and it repeats wrong values, secrets too.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flanneld.errors import UsageError
from flanneld.model.plain import plain

ENV_PREFIX = "FLANNELD_"


class Flag(NamedTuple):
    """One flag."""

    name: str
    """As typed, without dashes."""
    parse: Callable[[str], object]
    """Turns text into the value. Its ValueError is the remedy: ``use a number from 1 to 9``."""
    about: str
    """One line for ``--help``."""
    placeholder: str = "TEXT"
    """What ``--help`` shows for the value; empty = a boolean, which takes ``=value`` only."""
    target: str = ""
    """Name of the field to fill, when that is not the flag's name with underscores."""
    repeated: bool = False
    """May be given several times; the value is a tuple."""
    secret: bool = False
    """Its value appears in no message."""
    env: bool = True
    """Whether ``FLANNELD_<NAME>`` stands in for it."""
    default: str = ""
    """The default as ``--help`` shows it, when that is not the field's own."""

    @property
    def field(self) -> str:
        """The field that the value belongs to."""
        return self.target or self.name.replace("-", "_")

    @property
    def label(self) -> str:
        """As written in sentences: ``--iface`` or ``-v``."""
        return ("-" if len(self.name) == 1 else "--") + self.name

    @property
    def variable(self) -> str:
        """The environment variable of this flag (contract 1.4)."""
        return ENV_PREFIX + self.name.upper().replace("-", "_").replace(".", "_")

    @property
    def is_boolean(self) -> bool:
        """Whether the flag alone, without a value, means true."""
        return not self.placeholder


class Scanned(NamedTuple):
    """A command line taken apart."""

    values: dict[str, object]
    """By field name; only what was given."""
    words: tuple[str, ...]
    """What is not a flag, in order; empty unless words were asked for."""
    help: bool = False
    """``-h`` or ``--help`` was met; the words after it were not looked at."""


def scan(argv: Sequence[str], flags: Iterable[Flag], take_words: bool = False) -> Scanned:
    """Take a command line apart (contract 1.1).

    Args:
        argv: the words, without the program's name.
        flags: all flags there are.
        take_words: collect other words, between flags too; without it they are errors.

    Raises:
        UsageError: names the flag or word and the remedy.
    """
    table = {flag.name: flag for flag in flags}
    values: dict[str, object] = {}
    words: list[str] = []
    before: Flag | None = None
    rest = iter(argv)
    for word in rest:
        if word == "--":
            words += rest
        elif len(word) < 2 or word[0] != "-":
            words.append(word)
        else:
            name, text = _split(word)
            if name in ("h", "help"):
                return Scanned(values, tuple(words), help=True)
            before = _find(name, table)
            _store(values, before, _value(before, text, rest))
            continue
        if words and not take_words:
            raise UsageError(_stray(words[0], before))
    return Scanned(values, tuple(words))


def from_environment(environ: Mapping[str, str], flags: Iterable[Flag], given: Container[str]) -> dict[str, object]:
    """Values of flags that were not given but whose variable is set and not empty (contract 1.4, 1.5).

    Args:
        environ: the environment.
        flags: the flags to look for.
        given: fields that have a value already; their variables are not even looked at.

    Raises:
        UsageError: names the variable and the remedy.
    """
    values: dict[str, object] = {}
    for flag in flags:
        text = environ.get(flag.variable, "")
        if flag.env and text and flag.field not in given:
            value = parse_value(flag, text, flag.variable)
            values[flag.field] = (value,) if flag.repeated else value
    return values


def misspelt_variables(environ: Mapping[str, str], flags: Iterable[Flag]) -> list[str]:
    """A sentence for each ``FLANNELD_*`` variable that is none of ours but resembles one.

    Only a warning: Kubernetes itself makes variables such as ``FLANNELD_SERVICE_HOST``.
    """
    known = [flag.variable for flag in flags]
    return [
        f"environment variable {name} has no effect: did you mean {near}?"
        for name in sorted(environ)
        if name.startswith(ENV_PREFIX) and name not in known and (near := _nearest(name, known, 0.85))
    ]


def parse_value(flag: Flag, text: str, label: str) -> object:
    """Turn text into a flag's value.

    Args:
        flag: whose value it is.
        text: as given.
        label: where it was given, ``--iface`` or ``FLANNELD_IFACE``.

    Raises:
        UsageError: the text cannot be used.
    """
    try:
        return flag.parse(text)
    except ValueError as error:
        shown = "has a value that cannot be used" if flag.secret else f"is {text[:80]!r}"
        raise UsageError(f"{label} {shown}: {error}") from None


def usage(head: str, flags: Iterable[Flag], defaults: object) -> str:
    """The text of ``--help``.

    Args:
        head: what comes before the list.
        flags: the flags, in the order to show.
        defaults: an object with an attribute per field; those it lacks are shown without a default.
    """
    lines = [head, ""]
    for flag in flags:
        value = getattr(defaults, flag.field, None)
        shown = flag.default or (str(value).lower() if isinstance(value, bool) else str(value) if value else "")
        several = ", may be repeated" if flag.repeated else ""
        default = f" (default {shown})" if shown and not flag.secret else ""
        lines.append(f"  {flag.label} {flag.placeholder}".rstrip())
        lines.append(f"        {flag.about}{several}{default}")
    return "\n".join(lines)


def _split(word: str) -> tuple[str, str | None]:
    name, equals, text = word[2 if word.startswith("--") else 1 :].partition("=")
    if not name or name[0] == "-":
        raise UsageError(f"{word.partition('=')[0][:80]!r} is not a flag: write --name or --name=value")
    return name, text if equals else None


def _find(name: str, table: Mapping[str, Flag]) -> Flag:
    if flag := table.get(name):
        return flag
    near = _nearest(name.replace("_", "-"), list(table), 0.6)
    remedy = f"did you mean {table[near].label}?" if near else "--help lists all flags"
    # What follows "=" was cut off already: --etcd-pasword=… must not print the password, nor --etcd-password:… here.
    glued = next((flag.label + "…" for flag in table.values() if flag.secret and name.startswith(flag.name)), "")
    raise UsageError(f"there is no flag {glued or plain('--' + name[:80])}: {remedy}")


def _value(flag: Flag, text: str | None, rest: Iterator[str]) -> object:
    if text is None and not flag.is_boolean:
        text = next(rest, None)
        if text is None:
            raise UsageError(f"{flag.label} needs a value: write {flag.label}={flag.placeholder}")
    return parse_value(flag, "true" if text is None else text, flag.label)


def _store(values: dict[str, object], flag: Flag, value: object) -> None:
    if flag.repeated:
        earlier = values.get(flag.field, ())
        value = (*(earlier if isinstance(earlier, tuple) else ()), value)
    values[flag.field] = value


def _stray(word: str, before: Flag | None) -> str:
    """The sentence on a word that is no flag. Go drops it and all that follows, silently (contract 1.1)."""
    if before and before.secret:
        return f"there is a word after the value of {before.label}: quote a value that contains blanks"
    if before and before.is_boolean:
        return f"{word[:80]!r} after {before.label} is not a flag: write {before.label}=true or {before.label}=false"
    return f"{word[:80]!r} is not a flag: every option begins with -- and a value with blanks needs quotes"


def _nearest(name: str, known: Sequence[str], cutoff: float) -> str:
    import difflib  # only when something is misspelt: 4 ms of start-up otherwise

    return next(iter(difflib.get_close_matches(name, known, 1, cutoff)), "")
