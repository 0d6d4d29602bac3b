"""What a text that is given as a picture names: a URL or a path. The command line asks too, before its slow imports."""

import os


def is_url(source) -> bool:
    """Whether it is a text that begins like a URL, in capitals or small letters, of one of the kinds that are fetched."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://", "data:"))


def is_data_uri(source) -> bool:
    """Whether it is a URL that holds the picture itself."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def expanded(path: str | bytes) -> str | bytes:
    """The path with the home folder in the place of `~`; as it came where it names no user that there can be."""
    try:
        return os.path.expanduser(path)
    except ValueError:
        # The name holds a null, or a character that cannot be encoded.
        return path
