"""What callers hand over as numbers and texts, read in one way everywhere."""

import decimal
import numbers
import operator

from ..errors import PromptError, quoted


def plain(value):
    """The Python number inside a NumPy number, or an array or tensor without dimensions; anything else as it came.

    So does one that has no value: a masked number, or a tensor on the meta device.
    """
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    if getattr(value, "is_meta", False) or bool(getattr(value, "mask", False)):
        return value
    value = value.item()
    # A long double stays one, as it may have more digits than a float.
    return float(value) if isinstance(value, numbers.Real) and hasattr(value, "ndim") else value


def plain_numbers(value):
    """`plain`, for what lies in lists, tuples and dicts too; a row of numbers in an array or tensor becomes a list."""
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") and not getattr(value, "is_meta", False):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain_numbers, value))
    if type(value) is dict:
        return {plain(key): plain_numbers(item) for key, item in value.items()}
    return plain(value)


def plain_options(options: dict) -> dict:
    """Keyword arguments with plain numbers. Tensors that have dimensions stay: they are a model's inputs."""
    return {
        name: value if getattr(value, "ndim", 0) and hasattr(value, "is_meta") else plain_numbers(value)
        for name, value in options.items()
    }


def whole_number(value) -> int | None:
    """The value as an int, of whatever library it is; None where it is no whole number. True and False are none.

    Arrays and tensors that have dimensions are no numbers, of one element or of more.
    """
    value = plain(value)
    if isinstance(value, bool) or hasattr(value, "ndim"):
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
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, decimal.Decimal)):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        # A signalling NaN of Decimal's is a ValueError.
        return None


def byte_limit(name: str, limit) -> int:
    """The limit of a cache as an int.

    Args:
        name: what the message calls it.
        limit: a whole number of bytes.

    Raises:
        ValueError: below 0.
        TypeError: not a whole number.
    """
    if operator.index(limit) < 0:
        raise ValueError(f"{name}: expected 0 or more bytes, got {limit}")
    return operator.index(limit)


def check_stop_strings(strings) -> None:
    """Refuses stop strings that are no texts, or that UTF-8 cannot encode. None and no strings at all are well.

    Raises:
        PromptError: says which string it is.
    """
    if strings is None:
        return
    if not isinstance(strings, (str, list, tuple, set, frozenset)):
        raise PromptError(f"stop_strings: expected a text or a list of texts, got {quoted(strings)}")
    for string in [strings] if isinstance(strings, str) else strings:
        check_text(string, "a stop string")


def check_text(text: str, what: str) -> None:
    """Refuses text that UTF-8 cannot encode: no tokenizer takes it.

    Args:
        text: what a caller handed over.
        what: what the message calls it.

    Raises:
        PromptError: no text at all, or a surrogate code point, which stands for half a character, or for a byte that
            was read in another encoding.
    """
    if not isinstance(text, str):
        raise PromptError(f"{what}: expected a text, got {quoted(text)}")
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
