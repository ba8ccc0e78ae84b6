"""Ids: a prefix, the time, and enough dice."""

import time

from app.ids import are_siblings, new_id, siblings

TIME_DIGITS, DICE_DIGITS = 12, 24


def test_an_id_says_its_kind_and_its_time():
    before = time.time_ns() // 1_000_000
    prefix, _, digits = new_id("resp").partition("_")
    after = time.time_ns() // 1_000_000
    assert prefix == "resp"
    assert before <= int(digits[:TIME_DIGITS], 16) <= after


def test_ids_have_one_length_so_that_they_sort_by_time():
    assert {len(new_id("msg")) for _ in range(100)} == {len("msg_") + TIME_DIGITS + DICE_DIGITS}
    ids = [new_id("msg") for _ in range(1000)]
    times = [one[4 : 4 + TIME_DIGITS] for one in ids]
    assert times == sorted(times)
    assert [one[4 : 4 + TIME_DIGITS] for one in sorted(ids)] == times


def test_ids_of_the_same_millisecond_have_nothing_else_in_common():
    dice = [new_id("msg")[-DICE_DIGITS:] for _ in range(10_000)]
    assert len(set(dice)) == len(dice)
    assert all(len({one[place] for one in dice}) == 16 for place in range(DICE_DIGITS))


def test_siblings_are_told_from_others():
    ids, others = siblings(), siblings()
    made = [ids(prefix) for prefix in ("mcp", "ws", "mcp")]
    assert len(set(made)) == len(made)
    assert {len(one.partition("_")[2]) for one in made} == {TIME_DIGITS + DICE_DIGITS}
    assert all(are_siblings(made[0], one) for one in made)
    assert not any(are_siblings(made[0], one) for one in (others("mcp"), new_id("mcp")))
