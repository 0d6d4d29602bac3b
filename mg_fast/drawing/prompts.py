"""Finds the prompts for pictures that a language model has written between `<h>` and `</h>`."""

import logging
import re

logger = logging.getLogger(__name__)

OPENING, CLOSING = "<h>", "</h>"
_TAG = re.compile(f"{OPENING}|{CLOSING}")


def find_prompts(text: str) -> list[str]:
    """The prompts in an answer of the model, in order.

    Only exact lower-case tags count. `<h>` opens a prompt and the next `</h>` closes it. Another `<h>` before that
    starts the prompt anew, so with one span the result is that of Mini-Gemini's command line, which takes the last
    `<h>` before the last `</h>`. A `</h>` that closes nothing is ignored. A prompt that is still open at the end of the
    text counts, and a warning is logged. White space around a prompt is removed, and an empty prompt is left out.

    Args:
        text: what the model wrote in one turn, without the user's words.
    """
    found: list[str] = []
    start = None
    for tag in _TAG.finditer(text):
        if tag.group() == OPENING:
            start = tag.end()
        elif start is not None:
            found.append(text[start : tag.start()])
            start = None
    if start is not None:
        found.append(text[start:])
        if found[-1].strip():
            logger.warning(
                "the answer ends before %s closes its prompt for a picture; what there is of it is drawn", CLOSING
            )
    return [prompt for prompt in map(str.strip, found) if prompt]
