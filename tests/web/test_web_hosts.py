"""By which names a server answers, and what a root path may be."""

import json

import pytest

from mg_fast.web import visits
from mg_fast.web.gate import API
from mg_fast.web.hosts import KnownHosts, host_named, own_names, root_path_of
from tests.web.visiting import ME, SESSION, YOU, Site


def test_known_hosts():
    known = KnownHosts(["Pictures.example"])
    for header in (
        *(
            "localhost",
            "localhost:7860",
            "demo.localhost:1",
            "127.0.0.1:7860",
            "10.1.2.3",
            "[::1]:7860",
            "[2001:db8::1]",
        ),
        *("pictures.example", "PICTURES.example:443"),
    ):
        assert header in known, header
    for header in (
        *("", "evil.com", "evil.com:7860", "pictures.example.evil.com", "localhost.evil.com", "127.0.0.1.evil.com"),
        *("pictures.example/x", "pictures.example@evil.com", "a b", "[::1", "127.0.0.1:x", "notlocalhost", None),
    ):
        assert header not in known, header


def test_a_name_that_was_made_to_lead_here_is_refused():
    """A page of evil.com whose name leads to 127.0.0.1 has the same host and origin, for the browser and for us."""
    site = Site()
    evil = {"host": "evil.com:7860", "origin": "http://evil.com:7860", "sec-fetch-site": "same-origin"}
    for path in ("/", "/config", "/metrics", f"{API}/heartbeat/{SESSION}"):
        assert site.ask("GET", path, headers=evil).status == 403
    answer = site.join({"session_hash": SESSION}, headers=evil)
    assert (answer.status, answer.reached) == (403, []) and "--hosts" in json.loads(answer.body)["detail"]
    # Who looks after the server may use any name.
    assert site.ask("GET", "/healthz", headers=evil).status == 200


def test_the_names_of_a_server(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    monkeypatch.setattr("socket.getfqdn", lambda: "box.company.example")
    assert own_names("127.0.0.1", "", ()) == ["127.0.0.1"]
    assert own_names("localhost", "https://a.example:8443/p", ("b",)) == ["localhost", "a.example", "b"]
    assert own_names("0.0.0.0", "/p", ()) == ["0.0.0.0", "box", "box.company.example"]
    assert host_named("Pictures.example") == "pictures.example"
    for text in ("", "https://a", "a:1", "a b", "*"):
        with pytest.raises(ValueError, match="without a port"):
            host_named(text)


@pytest.mark.parametrize(
    "text, path",
    [
        *(
            ("", ""),
            ("/", ""),
            ("/pictures", "/pictures"),
            ("/pictures/", "/pictures"),
            ("/a.b/c_d~e-f", "/a.b/c_d~e-f"),
        ),
        ("https://pictures.example/", "https://pictures.example"),
        ("http://10.0.0.1:8443/p", "http://10.0.0.1:8443/p"),
    ],
)
def test_root_paths(text, path):
    assert root_path_of(text) == path


@pytest.mark.parametrize(
    "text",
    [
        *("/p x", "//evil.com", "/p;Path=/x", "pictures", "/a//b", "/a/../b", "/..", "/a\nb", "/a%2fb", "/p?x", "/p#x"),
        *("//", "https://", "https:///p", "ftp://a/p", "https://a b/", "https://a@b/", "javascript:x", "/ä"),
    ],
)
def test_root_paths_that_are_none(text):
    with pytest.raises(ValueError, match="expected a path that begins with /"):
        root_path_of(text)


# ---- one request is read in one way only


def test_a_session_that_is_named_twice():
    """One reader takes the first name, another one the last: so a browser would get another one's answers."""
    site = Site()
    site.parts.sessions.open(SESSION, ME)
    site.parts.sessions.open("session-of-you", YOU)
    for query in (
        f"session_hash={SESSION}&session_hash=session-of-you",
        f"session_hash=session-of-you&session_hash={SESSION}",
        f"session_hash={SESSION}&session%5Fhash=session-of-you",
        f"session_hash={SESSION}&session_hash=",
        "",
    ):
        answer = site.ask("GET", f"{API}/queue/data", browser=ME, query=query)
        assert (answer.status, answer.reached) == (400, []), query
    answer = site.ask("GET", f"{API}/queue/data", browser=ME, query=f"x=1;&session_hash={SESSION}&deep_link=x")
    assert answer.status == 200 and answer.reached[0][0]["query_string"] == f"session_hash={SESSION}".encode()
    # Nothing of a query is passed on that was not looked at.
    assert site.ask("GET", "/", browser=ME, query="deep_link=x").reached[0][0]["query_string"] == b""


@pytest.mark.parametrize(
    "name, values",
    [
        ("cookie", (f"{visits.COOKIE}={ME}", f"{visits.COOKIE}={YOU}")),
        ("origin", ("https://evil.example", "https://pictures.example")),
        ("authorization", ("Basic eDp5", "Basic eDp5")),
        *((name, ("1", "1")) for name in ("content-length", "content-type", "sec-fetch-site", "x-request-id")),
    ],
)
def test_a_header_that_stands_there_twice(name, values):
    site = Site()
    for path in ("/config", f"{API}/info"):
        answer = site.ask("GET", path, more=[(name.title(), value) for value in values])
        assert (answer.status, answer.reached) == (400, [])
    assert site.ask("GET", "/config", more=[("host", "evil.com")]).status == 400


def test_what_was_looked_at_is_passed_on():
    site = Site()
    body = b'{"session_hash": "other-session", "session_hash": "session1", "batched": true, "data": ["\\u00e9"]}'
    answer = site.ask("POST", f"{API}/queue/join", body, browser=ME, headers={"content-length": str(len(body))})
    scope, passed = answer.reached[0]
    assert json.loads(passed) == {"session_hash": SESSION, "data": ["é"]}
    assert dict(scope["headers"])[b"content-length"] == str(len(passed)).encode()
    # Half of a pair of characters is no text, and nobody behind could send it back.
    for data in (b'["\\ud800"]', b"[NaN]", b"[Infinity]"):
        answer = site.ask("POST", f"{API}/queue/join", b'{"session_hash": "session1", "data": %s}' % data, browser=ME)
        assert (answer.status, answer.reached) == (400, [])


def test_programs_get_a_secret_with_the_description_of_the_page():
    """gradio_client reads it first, and never the page itself."""
    site = Site()
    for path in ("/", "/config", "/config/"):
        assert f"{visits.COOKIE}=" in site.ask("GET", path).headers["set-cookie"]
        assert "set-cookie" not in site.ask("GET", path, browser=ME).headers
    assert "set-cookie" not in site.ask("GET", "/theme.css").headers
