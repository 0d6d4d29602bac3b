"""The terminal's streams: characters outside their encoding, and output that several commands share."""

import contextlib
import io
import sys
from collections.abc import Iterable


def tolerate_other_encodings() -> None:
    """Lets a conversation go on after bytes that are not in the encoding of the terminal.

    On stdin such bytes become surrogates, and the question that contains them is refused. By default, reading them
    would raise an error, which would end the conversation. On stdout a question mark replaces each character that the
    encoding lacks.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        # Other programs and tests may replace the streams by streams in memory, which decode nothing.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(io.UnsupportedOperation):
                stream.reconfigure(errors=errors)


def print_stream(pieces: Iterable[str]) -> None:
    """Prints an answer piece by piece while it is generated."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def first_use_lines(seconds: dict[str, float]) -> str:
    """One line for each thing that was done once, at first use, with the seconds it took."""
    return "\n".join(f"at first use: {what}: {s:.2f} s" for what, s in seconds.items())
