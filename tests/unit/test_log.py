"""What log lines look like, and how streaks of failures are told."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest

from flanneld.errors import ConfigError, KernelError
from flanneld.report.log import JsonFormatter, TextFormatter, sentence, setup


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What went to stderr so far; logging is put back as it was."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []
    seen: list[str] = []

    def read() -> str:
        seen.append(capsys.readouterr().err)
        return "".join(seen)

    yield read
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in ("flanneld", "backends"):
        logging.getLogger(name).setLevel(logging.NOTSET)


log = logging.getLogger("flanneld.sources.etcd")


def test_text_line_has_level_time_process_module_and_sentence(lines: Callable[[], str]) -> None:
    setup("text", 0)
    log.info("reconciled peers=%d", 312)
    assert re.fullmatch(r"I\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ sources\.etcd\] reconciled peers=312\n", lines()), lines()


def test_json_line_is_one_object(lines: Callable[[], str]) -> None:
    setup("json", 0)
    log.warning('quoted "%s"\nand broken', "é")
    found = json.loads(lines())
    assert found.pop("time").endswith("+00:00")
    assert found == {"level": "warning", "logger": "flanneld.sources.etcd", "msg": 'quoted "é"\\nand broken'}


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_a_peer_sends_makes_a_second_line(lines: Callable[[], str], form: str) -> None:
    setup(form, 0)
    log.warning("peer says %s", "a\nI0101 fake]\r\x1b[2J\x85\u2028\u202e\udcff é")
    assert lines().count("\n") == 1
    assert lines().rstrip("\n").isprintable()


def test_debugging_lines_come_with_verbosity_only(lines: Callable[[], str]) -> None:
    setup("text", 0)
    log.debug("hidden")
    setup("text", 1)
    log.debug("shown")
    assert "hidden" not in lines()
    assert "shown" in lines()


def test_libraries_debugging_lines_never_come(lines: Callable[[], str]) -> None:
    setup("text", 9)
    logging.getLogger("hpack.hpack").debug("authorization: hunter2")
    assert "hunter2" not in lines()


def test_vmodule_raises_or_lowers_one_module(lines: Callable[[], str]) -> None:
    setup("text", 0, (("test_l*", 1),))
    log.debug("shown")
    setup("text", 1, (("test_l*", 0),))
    log.debug("hidden")
    log.info("always")
    assert [line.rpartition(" ")[2] for line in lines().splitlines()] == ["shown", "always"]


def test_error_raised_on_purpose_is_logged_as_its_sentence(lines: Callable[[], str]) -> None:
    setup("text", 0)
    try:
        raise KernelError("add route 10.5.2.0/24", 1)
    except KernelError:
        log.exception("cycle failed")
    assert lines().endswith("cycle failed: add route 10.5.2.0/24: Operation not permitted\n")


def test_defect_is_logged_with_the_place_where_it_came_up() -> None:
    with pytest.raises(KeyError) as caught:
        dict[str, int]()["x"]
    assert re.fullmatch(r"KeyError: 'x' \((\S+ > )*test_log\.py:\d+\)", sentence(caught.value))


def test_group_is_told_as_its_members() -> None:
    group = ExceptionGroup("g", [ConfigError("a is wrong"), ExceptionGroup("h", [ValueError("b")])])
    assert sentence(group) == "a is wrong; ValueError: b"


def test_microseconds_are_those_of_the_record() -> None:
    record = logging.makeLogRecord({"name": "flanneld.app", "msg": "m", "levelname": "INFO", "created": 1.000042})
    assert ":01.000042 " in TextFormatter().format(record)
    assert json.loads(JsonFormatter().format(record))["time"] == "1970-01-01T00:00:01.000042+00:00"
