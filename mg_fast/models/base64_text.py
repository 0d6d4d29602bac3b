"""Tells pictures that are written as base64 text from paths, and decodes them."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from .urls import is_data_uri

# The first bytes of files in the usual picture formats.
_SIGNATURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|BM....\0\0\0\0|II\*\0|MM\0\*|\0\0\0\x0cjP|P[1-6]\n|P[1-6] \d",
    re.DOTALL,
)
# The number of characters that are examined: more than any signature has, and more than any name in a path.
_HEAD = 512
# Names in a path are no longer than this on the usual file systems. A longer word of base64 characters is not a path.
_LONGEST_NAME = 255
# Long base64 text of a picture contains all of these kinds of characters; other long words rarely do.
_MIXED = (re.compile(rb"[A-Z]"), re.compile(rb"[a-z]"), re.compile(rb"[0-9+/]"))
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_DATA_URI = re.compile(rb"\s*data:[^,]{0,200},", re.IGNORECASE)
# Text that str() made from bytes begins like this.
_WRITTEN_BYTES = re.compile(rb"\s*b['\"]")
_ALPHABET = re.compile(rb"[A-Za-z0-9+/]+={0,2}")


def looks_like_base64(data: str | bytes) -> bool:
    """Whether text, or the bytes of text, begins like a picture in base64, with or without the header of a data URI."""
    if isinstance(data, str):
        data = data[:_HEAD].encode("utf-8", "replace")
    data = bytes(data[:_HEAD])
    if _DATA_URI.match(data):
        return True
    data = _WRITTEN_BYTES.sub(b"", data, count=1) if _WRITTEN_BYTES.match(data) else data
    # Line breaks are usual in base64 text. Spaces and tabs in the middle occur in prose instead.
    spaced = any(space in data.strip() for space in b" \t")
    data = b"".join(data.split()).translate(_URL_SAFE)
    if not (found := _ALPHABET.match(data)):
        return False
    head = found.group().rstrip(b"=")
    if _SIGNATURE.match(base64.b64decode(head[: len(head) // 4 * 4])):
        # A short word may happen to decode to a signature.
        return len(head) >= 16
    if spaced or len(head) <= _LONGEST_NAME or head != data.rstrip(b"="):
        return False
    return all(kind.search(head) for kind in _MIXED)


def decode_base64(text: str | bytes) -> bytes:
    """Decodes base64 text of either alphabet to bytes, with or without line breaks and padding.

    Raises:
        ValueError: a character belongs to neither alphabet, or the length is impossible.
    """
    data = text.encode("ascii", "replace") if isinstance(text, str) else bytes(text)
    data = b"".join(data.split()).translate(_URL_SAFE).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64 text: {error}") from None


def decode_data_uri(uri: str) -> bytes:
    """The bytes that a data URI holds, as base64 text or with percent escapes."""
    header, _, data = uri.partition(",")
    if header.lower().rstrip().endswith(";base64"):
        return decode_base64(unquote_to_bytes(data))
    return unquote_to_bytes(data)


def as_data_uri(text: str | bytes) -> str:
    """The data URI of base64 text. Text that is a data URI already, and the bytes of either kind, are accepted too."""
    text = bytes(text).decode("ascii", "replace") if isinstance(text, (bytes, bytearray, memoryview)) else str(text)
    return text if is_data_uri(text) else f"data:image;base64,{text}"


def refusal(length: int) -> str:
    """The error text for base64 text of `length` characters that was given as a picture."""
    return (
        f"this is base64 text ({length} characters), expected a picture: "
        "pass the bytes that base64.b64decode returns for it "
        "(base64.urlsafe_b64decode where it has - or _; for a data URI, decode what follows the first comma), "
        "or give the text as the `base64` key of a message"
    )
