"""Tells whether a picture given as text is a URL or a path. The command line asks this before its slow imports."""

import os


def is_url(source) -> bool:
    """Whether the source is text that begins like a URL of a kind that is fetched, in upper or lower case."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://", "data:"))


def is_data_uri(source) -> bool:
    """Whether the source is a URL that holds the picture itself."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def expanded(path: str | bytes) -> str | bytes:
    """The path with `~` replaced by the home folder. A path that names an impossible user is returned unchanged."""
    try:
        return os.path.expanduser(path)
    except ValueError:
        # The user name holds a null character, or one that cannot be encoded.
        return path
