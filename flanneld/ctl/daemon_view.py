"""``flannelctl status`` and ``flannelctl audit``: what the daemon on this host says about itself. Only reads."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flanneld.errors import Unavailable
from flanneld.flag_values import choice, integer, something
from flanneld.goflags import Flag, from_environment, scan, usage
from flanneld.model.options import Options
from flanneld.model.plain import plain
from flanneld.report.control import ask, socket_path
from flanneld.report.table import render_table

STATUS_HEAD = """\
usage: flannelctl status [flags]

What the flanneld of this host is doing, and what is wrong. Exit status 0 when it is ready, even if degraded, 1 when it
is not ready or does not answer."""

AUDIT_HEAD = """\
usage: flannelctl audit [flags]

The last repairs of the flanneld of this host: what others had changed, when, and how fast it was undone."""

FILE = Flag("subnet-file", something, "which daemon: the one that holds this file", "FILE")
OUTPUT = Flag("o", choice("table", "json"), "form of the output, table or json", "FORMAT", target="output", env=False)
LAST = Flag("n", integer(1, 1000), "only the last so many", "NUMBER", target="last", env=False, default="1000")


def status(words: Sequence[str]) -> int:
    """Run ``flannelctl status``; returns the exit status.

    Raises:
        Unavailable: no daemon answers.
    """
    given = scan(words, (FILE, OUTPUT))
    if given.help:
        print(usage(STATUS_HEAD, (FILE, OUTPUT), Options()))
        return 0
    found: dict[str, Any] = json.loads(_fetch(given.values, "/status"))
    print(json.dumps(found, indent=2) if given.values.get("output") == "json" else _in_words(found, time.time()))
    return 1 if found["problems"] else 0


def audit(words: Sequence[str]) -> int:
    """Run ``flannelctl audit``; returns the exit status.

    Raises:
        Unavailable: no daemon answers.
    """
    given = scan(words, (FILE, OUTPUT, LAST))
    if given.help:
        print(usage(AUDIT_HEAD, (FILE, OUTPUT, LAST), Options()))
        return 0
    entries = entries_of(_fetch(given.values, "/audit"))[-int(str(given.values.get("last", 1000))) :]
    if given.values.get("output") == "json":
        print("".join(f"{json.dumps(entry)}\n" for entry in entries), end="")
        return 0
    rows = [_row(entry) for entry in entries]
    if rows:
        print(render_table(("SEEN", "AFTER MS", "BY", "REPAIR"), rows))
    else:
        print("nothing had to be repaired since flanneld was started", file=sys.stderr)
    return 0


def entries_of(page: str) -> list[dict[str, Any]]:
    """What ``/audit`` tells. Not by splitlines(), which takes more for a line end than JSON does."""
    return [json.loads(line) for line in page.split("\n") if line]


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["seen"])) + f".{int(entry['seen'] % 1 * 1000):03d}"
    return seen, f"{entry['after_ms']:.1f}", entry["by"] or "-", entry["text"]


def _in_words(found: Mapping[str, Any], now: float) -> str:
    repairs = ", ".join(f"{count} {kind}" for kind, count in sorted(found["repairs"].items()))
    ends_s = found["lease_ends_in_s"]
    lines = [
        ("state", found["state"]),
        *(("problem", text) for text in found["problems"]),
        *(("remark", text) for text in found["remarks"]),
        ("subnet", " ".join(found["subnets"])),
        ("network", found["network"]),
        ("backend", f"{found['backend']}, {found['data_path']}"),
        (
            "interface",
            f"{found['interface']['name']}, MTU {found['interface']['mtu']}; {found['container_mtu']} for pods",
        ),
        ("public", found["public"] or "not known yet"),
        ("lease", _lease_end(ends_s)),
        ("peers", _peers(found)),
        ("repairs", repairs or "none"),
        ("daemon", f"{found['version']}, pid {found['pid']}, runs for {_span(now - found['since'])}"),
    ]
    return "\n".join(f"{name:<10} {plain(text)}" for name, text in lines)


def _peers(found: Mapping[str, Any]) -> str:
    text = f"{found['leases']} {'lease' if found['leases'] == 1 else 'leases'}, ours included"
    free, total = found.get("subnets_free"), found.get("subnets_total")  # a daemon of before says nothing of it
    return text if free is None else f"{text}; {free} of {total} subnets are free"


def _lease_end(in_s: float | None) -> str:
    if in_s is None:
        return "does not end"
    return f"ends in {_span(in_s)}" if in_s >= 0 else f"ran out {_span(-in_s)} ago, the store has not answered since"


def _span(seconds: float) -> str:
    seconds = int(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // next_size} {next_unit}"
    return f"{seconds} s"


def _fetch(given: Mapping[str, object], page: str) -> str:
    values = {**from_environment(os.environ, (FILE,), given), **given}
    file = Path(str(values.get("subnet_file", Options().subnet_file)))
    path = socket_path(file)
    try:
        code, body = asyncio.run(ask(path, page))
    except (OSError, TimeoutError, ValueError, IndexError) as exc:
        why = getattr(exc, "strerror", None) or "no answer"
        raise Unavailable(
            f"no flanneld answers at {path} ({why}): does it run, with --subnet-file={file}? It answers root only"
        ) from exc
    if code != 200:
        raise Unavailable(f"the flanneld at {path} does not know {page}: it is of another version than flannelctl")
    return body.decode()
