"""Pictures by their URLs: public addresses only, after redirects and for every address of a name."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mg_fast.web import addresses
from mg_fast.web.addresses import fetched, is_public, resolved
from mg_fast.web.limits import RequestRefused


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1"),
        # IPv6 addresses that lead to an IPv4 address of the own network.
        *(
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "::7f00:1",
            "2002:7f00:1::",
            "ff02::1",
        ),
        *("localhost", "", "1.1.1.1.1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def found(*names):
    return lambda host, port, type: [(socket.AF_INET, type, 6, "", (name, port)) for name in names]


def test_every_address_of_a_name_must_be_public(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", found("1.1.1.1", "1.0.0.1", "1.1.1.1"))
    assert resolved("pictures.example", 80) == ["1.1.1.1", "1.0.0.1"]
    monkeypatch.setattr(socket, "getaddrinfo", found("1.1.1.1", "10.0.0.1"))
    with pytest.raises(RequestRefused, match="not a public one"):
        resolved("pictures.example", 80)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror()))
    with pytest.raises(RequestRefused, match="no server that can be found"):
        resolved("pictures.example", 80)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "file:///etc/passwd",
            "ftp://pictures.example/a.png",
            "data:image/png;base64,AAAA",
            "/etc/passwd",
            "",
            "http://",
        ),
        *("http://pictures.example:8080/", "https://pictures.example:80/", "http://pictures.example:x/"),
        *("http://user:password@pictures.example/", "gopher://pictures.example/", "http:pictures.example"),
        *("http://[::1", "http://[x]/"),
    ],
)
def test_urls_that_are_not_fetched(url):
    with pytest.raises(RequestRefused, match="expected an address that begins with"):
        fetched(url, 100, resolve=lambda host, port: pytest.fail("looked up"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f000001", "169.254.169.254"])
def test_the_own_machine_is_not_asked(host):
    with pytest.raises(RequestRefused, match="not a public one|no server that can be found"):
        fetched(f"http://{host}/", 100)


class Pictures(BaseHTTPRequestHandler):
    """A server of pictures; the tests say that its address is a public one."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = {"/small": b"x" * 50, "/large": b"x" * 5000}.get(self.path)
        self.send_response(404 if data is None else 200)
        self.server.hosts.append(self.headers["Host"])
        if self.path == "/large" and data:
            # Its length is not told beforehand.
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def pictures(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.hosts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connect = socket.create_connection
    # Only the address that was checked is connected to, which leads to the server of the test.
    asked = []

    def create_connection(address, timeout):
        asked.append(address[0])
        return connect(server.server_address, timeout)

    monkeypatch.setattr(addresses.socket, "create_connection", create_connection)
    yield server, asked
    server.shutdown()
    server.server_close()


def public(host, port):
    if host == "inner.example":
        raise RequestRefused("this address is not a public one")
    return ["1.1.1.1"]


def test_fetching(pictures):
    server, asked = pictures
    assert fetched("http://pictures.example/small", 100, resolve=public) == b"x" * 50
    assert asked == ["1.1.1.1"] and server.hosts == ["pictures.example"]
    assert fetched("http://pictures.example/to/http://other.example/small", 100, resolve=public) == b"x" * 50
    assert fetched("http://pictures.example/to//small", 100, resolve=public) == b"x" * 50
    assert server.hosts[1:] == ["other.example", "pictures.example"]
    for path, message in (
        ("/large", "may have 100 bytes, this one has more"),
        ("/nothing", "answered with status 404"),
        ("/to/http://inner.example/small", "not a public one"),
        ("/to/file:///etc/passwd", "expected an address"),
        ("/to/http://[::1", "leads on to one that cannot be read"),
        ("/to//to//to//to//to//small", "leads on to others more than 3 times"),
    ):
        with pytest.raises(RequestRefused, match=message):
            fetched(f"http://pictures.example{path}", 100, resolve=public)
    with pytest.raises(RequestRefused, match="may have 10 bytes, this one has 50"):
        fetched("http://pictures.example/small", 10, resolve=public)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_answers_byte_by_byte_is_cut_off(monkeypatch, scheme):
    monkeypatch.setattr(addresses, "WHOLE_S", 0.3)
    ended, connect = threading.Event(), socket.create_connection
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection:
                while not ended.wait(0.05):
                    connection.sendall(b"H")

        dripping = threading.Thread(target=drip, daemon=True)
        dripping.start()
        name = listening.getsockname()
        monkeypatch.setattr(addresses.socket, "create_connection", lambda _, timeout: connect(name, timeout))
        began = time.monotonic()
        with pytest.raises(RequestRefused, match="cannot be fetched"):
            fetched(f"{scheme}://pictures.example/", 100, resolve=public)
        assert time.monotonic() - began < 3
        ended.set()
        dripping.join(5)


def test_a_server_that_cannot_be_reached(monkeypatch):
    def refused(*_, **__):
        raise ConnectionRefusedError

    monkeypatch.setattr(addresses.socket, "create_connection", refused)
    with pytest.raises(RequestRefused, match="cannot be fetched: ConnectionRefusedError"):
        fetched("http://pictures.example/", 100, resolve=public)


def test_a_name_that_is_found_slowly_is_given_up(monkeypatch):
    monkeypatch.setattr(addresses, "WHOLE_S", 0.2)
    held, began = threading.Event(), time.monotonic()
    try:
        with pytest.raises(RequestRefused, match="not found in time"):
            addresses.fetched("https://slow.example/a.png", 1000, resolve=lambda host, port: held.wait(20))
        assert time.monotonic() - began < 5
        monkeypatch.setattr(addresses, "_LOOKING_UP", threading.BoundedSemaphore(1))
        addresses._LOOKING_UP.acquire()
        with pytest.raises(RequestRefused, match="too many addresses are being looked up"):
            addresses.fetched("https://slow.example/a.png", 1000, resolve=lambda host, port: ["1.1.1.1"])
    finally:
        held.set()


@pytest.mark.parametrize("text", ["fec0::1", "3fff::1", "192.88.99.1", "::ffff:192.88.99.1"])
def test_networks_that_are_not_public_any_more(text):
    assert not addresses.is_public(text)
