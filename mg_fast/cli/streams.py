"""The streams of the terminal: what they may hold that is not in their encoding, and what the commands print alike."""

import contextlib
import io
import sys
from collections.abc import Iterable


def tolerate_other_encodings() -> None:
    """Lets a conversation outlive bytes that are not in the encoding of the terminal.

    Those on stdin become surrogates, which are refused together with the question that they stand in; by default they
    would be an error of reading, which ends the conversation. On stdout a question mark replaces what its encoding
    lacks.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        # Other programs and tests put streams in memory in their place, which decode nothing.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(io.UnsupportedOperation):
                stream.reconfigure(errors=errors)


def print_stream(pieces: Iterable[str]) -> None:
    """Prints an answer piece by piece, as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def first_use_lines(seconds: dict[str, float]) -> str:
    """What is done once, at first use, and how long it took."""
    return "\n".join(f"at first use: {what}: {s:.2f} s" for what, s in seconds.items())
