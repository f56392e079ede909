"""Log lines: one per record, on stderr, for people (text) or for programs (json).

Who logs gives a constant sentence and ``key=value``, with ``%``-arguments; never a secret, never a whole
options object. Text lines keep klog's head, ``Lmmdd hh:mm:ss.uuuuuu pid module] `` (contract 1.3), so what
people grep with today goes on working.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from flanneld.errors import FlannelError
from flanneld.model.plain import plain

_OURS = ("flanneld", "backends")
_FRAMES_SHOWN = 8


def setup(log_format: str, verbosity: int, vmodule: Sequence[tuple[str, int]] = ()) -> None:
    """Send all log records of the process to stderr, replacing earlier arrangements.

    Args:
        log_format: ``text`` or ``json``.
        verbosity: above 0 adds our own debugging lines. Those of libraries stay off at any level, because
            HTTP/2 libraries print headers, in which tokens travel.
        vmodule: the same for modules by glob on the file's name, (pattern, level); the first match counts.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(_by_module(verbosity, tuple(vmodule)))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    debugging = verbosity > 0 or any(level > 0 for _, level in vmodule)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if debugging else logging.INFO)


def _by_module(verbosity: int, vmodule: Sequence[tuple[str, int]]) -> Callable[[logging.LogRecord], bool]:
    def passes(record: logging.LogRecord) -> bool:
        if record.levelno > logging.DEBUG:
            return True
        return next((level for glob, level in vmodule if fnmatchcase(record.module, glob)), verbosity) > 0

    return passes


def sentence(error: BaseException) -> str:
    """An exception in one line.

    What was raised on purpose is its own sentence. Anything else is a defect and says where it came up, outermost
    frame first: ``KeyError: 'x' (app.py:88 > reconcile.py:120)``. A group is its members'.
    """
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(sentence(member) for member in error.exceptions)
    if isinstance(error, FlannelError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_SHOWN:]
    trace = " > ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{text} ({trace})" if trace else text


def _message(record: logging.LogRecord) -> str:
    """The record's sentence, with its exception if any, on one line whatever a peer put into it."""
    text = record.getMessage()
    if record.exc_info and record.exc_info[1]:
        text += f": {sentence(record.exc_info[1])}"
    return plain(text)


class TextFormatter(logging.Formatter):
    """``I1121 12:00:00.123456    1234 sources.etcd] sentence key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        stamp = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        micros = int(record.created * 1_000_000) % 1_000_000
        name = record.name.removeprefix("flanneld.")
        return f"{record.levelname[0]}{stamp}.{micros:06} {record.process:>7} {name}] {_message(record)}"


class JsonFormatter(logging.Formatter):
    """``{"time": …, "level": …, "logger": …, "msg": …}``; time is UTC, RFC 3339."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object, without the line's end."""
        members = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": _message(record),
        }
        return json.dumps(members)
