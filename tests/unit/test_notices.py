"""What is not right and not ours to repair is told when it begins, shown while it lasts, and told when it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from flanneld.problems import Notices, Problems

log = logging.getLogger("flanneld.test")


def test_each_sentence_is_one_line_at_its_begin_and_one_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shown: list[Sequence[str]] = []
    notices = Notices(log, shown.append)
    for sentences in (["one"], ["one"], ["one", "two"], ["two"], ["two"], []):
        notices.say(sentences)
    assert caplog.messages == ["one", "two", "no longer: one", "no longer: two"]
    assert shown == [["one"], ["one", "two"], ["two"], []]


def test_what_the_log_has_already_is_not_said_again_but_its_end_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shown: list[Sequence[str]] = []
    notices = Notices(log, shown.append, ["one", "two"])
    notices.say(["one"])
    assert caplog.messages == ["no longer: two"]
    assert shown == [["one"]]


def test_the_log_can_say_more_than_the_status(caplog: pytest.LogCaptureFixture) -> None:
    shown: list[Sequence[str]] = []
    Notices(log, shown.append).say(["harmless", "grave"], remark=["grave"])
    assert caplog.messages == ["harmless", "grave"]
    assert shown == [["grave"]]


def test_each_sentence_is_a_remark_of_its_own_whatever_part_it_comes_from() -> None:
    problems = Problems(lambda _: None)
    Notices(log, problems.remarks_of("overlap")).say(["one", "two\nlines"])
    problems.remark("store")("three")
    assert problems.remarks() == ["one", "two\nlines", "three"]
    assert problems.now() == []
