"""Draws the pictures whose prompts the model has written into an answer."""

import dataclasses
from collections.abc import Mapping

from ..drawing.prompts import CLOSING, OPENING, find_prompts
from ..errors import PromptError, quoted
from ..models.tensor_files import first_line
from .answers import Answer

# What ends the user's turn where a picture is wished for: Mini-Gemini was trained with it there, after a blank.
MARKER = " <GEN>"
NO_PAINTER = "no painter is loaded: mg_fast.load(..., painter=...) takes one"
# What `draw={...}` may set: the options of `Painter.draw`.
OPTIONS = ("negative", "size", "seed", "steps", "guidance", "count", "like", "strength", "on_step")
LAST = "last"


def drawing_options(draw: "bool | Mapping[str, object]", seed: int | None) -> dict[str, object] | None:
    """The options for `Painter.draw` in the `draw` argument of a question; None where no picture is wished for.

    Args:
        draw: True, False, or options by name.
        seed: the seed of the answer's words, which the picture has too unless `draw` has one.

    Raises:
        PromptError: `draw` is something else, or has an unknown option.
    """
    if draw is None or draw is False:
        return None
    if draw is not True and not isinstance(draw, Mapping):
        raise PromptError(f"draw: expected True, False or a dict of options, got {quoted(draw)}")
    options = {} if draw is True else dict(draw)
    if unknown := [name for name in options if name not in OPTIONS]:
        raise PromptError(f"draw: unknown option {quoted(unknown[0])}, expected some of {', '.join(OPTIONS)}")
    if seed is not None:
        # The words' seed may be negative or have 64 bits, the pictures' may not.
        options.setdefault("seed", seed % 2**62)
    return options


def with_pictures(answer: Answer, painter, options: Mapping[str, object] | None, last) -> Answer:
    """The answer with the pictures that it asks for. Errors of the painter are kept in it and not raised.

    Only the text of the answer is searched for prompts.

    Args:
        painter: a `mg_fast.drawing.Painter`; None: there is none.
        options: for `Painter.draw`; None: no picture is wished for. `like="last"` stands for the picture before.
        last: the picture that was drawn last in this conversation; None where there is none.
    """
    if options is None:
        return answer
    if painter is None:
        return dataclasses.replace(answer, no_image_reason=NO_PAINTER)
    prompts = find_prompts(answer.text)
    if not prompts:
        tagged = OPENING in answer.text
        reason = (
            f"the prompt between {OPENING} and {CLOSING} is empty"
            if tagged
            else f"the model wrote no prompt between {OPENING} and {CLOSING}"
        )
        return dataclasses.replace(answer, no_image_reason=reason)
    options = dict(options)
    drawn: list = []
    done: list[str] = []
    reason = error = None
    for prompt in prompts:
        try:
            if _is_last(options.get("like")):
                pictures = painter.draw(prompt, **{**options, "like": drawn[-1] if drawn else last})
            else:
                pictures = painter.draw(prompt, **options)
        except Exception as failure:  # The text of the answer must not be lost, whatever a pipeline raises.
            error = failure.with_traceback(None)
            reason = f"drawing failed: {first_line(failure)}"
            break
        drawn += pictures
        done += [prompt] * len(pictures)
    return dataclasses.replace(answer, image_prompts=done, images=drawn, no_image_reason=reason, image_error=error)


def _is_last(like) -> bool:
    return isinstance(like, str) and like == LAST
