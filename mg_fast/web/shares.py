"""How much each client may hold of what all clients share: requests, streams, places for uploads, sessions."""

import asyncio
import contextlib
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from .limits import RequestRefused


class ShareTaken(RequestRefused):
    """A request for more than its client may have at once, or for more than there is."""


class Shares:
    """Counts what each client holds of one thing. It is used from one event loop.

    Args:
        most: what all clients may hold together.
        each: what one client may hold; a client without a name is not counted by itself.
        told: what a client is told that asks for more.
    """

    def __init__(self, most: int, each: int, told: str):
        self.most, self.each, self.told = most, each, told
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Holds one within the block.

        Raises:
            ShareTaken: this client holds as many as it may, or all are held.
        """
        if self._held.total() >= self.most or (client and self._held[client] >= self.each):
            raise ShareTaken(self.told)
        self._held[client] += 1
        try:
            yield
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]


class TurnsOfEach:
    """Lets a client do a few things at once; what it asks for beyond that waits. It is used from one event loop.

    Args:
        each: things of one client at once; a client without a name never waits.
    """

    def __init__(self, each: int):
        self.each = each
        self._turns: dict[str, tuple[asyncio.Semaphore, list]] = {}

    @contextlib.asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Waits for a turn of this client, and holds it within the block."""
        if not client:
            yield
            return
        turns, users = self._turns.setdefault(client, (asyncio.Semaphore(self.each), []))
        users.append(None)
        try:
            async with turns:
                yield
        finally:
            users.pop()
            if not users:
                del self._turns[client]


def client_of(address: str) -> str:
    """Who is meant by an address: of IPv6, a client has all addresses that differ in their second half only."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    mapped = found.ipv4_mapped
    return str(mapped) if mapped else str(ipaddress.ip_network((found, 64), strict=False).network_address)
