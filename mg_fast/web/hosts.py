"""By which names a server is called: requests for any other name come from pages that were led here by a false name."""

import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

_NAME = r"[0-9A-Za-z](?:[0-9A-Za-z._-]{0,253}[0-9A-Za-z])?"
_HOST = re.compile(rf"(?:{_NAME}|\[[0-9A-Fa-f:.]+\])(?::\d{{1,5}})?")
# Segments of letters that need no escaping, none of which leads upwards.
_PATH = r"(?:/(?!\.{1,2}(?:/|$))[0-9A-Za-z._~-]+)*"
_ROOT = re.compile(rf"(?:https?://{_HOST.pattern})?{_PATH}")


class KnownHosts:
    """The names of a server, without ports.

    A page of another site can reach a server on this machine or in this network if the site lets its own name lead
    here. Then the browser takes both for one site, and only the name tells them apart. Addresses are always known,
    because no such name is one.

    Args:
        names: beside `localhost`.
    """

    def __init__(self, names: Iterable[str] = ()):
        self.names = frozenset(name.lower().rstrip(".") for name in names)

    def __contains__(self, header: object) -> bool:
        """Whether a `Host` header has one of the names, or is an address."""
        if not isinstance(header, str) or not _HOST.fullmatch(header):
            return False
        name = host_name(header)
        if name == "localhost" or name.endswith(".localhost") or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def host_name(header: str) -> str:
    """The name in a `Host` header, without its port, in small letters."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.lower().rstrip(".")


def own_names(host: str, root_path: str, others: Iterable[str]) -> list[str]:
    """The names of a server that listens on a host behind a root path, and that was told of other names."""
    names = [host, host_name(urlsplit(root_path).netloc), *others]
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        names += [socket.gethostname(), socket.getfqdn()]
    return [name for name in names if name]


def host_named(text: str) -> str:
    """A name of a server from a command line, such as `pictures.example`.

    Raises:
        ValueError: it is no name, or has more than one.
    """
    if not re.fullmatch(_NAME, text):
        raise ValueError(f"expected a name such as pictures.example, without a port, got {text[:80]!r}")
    return text.lower()


def root_path_of(text: str) -> str:
    """Where a proxy shows the page, from a command line: a path, or a whole address with or without one.

    Raises:
        ValueError: it is neither.
    """
    path = text.rstrip("/") if text.strip("/") else ""
    if text.startswith("//") or (text and not text.startswith(("/", "http://", "https://"))):
        path = None
    if path is None or not _ROOT.fullmatch(path):
        raise ValueError(
            "expected a path that begins with / and has only letters, digits and . _ ~ -, such as /pictures, or a "
            f"whole address, such as https://pictures.example/pictures, got {text[:80]!r}"
        )
    return path
