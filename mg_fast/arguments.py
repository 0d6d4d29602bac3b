"""What callers hand over as numbers and texts, read in one way everywhere."""

import numbers
import operator

from .errors import PromptError


def plain(value):
    """The Python number inside a NumPy number, or an array or tensor without dimensions; anything else as it came."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    value = value.item()
    # A long double stays one, as it may have more digits than a float.
    return float(value) if isinstance(value, numbers.Real) and hasattr(value, "ndim") else value


def plain_numbers(value):
    """`plain`, for the items of a list or tuple too; a row of numbers in an array or tensor becomes a list."""
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else plain(value)


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
    """The value as a float, of whatever library it is; None where it is no number, or too large for a float.

    True and False are no numbers.
    """
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
        PromptError: a surrogate code point, which stands for half a character, or for a byte that was read in another
            encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            kind = "stands for a byte that is not UTF-8: read the text in the encoding that it was written in"
        else:
            kind = (
                "is half of a surrogate pair: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') "
                "joins the halves that lie side by side, and replaces the others"
            )
        where = f"character {error.start + 1} of {len(text)}, \\u{code:04x},"
        raise PromptError(f"{what} cannot be encoded as UTF-8: {where} {kind}") from None
