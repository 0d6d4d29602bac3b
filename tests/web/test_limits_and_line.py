"""The limits of a server and the line of those who wait. Neither needs a model or a page."""

import asyncio

import pytest

from mg_fast.web.limits import NAMES, Limits, RequestRefused, limit_of, limits_of
from mg_fast.web.line import WaitingLine


def test_limits_from_a_command_line():
    found = limits_of([limit_of("sessions=200"), limit_of("queue=0"), limit_of("sessions=3")])
    assert (found.sessions, found.queue, found.turns) == (3, 0, Limits().turns)
    assert found.picture_bytes == 10 * 2**20 and found.picture_pixels == 25_000_000
    # A character of a question may be written as two escapes of six bytes.
    assert found.message_bytes > 12 * found.characters


@pytest.mark.parametrize(
    "word, message",
    [
        ("session=3", f"expected NAME=NUMBER with a name of {', '.join(NAMES)}, got 'session=3'"),
        ("sessions", "expected NAME=NUMBER"),
        ("sessions=-3", "sessions: expected a whole number, got '-3'"),
        ("sessions=3.5", "sessions: expected a whole number, got '3.5'"),
        ("sessions=٣", "sessions: expected a whole number"),
        ("sessions=0", "sessions: expected a whole number of 1 or more, got 0"),
    ],
)
def test_wrong_limits(word, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        limit_of(word)


def test_turns_come_in_order():
    line = WaitingLine(2, 3)
    first, second = line.enter(), line.enter()
    third, fourth, fifth = (line.enter() for _ in range(3))
    assert [ticket.place for ticket in (first, second, third, fourth, fifth)] == [0, 0, 1, 2, 3]
    with pytest.raises(RequestRefused, match="3 questions wait already, which is the most"):
        line.enter()
    # Whoever leaves makes room, wherever it stood.
    line.leave(fourth)
    assert (third.place, fifth.place, line.waiting, line.running) == (1, 2, 2, 2)
    line.leave(first)
    assert third.turned and (fifth.place, line.waiting, line.running) == (1, 1, 2)
    for ticket in (first, first, second, third, fifth, fourth):
        line.leave(ticket)
    assert (line.waiting, line.running) == (0, 0)


def test_a_line_of_length_0_gives_turns_only():
    line = WaitingLine(1, 0)
    with line.enter() as ticket:
        assert ticket.turned
        with pytest.raises(RequestRefused, match="0 questions wait already"):
            line.enter()
    assert line.enter().turned


def test_places_are_told_as_they_change():
    async def wait() -> list[int]:
        line = WaitingLine(1, 8)
        tickets = [line.enter() for _ in range(4)]
        last, told = tickets[-1], []

        async def listen():
            while last.place:
                told.append(await last.moved())

        listening = asyncio.create_task(listen())
        for ticket in tickets[:3]:
            await asyncio.sleep(0.01)
            line.leave(ticket)
        await asyncio.wait_for(listening, 5)
        return told

    told = asyncio.run(wait())
    assert told[-3:] == [2, 1, 0] and sorted(told, reverse=True) == told
