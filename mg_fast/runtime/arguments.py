"""Reads the numbers and texts that callers pass, in the same way everywhere."""

import decimal
import numbers
import operator

from ..errors import PromptError, quoted


def plain(value):
    """The Python number in a NumPy number or in an array or tensor without dimensions; other values are unchanged.

    A number without a value is unchanged too: a masked one, or a tensor on the meta device.
    """
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    if getattr(value, "is_meta", False) or bool(getattr(value, "mask", False)):
        return value
    value = value.item()
    # item() leaves a long double as it is, because it may have more digits than a float.
    return float(value) if isinstance(value, numbers.Real) and hasattr(value, "ndim") else value


def plain_numbers(value):
    """`plain` applied inside lists, tuples and dicts too; a row of numbers in an array or tensor becomes a list."""
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") and not getattr(value, "is_meta", False):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain_numbers, value))
    if type(value) is dict:
        return {plain(key): plain_numbers(item) for key, item in value.items()}
    return plain(value)


def plain_options(options: dict) -> dict:
    """Keyword arguments with plain numbers; tensors with dimensions stay, because they are a model's inputs."""
    return {
        name: value if getattr(value, "ndim", 0) and hasattr(value, "is_meta") else plain_numbers(value)
        for name, value in options.items()
    }


def whole_number(value) -> int | None:
    """The value as an int, whichever library it comes from; None if it is not a whole number.

    True and False are not numbers, nor are arrays and tensors with dimensions, even with one element.
    """
    value = plain(value)
    if isinstance(value, bool) or hasattr(value, "ndim"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real_number(value) -> float | None:
    """The value as a float, whichever library it comes from; None if it is not a number or is too large for a float.

    True and False are not numbers.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, decimal.Decimal)):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):
        # Converting a signalling NaN of Decimal raises a ValueError.
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
    """Refuses stop strings that are not texts or that UTF-8 cannot encode; None and an empty list are accepted.

    Raises:
        PromptError: the message says which string is refused.
    """
    if strings is None:
        return
    if not isinstance(strings, (str, list, tuple, set, frozenset)):
        raise PromptError(f"stop_strings: expected a text or a list of texts, got {quoted(strings)}")
    for string in [strings] if isinstance(strings, str) else strings:
        check_text(string, "a stop string")


def check_text(text: str, what: str) -> None:
    """Refuses text that UTF-8 cannot encode, because no tokenizer takes it.

    Args:
        text: the value that the caller passed.
        what: the name of the value in the message.

    Raises:
        PromptError: the value is not a text, or has a surrogate code point, which stands for half a character or for a
            byte that was read in another encoding.
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
