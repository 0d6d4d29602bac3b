"""Draws the pictures whose prompts the model has written into an answer."""

import dataclasses
from collections.abc import Mapping

from ..drawing.prompts import CLOSING, OPENING, find_prompts
from ..drawing.settings import DrawingSettings
from ..errors import DrawingError, PromptError, quoted
from ..models.pictures import open_picture
from ..models.tensor_files import first_line
from .answers import Answer

# What ends the user's turn where a picture is wished for: Mini-Gemini was trained with it there, after a blank.
MARKER = " <GEN>"
NO_PAINTER = "no painter is loaded: mg_fast.load(..., painter=...) takes one"
# What `draw={...}` may set: the options of `Painter.draw`.
_SETTINGS = tuple(field.name for field in dataclasses.fields(DrawingSettings))
OPTIONS = (*_SETTINGS, "like", "on_step")
LAST = "last"


def drawing_options(draw: "bool | Mapping[str, object]", seed: int | None) -> dict[str, object] | None:
    """The options for `Painter.draw` in the `draw` argument of a question; None where no picture is wished for.

    They are checked, and a guiding picture is opened, so that nothing is found wrong after the answer was written.

    Args:
        draw: True, False, or options by name.
        seed: the seed of the answer's words, which the picture has too unless `draw` has one.

    Raises:
        PromptError: `draw` is something else, or has an unknown option.
        DrawingError: an option is out of range.
        PictureError: the guiding picture cannot be read.
    """
    if draw is None or draw is False:
        return None
    if draw is not True and not isinstance(draw, Mapping):
        raise PromptError(f"draw: expected True, False or a dict of options, got {quoted(draw)}")
    options = {} if draw is True else dict(draw)
    if unknown := [name for name in options if name not in OPTIONS]:
        raise PromptError(f"draw: unknown option {quoted(unknown[0])}, expected some of {', '.join(OPTIONS)}")
    DrawingSettings(**{name: options[name] for name in _SETTINGS if name in options})
    like = options.get("like")
    if options.get("strength") is not None and like is None:
        raise DrawingError("strength: it says how far to depart from a picture, but no picture came as like=")
    if options.get("on_step") is not None and not callable(options["on_step"]):
        raise DrawingError(f"on_step: expected a function of two numbers, got {quoted(options['on_step'])}")
    if like is not None and not _is_last(like):
        options["like"] = open_picture(like, label="like")
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
    drawn: list = []
    done: list[str] = []
    reason = error = None
    for prompt in prompts:
        try:
            pictures = painter.draw(prompt, **_with_last(options, drawn[-1] if drawn else last))
        except Exception as failure:  # The text of the answer must not be lost, whatever a pipeline raises.
            error = _without_frames(failure)
            reason = f"drawing failed: {first_line(failure)}"
            break
        drawn += pictures
        done += [prompt] * len(pictures)
    return dataclasses.replace(answer, image_prompts=done, images=drawn, no_image_reason=reason, image_error=error)


def _without_frames(error: Exception) -> Exception:
    """The error without the frames of itself and its causes, which would keep their tensors while the answer lives."""
    found: BaseException | None = error
    while found is not None and found.__traceback__ is not None:
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
    return error


def _with_last(options: Mapping[str, object], last) -> Mapping[str, object]:
    """The options with a picture in the place of "last"; without one, neither it nor its strength is left."""
    if not _is_last(options.get("like")):
        return options
    if last is None:
        return {name: value for name, value in options.items() if name not in ("like", "strength")}
    return {**options, "like": last}


def _is_last(like) -> bool:
    return isinstance(like, str) and like == LAST
