"""Who waits for an answer, and who is being answered: a line with a stated length and a place for everyone in it."""

import asyncio

from .limits import RequestRefused


class LineTicket:
    """A place in a line; a context that leaves the line at its end.

    Attributes:
        turned: whether the turn of this ticket has come.
    """

    def __init__(self, line: "WaitingLine"):
        self.turned = False
        self._line = line
        self._moved = asyncio.Event()

    @property
    def place(self) -> int:
        """0 when it is this ticket's turn; 1 if it is the next one, and so on."""
        return 0 if self.turned else self._line.place_of(self)

    async def moved(self) -> int:
        """Waits until the line has moved since the last call, and returns the new place."""
        await self._moved.wait()
        self._moved.clear()
        return self.place

    def note(self) -> None:
        """Wakes whoever waits in `moved`."""
        self._moved.set()

    def __enter__(self) -> "LineTicket":
        return self

    def __exit__(self, *_) -> None:
        self._line.leave(self)


class WaitingLine:
    """Gives turns in the order in which they were asked for. It is used from one event loop.

    Args:
        parallel: most turns at the same time.
        longest: most tickets that wait; with 0, a ticket is given only if its turn comes at once.
    """

    def __init__(self, parallel: int, longest: int):
        self.parallel, self.longest = parallel, longest
        self._waiting: list[LineTicket] = []
        self._running: set[LineTicket] = set()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many have their turn."""
        return len(self._running)

    def enter(self) -> LineTicket:
        """Joins the line at its end.

        Raises:
            RequestRefused: the line has its full length.
        """
        if self.running >= self.parallel and self.waiting >= self.longest:
            raise RequestRefused(
                f"{self.waiting} question{'s wait' if self.waiting != 1 else ' waits'} already, which is the most that "
                "this server lets wait: ask again in a moment"
            )
        ticket = LineTicket(self)
        self._waiting.append(ticket)
        self._move()
        return ticket

    def leave(self, ticket: LineTicket) -> None:
        """Ends the turn of a ticket, or its waiting. A ticket that has left already stays as it is."""
        if ticket in self._running:
            self._running.remove(ticket)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        self._move()

    def place_of(self, ticket: LineTicket) -> int:
        """The place of a ticket that waits, from 1 on; 0 for any other."""
        return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    def _move(self) -> None:
        while self._waiting and self.running < self.parallel:
            ticket = self._waiting.pop(0)
            ticket.turned = True
            self._running.add(ticket)
            ticket.note()
        for ticket in self._waiting:
            ticket.note()
