"""What callers hand over as numbers and texts, read in one way everywhere."""

import numbers
import operator

from .errors import PromptError


def plain(value):
    """The Python number inside a NumPy number, or an array or tensor without dimensions; anything else as it came."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def whole_number(value) -> int | None:
    """The value as an int, of whatever library it is; None where it is no whole number. True and False are none."""
    value = plain(value)
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real_number(value) -> float | None:
    """The value as a float, of whatever library it is; None where it is no number or too large for one. True and False are none."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def check_text(text: str, what: str) -> None:
    """Refuses text that UTF-8 cannot encode: no tokenizer takes it.

    Args:
        text: what a caller handed over.
        what: what the message calls it.

    Raises:
        PromptError: a surrogate code point, which stands for half a character, or for a byte that was read in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        kind = "a byte that was not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
        raise PromptError(
            f"{what} cannot be encoded as UTF-8: character {error.start + 1} of {len(text)}, \\u{code:04x}, is {kind}. "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') mends pairs and replaces the rest"
        ) from None
