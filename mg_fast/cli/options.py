"""What the command line takes: its parser, the types of its options, and the bytes of its streams."""

import argparse
import contextlib
import io
import math
import os
import sys

from ..errors import BackendError, quoted, shortened
from ..runtime.dtypes import dtype_name


class Parser(argparse.ArgumentParser):
    """A parser whose errors stay short where they repeat an argument."""

    def error(self, message: str):
        super().error(shortened(message))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {quoted(text)}")
    return int(text)


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {quoted(text)}")
    return value


def dtype_option(text: str) -> str:
    try:
        return dtype_name(text)
    except BackendError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("dtype: ")) from None


def picture_file(text: str) -> str:
    if not text.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        raise argparse.ArgumentTypeError(f"expected a file .png, .jpg or .webp, got {quoted(text)}")
    if os.path.isdir(text) or not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is a folder, or in a folder that does not exist")
    return text


def architecture(text: str) -> int:
    from ..kernels.configs import SHARED_MEMORY_LIMITS

    known = {f"sm_{number}": number for number in SHARED_MEMORY_LIMITS}
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {quoted(text)}")
    return known[text]


def tolerate_other_encodings() -> None:
    """Lets a conversation outlive bytes that are not in the encoding of the terminal.

    Those on stdin become surrogates, which are refused together with the question that they stand in; by default they
    would be an error of reading, which ends the conversation. On stdout a question mark replaces what its encoding lacks.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        # Other programs and tests put streams in memory in their place, which decode nothing.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(io.UnsupportedOperation):
                stream.reconfigure(errors=errors)
