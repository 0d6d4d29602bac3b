"""Requests begin at a rate that follows what the other side takes, and after pauses."""

import asyncio
import time

import pytest

from recipes.data.pace import Pace, waiting


def test_a_pause_holds_everybody():
    async def starts():
        pace, began = Pace(None), time.monotonic()
        await pace.turn()
        waiting = [asyncio.ensure_future(pace.turn()) for _ in range(3)]
        pace.pause(0.1)
        await asyncio.sleep(0.05)
        # A longer pause that is asked for meanwhile counts, too.
        pace.pause(0.15)
        await asyncio.gather(*waiting)
        return time.monotonic() - began

    assert asyncio.run(starts()) >= 0.2


def starts(pace, count) -> list[float]:
    """When requests may begin, in seconds from now."""

    async def all_of_them():
        began = time.monotonic()
        times = []
        for _ in range(count):
            await pace.turn()
            times.append(time.monotonic() - began)
        return times

    return asyncio.run(all_of_them())


def test_requests_that_are_turned_away_lower_the_rate_once():
    pace = Pace(None, first_wait=0.08, longest_wait=1.0)
    began = time.monotonic()
    # Four that were on their way at the same time count as one.
    for _ in range(4):
        pace.turned_away(began, 0.0)
    first, second, third = starts(pace, 3)
    assert 0.035 <= first < 0.5 and second - first >= 0.0099 and third - second >= 0.0099
    pace.turned_away(time.monotonic(), 0.0)
    first, second = starts(pace, 2)
    # The rate is halved again, and the pause is longer.
    assert first >= 0.075 and second - first >= 0.0199
    assert pace._interval == pytest.approx(0.02)
    # Fifteen answers make up for one halving, and no answers bring more than the highest rate.
    for _ in range(15):
        pace.answered()
    assert pace._interval == pytest.approx(0.01)
    slow = Pace(6000, first_wait=0.08)
    slow.turned_away(time.monotonic(), 0.0)
    for _ in range(100):
        slow.answered()
    assert slow._interval == pytest.approx(0.01)


def test_what_the_other_side_asks_for_counts_where_it_is_longer():
    pace = Pace(None, first_wait=0.01, longest_wait=1.0)
    pace.turned_away(time.monotonic(), 0.1)
    assert starts(pace, 1)[0] >= 0.09


def test_waits_grow_and_have_a_limit():
    for times, longest in ((1, 1.0), (2, 2.0), (5, 16.0), (9, 60.0), (10**6, 60.0)):
        found = {waiting(1.0, 60.0, times) for _ in range(50)}
        assert longest / 2 <= min(found) and max(found) <= longest and len(found) > 1
