"""Conversations, figures and stages as a page shows them. Whatever a user or a model wrote is escaped here."""

import html
import re
from collections.abc import Iterable, Sequence

from .looking import LookedAt
from .sessions import AnsweredTurn, AnswerFigures, AskedQuestion

# The stages that are shown, each with the names that the measurement has for its parts.
STAGES = (
    ("preprocess", ("preprocess",)),
    ("towers", ("LR tower", "HR tower")),
    ("mining", ("patch info mining", "projector")),
    ("prefill", ("prefill to first token", "prefill and decode")),
    ("decode", ("decode",)),
)


def escaped(text: str) -> str:
    """A text that a browser shows letter by letter, with its line breaks."""
    return html.escape(text).replace("\n", "<br>")


def picture_url(name: str) -> str:
    """The address of a picture of the store, as seen from the page."""
    return f"gradio_api/file={html.escape(name)}"


def messages(turns: Iterable[AnsweredTurn]) -> list[dict]:
    """A conversation as messages of gradio's Chatbot, whose texts are HTML."""
    shown = []
    for turn in turns:
        shown.append(question_message(turn.question))
        content = _said(turn)
        for i, (name, prompt) in enumerate(turn.drawn, 1):
            content += [_picture(name, f"drawn picture {i}"), _text(drawn_line(name, prompt))]
        if turn.no_picture:
            content.append(_text(f"<em>No picture: {escaped(turn.no_picture)}</em>"))
        content.append(_text(f"<small>{figures_line(turn.figures)}</small>"))
        shown.append({"role": "assistant", "content": content})
    return shown


def _said(turn: AnsweredTurn) -> list[dict]:
    """The text of an answer. The prompts of its pictures stand below them, and are not shown twice."""
    text = turn.text
    for _, prompt in turn.drawn:
        text = text.replace(f"<h>{prompt}</h>", "")
    if turn.drawn and not text.strip():
        return []
    return [_text(escaped(text.strip()) or "(an empty answer)")]


def question_message(question: AskedQuestion) -> dict:
    """A question as a message of gradio's Chatbot."""
    pictures = [_picture(name, f"picture {i}") for i, name in enumerate(question.pictures, 1)]
    return {"role": "user", "content": [*pictures, _text(escaped(question.text))]}


def answer_so_far(text: str, note: str = "") -> dict:
    """An answer that is being written, with a note such as the place in line."""
    parts = [escaped(text)] if text else []
    if note:
        parts.append(f"<em>{html.escape(note)}</em>")
    return {"role": "assistant", "content": [_text("<br>".join(parts) or "&hellip;")]}


def without_wishes(text: str) -> str:
    """An answer that is being written, without what it wants to be drawn, which is shown with the pictures."""
    return re.sub(r"<h>.*?(</h>|$)|<h?$", "", text, flags=re.DOTALL).strip()


def drawn_line(name: str, prompt: str) -> str:
    """What stands under a drawn picture: its prompt, and a link that saves it."""
    return f'<small>Drawn: {escaped(prompt)} <a href="{picture_url(name)}" download="drawn.png">Download</a></small>'


def figures_line(took: AnswerFigures) -> str:
    """What an answer took, in one line."""
    parts = [f"{_seconds(took.first_s)} to the first token"]
    if took.tokens_per_s is not None:
        parts.append(f"{took.tokens_per_s:.1f} tokens/s")
    parts.append(f"{took.new_tokens} new tokens")
    parts.append(f"{took.cached_tokens} of {took.prompt_tokens} prompt tokens from the cache")
    if took.wait_s >= 0.05:
        parts.append(f"{_seconds(took.wait_s)} in line")
    if took.finish == "length":
        parts.append("ended at the most tokens")
    elif took.finish == "stopped":
        parts.append("stopped")
    return " &middot; ".join(parts)


def place_note(place: int, length: int) -> str:
    """Where a question stands in the line."""
    return f"In line: place {place} of {length}"


def stage_bars(stages: Sequence[tuple[str, float]]) -> str:
    """The seconds of an answer's stages as bars."""
    if not stages:
        return '<p class="mg-hint">Ask with "Measure the stages" switched on to see where the time goes.</p>'
    sums = [(title, sum(s for name, s in stages if name in names)) for title, names in STAGES]
    known = {name for _, names in STAGES for name in names}
    sums += [(html.escape(name), s) for name, s in stages if name not in known]
    longest = max(s for _, s in sums) or 1.0
    rows = []
    for title, seconds in sums:
        # A stage without time was not run: the picture was known, or there was none.
        label = _seconds(seconds) if seconds else "not run"
        bar = f'<span class="mg-bar" style="width:{60 * seconds / longest:.1f}%"></span>' if seconds else ""
        rows.append(
            f'<div class="mg-row"><span class="mg-name">{title}</span>{bar}<span class="mg-value">{label}</span></div>'
        )
    return f'<div class="mg-bars">{"".join(rows)}</div>'


def look_panel(found: LookedAt | None, strength: float, windows: bool) -> str:
    """The picture of an explanation under its heat map.

    Args:
        found: the explanation; None shows how to get one.
        strength: how much of the heat map is seen, from 0 to 1.
        windows: show the borders of the windows.
    """
    if found is None:
        return '<p class="mg-hint">Ask about a picture, choose it here, and press "Show".</p>'
    borders = f'<img src="{picture_url(found.borders)}" alt="borders of the windows">' if windows else ""
    return (
        '<figure class="mg-look">'
        f'<img src="{picture_url(found.picture)}" alt="the picture as the model saw it">'
        f'<img src="{picture_url(found.glow)}" alt="heat map" style="opacity:{min(max(strength, 0.0), 1.0):.2f}">'
        f"{borders}"
        f"<figcaption>{escaped(found.question)} <strong>{escaped(found.answer)}</strong><br>"
        "The question was asked once more about this picture alone. Bright places are those that the answer depends on "
        "most, by an estimate.</figcaption></figure>"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _text(markup: str) -> dict:
    return {"type": "text", "text": markup}


def _picture(name: str, told: str) -> dict:
    kind = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif", "bmp": "image/bmp"}
    ending = name.rsplit(".", 1)[-1]
    file = {"path": name, "mime_type": kind[ending], "orig_name": f"{told}.{ending}"}
    return {"type": "file", "file": file | {"meta": {"_type": "gradio.FileData"}}, "alt_text": told}
