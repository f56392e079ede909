"""Another program that undoes each repair is noticed, and fought less and less; nobody else is."""

from __future__ import annotations

from itertools import pairwise

from flanneld.plan.fights import BURST, CALM_S, GAP_S, OBJECTS, WINDOW_S, Fights


def test_a_person_who_damages_the_same_thing_now_and_then_is_undone_each_time() -> None:
    fights = Fights()
    assert all(fights.may_repair("route", now * 1.0) for now in range(1000))
    assert not fights.is_fight("route")
    assert fights.due_s(1000) is None


def test_a_program_in_a_loop_is_held_back_longer_and_longer() -> None:
    fights, repaired = Fights(), []
    for tick in range(20_000):  # it damages every 10 ms, for 200 s
        now = tick / 100
        if fights.may_repair("route", now):
            repaired.append(now)
    assert repaired[BURST] < WINDOW_S
    gaps = [after - before for before, after in pairwise(repaired)]
    assert max(gaps[: BURST - 1]) < 0.1
    assert GAP_S[0] - 0.001 < gaps[BURST] < gaps[BURST + 1] < gaps[BURST + 2]
    assert fights.is_fight("route")
    assert max(gaps) < GAP_S[1] + 0.1


def test_one_fight_does_not_hold_back_other_repairs() -> None:
    fights = Fights()
    for tick in range(100):
        fights.may_repair("route", tick / 100)
    assert not fights.may_repair("route", 0.999)
    assert fights.may_repair("neighbour", 1.0)


def test_the_time_of_the_next_look_is_when_a_repair_is_allowed_again() -> None:
    fights = Fights()
    for tick in range(100):
        fights.may_repair("route", tick / 100)
    due_s = fights.due_s(1.0)
    assert due_s is not None
    assert not fights.may_repair("route", 1.0 + due_s - 0.01)
    assert fights.may_repair("route", 1.0 + due_s)


def test_a_fight_is_over_when_nothing_had_to_be_repaired_for_long_and_a_look_at_that_time_tells() -> None:
    fights = Fights()
    for tick in range(1000):
        fights.may_repair("route", tick / 100)
    fights.due_s(GAP_S[1])  # the look at what was held back, which finds it right
    assert fights.due_s(GAP_S[1]) is not None
    assert fights.settle(CALM_S / 2) == []
    last = CALM_S / 2 + (fights.due_s(CALM_S / 2) or 0) + 0.001
    assert fights.settle(last) == ["route"]
    assert fights.due_s(last) is None
    assert fights.may_repair("route", last + 1)
    assert not fights.is_fight("route")


def test_what_was_held_back_is_a_reason_for_one_look_and_not_for_looks_without_end() -> None:
    fights = Fights()
    for tick in range(BURST + 10):
        fights.may_repair("route", tick / 1000)
    assert fights.due_s(1.0) == 0.0
    assert fights.due_s(1.0) is None


def test_a_tool_that_deletes_until_nothing_is_left_is_given_way_for_a_moment_and_is_no_fight() -> None:
    """As ``ip route flush`` does."""
    fights = Fights()
    held = [tick for tick in range(60) if not fights.may_repair("route", tick / 1000)]
    assert held, "it comes to its end"
    assert fights.may_repair("route", 0.1), "and the route is back"
    assert not fights.is_fight("route")
    assert fights.settle(0.1 + WINDOW_S) == []


def test_a_flush_of_everything_is_repaired_at_once_and_takes_bounded_memory() -> None:
    fights = Fights()
    assert all(fights.may_repair(number, 0.0) for number in range(OBJECTS * 3))
    assert not any(fights.is_fight(number) for number in range(OBJECTS * 3))
    assert len(fights._records) == OBJECTS
