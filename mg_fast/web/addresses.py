"""Fetches pictures by their URLs, from public addresses only: a user must not lead the server into its own network."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from urllib.parse import SplitResult, urljoin, urlsplit

from .limits import RequestRefused

PORTS = {"http": 80, "https": 443}
MOST_REDIRECTS = 3
# Seconds for one step of the network, and for everything together.
STEP_S = 5.0
WHOLE_S = 15.0
_REDIRECTS = (301, 302, 303, 307, 308)
# Addresses that hold an IPv4 address, which is where they lead to in the end.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# The same within one network, which no address of the open internet is.
_OWN_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
# Networks that some releases of Python take for public: old addresses of sites, examples, and old relays to IPv6.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("fec0::/10", "3fff::/20", "192.88.99.0/24")))
# Names that are being looked up. A look-up cannot be ended, so that slow ones go on beyond their time.
_LOOKING_UP = threading.BoundedSemaphore(16)


def is_public(text: str) -> bool:
    """Whether an IP address is one of the open internet."""
    try:
        address = ipaddress.ip_address(text.split("%", 1)[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if address in _OWN_NAT64:
            return False
    if any(address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a host.

    Raises:
        RequestRefused: it has none, or any of them is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RequestRefused("this address has no server that can be found") from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    if not addresses or not all(map(is_public, addresses)):
        raise RequestRefused("this address is not a public one, and pictures are fetched from public ones only")
    return addresses


def fetched(url: str, most_bytes: int, *, resolve: Callable[[str, int], list[str]] = resolved) -> bytes:
    """What a URL gives, at most `most_bytes`.

    The connection goes to an address that was checked, so that a name cannot lead to another one afterwards. After a
    redirect everything is checked anew. Proxies of the environment are not used.

    Args:
        url: begins with http:// or https://, and has no port but the usual one.
        most_bytes: a longer answer is refused.
        resolve: finds and checks the addresses of a host.

    Raises:
        RequestRefused: the URL is none that is fetched, or its server does not give a file.
    """
    ends = time.monotonic() + WHOLE_S
    for _ in range(MOST_REDIRECTS + 1):
        parts, port = _parsed(url)
        status, location, data = _once(parts, port, _in_time(resolve, parts.hostname, port, ends)[0], most_bytes, ends)
        if status == 200:
            return data
        if status not in _REDIRECTS or not location:
            raise RequestRefused(f"this address answered with status {status}")
        url = _joined(url, location)
    raise RequestRefused(f"this address leads on to others more than {MOST_REDIRECTS} times")


def _in_time(resolve: Callable[[str, int], list[str]], host: str, port: int, ends: float) -> list[str]:
    """The addresses of a host, if they are found in time."""
    found: Future = Future()
    if not _LOOKING_UP.acquire(blocking=False):
        raise RequestRefused("too many addresses are being looked up: try again in a minute")

    def look_up() -> None:
        try:
            found.set_result(resolve(host, port))
        except BaseException as error:  # Any error is handed over to the one who waits.
            found.set_exception(error)
        finally:
            _LOOKING_UP.release()

    threading.Thread(target=look_up, name="mg_fast-web-names", daemon=True).start()
    try:
        return found.result(max(0.0, ends - time.monotonic()))
    except TimeoutError:
        raise RequestRefused("the server of this address is not found in time") from None


def _parsed(url: str) -> tuple[SplitResult, int]:
    """The parts of a URL that may be fetched, and its port."""
    try:
        parts = urlsplit(url)
        usual = PORTS.get(parts.scheme)
        if usual is not None and parts.hostname and parts.port in (None, usual) and "@" not in parts.netloc:
            return parts, usual
    except ValueError:
        pass
    raise RequestRefused("expected an address that begins with https:// or http://, without a port or a name")


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise RequestRefused("this address leads on to one that cannot be read") from None


def _once(parts: SplitResult, port: int, address: str, most_bytes: int, ends: float) -> tuple[int, str | None, bytes]:
    """One request to a checked address: its status, where it leads to, and what came."""
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=STEP_S)
    # Each step has its own limit, which a server could use up again and again. So the connection is cut at the end.
    sockets: list[socket.socket] = []
    watch = threading.Timer(max(0.0, ends - time.monotonic()), _cut, [sockets])
    watch.daemon = True
    try:
        # The socket is made here: http.client would look the name up once more.
        connection.sock = socket.create_connection((address, port), timeout=STEP_S)
        sockets.append(connection.sock)
        watch.start()
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(
                connection.sock, server_hostname=parts.hostname, do_handshake_on_connect=False
            )
            sockets.append(connection.sock)
            connection.sock.do_handshake()
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "mg_fast", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            return answer.status, answer.getheader("Location"), b""
        return 200, None, _read(answer, most_bytes, ends)
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        raise RequestRefused(f"this address cannot be fetched: {type(error).__name__}") from None
    finally:
        watch.cancel()
        connection.close()


def _cut(sockets: list[socket.socket]) -> None:
    """Ends the connection of the last of these sockets for whoever waits for it."""
    with contextlib.suppress(OSError):
        # The method of the base class: that of an encrypted socket also changes what its owner is using.
        socket.socket.shutdown(sockets[-1], socket.SHUT_RDWR)


def _read(answer: http.client.HTTPResponse, most_bytes: int, ends: float) -> bytes:
    stated = answer.getheader("Content-Length", "")
    if stated.isdigit() and int(stated) > most_bytes:
        raise RequestRefused(f"a picture may have {most_bytes:,} bytes, this one has {int(stated):,}")
    data = b""
    while part := answer.read1(2**16):
        data += part
        if len(data) > most_bytes:
            raise RequestRefused(f"a picture may have {most_bytes:,} bytes, this one has more")
        if time.monotonic() > ends:
            raise RequestRefused("this address gives its file too slowly")
    return data
