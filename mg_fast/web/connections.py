"""Connections that are slow or silent: they are closed, so that they take no place from others."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds within which a connection has to send a whole request head.
HEAD_S = 10.0
# Seconds within which a client has to read what waits for it, which are some 64 KiB at a time.
READ_S = 60.0
# The longest head of a request.
HEAD_BYTES = 32 * 1024


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, which also knows since when a connection has been waiting for a request.

    The server closes connections that wait too long (`close_waiting`). Where more wait than `most_waiting`, the one
    that has waited longest is closed for the newest. A byte now and then does not help a connection. Clients that do
    not read their answers are closed, too (`close_unread`).
    """

    most_waiting = 200

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.waiting_since = 0.0
        self.unread_since: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether this connection is open, and no request of it is being answered."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        waiting = [other for other in self.connections if isinstance(other, ImpatientProtocol) and other.is_waiting]
        if len(waiting) > self.most_waiting:
            min(waiting, key=lambda other: other.waiting_since).transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unread_since = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.waiting_since = self.loop.time()


def close_waiting(connections, now: float, seconds: float) -> None:
    """Closes the connections that have waited for a request for so long.

    Args:
        connections: those of a server of uvicorn.
        now: the time of the event loop.
    """
    for connection in list(connections):
        if (
            isinstance(connection, ImpatientProtocol)
            and connection.is_waiting
            and now - connection.waiting_since > seconds
        ):
            connection.transport.abort()


def close_unread(connections, now: float, seconds: float) -> None:
    """Closes the connections whose clients have not read what waited for them for so long.

    Args:
        connections: those of a server of uvicorn.
        now: the time of the event loop.
    """
    for connection in list(connections):
        if not isinstance(connection, ImpatientProtocol):
            continue
        if connection.unread_since is None:
            # A connection that is being closed stays until its last bytes are read.
            if connection.transport.is_closing() and connection.transport.get_write_buffer_size():
                connection.unread_since = now
        elif now - connection.unread_since > seconds:
            connection.transport.abort()
