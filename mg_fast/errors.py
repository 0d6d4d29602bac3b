"""The errors that a caller can act on: each message says what was expected and what came, in a readable length."""

import contextlib
import reprlib

# The most characters of a message of this package, since a path, a prompt or a picture as text may have megabytes.
LONGEST_MESSAGE = 500
# The most characters that a message repeats of one string or number.
LONGEST_QUOTE = 80


def shortened(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """The text in at most `limit` characters that UTF-8 can encode; a longer text keeps its beginning and its end."""
    if len(text) > 4 * limit:
        # The escapes below only make text longer, so its middle would be left out in any case.
        left_out, head, tail = len(text) - 2 * limit, text[:limit], text[-limit:]
    else:
        left_out, head, tail = 0, text, ""
    head, tail = (part.encode("utf-8", "backslashreplace").decode() for part in (head, tail))
    if not tail and len(head) <= limit:
        return head
    whole = head + tail
    note = " [... {} characters left out ...] "
    room = limit - len(note.format(left_out + len(whole)))
    ending = room // 3
    return whole[: room - ending] + note.format(left_out + len(whole) - room) + whole[len(whole) - ending :]


class _Quoting(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = LONGEST_QUOTE
        self.maxlevel = 3


def quoted(value) -> str:
    """A value as a message repeats it: like `repr`, but short for any value, and it never fails."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{type(value).__name__} of length {len(value)}"
    text = f"an object of type {type(value).__name__}"
    with contextlib.suppress(Exception):  # The caller's own class may raise anything from its __repr__.
        text = _Quoting().repr(value)
    return shortened(text, 2 * LONGEST_QUOTE)


class MgFastError(Exception):
    """Base of every error that mg_fast raises on purpose; its message has at most `LONGEST_MESSAGE` characters."""

    def __init__(self, *args):
        super().__init__(*(shortened(argument) if isinstance(argument, str) else argument for argument in args))


class CheckpointError(MgFastError, ValueError):
    """A checkpoint folder, file or configuration that cannot be loaded as Mini-Gemini."""


class PictureError(MgFastError, ValueError):
    """A picture that cannot be read, or that has nothing to show at the model's resolution."""


class PromptError(MgFastError, ValueError):
    """A prompt that does not fit its pictures, its template or the model's context length."""


class BackendError(MgFastError, RuntimeError):
    """A requested backend cannot run here; the message is the reason."""


class DrawingError(MgFastError, RuntimeError):
    """A picture that cannot be drawn, or not in the way that was asked for."""
