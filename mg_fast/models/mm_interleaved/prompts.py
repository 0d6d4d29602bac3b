"""The original's prompts for each task, as items: texts and pictures in the order in which the model reads them.

A text is a str. Everything else is a picture that `open_picture` reads, such as a Pillow image or a Path. A picture
that the model is asked to draw is no item: it comes behind the items.

Source: OpenGVLab/MM-Interleaved (arXiv 2401.10208), its collators and data sets.
"""

import re
from collections.abc import Iterable, Sequence

from ...errors import PromptError, quoted
from ...runtime.arguments import check_text
from ..templates import IMAGE_TAG
from . import text_settings

Item = object
# A box in pixels: the left, upper, right and lower edge.
Box = tuple[float, float, float, float]

# Boxes are written as whole thousandths of the picture's width and height, of which the last is 999.
_BOX_SCALE = 999
_BOX = re.compile(r"\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)\s*\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)")
SYSTEM_TEXT = "You are a helpful assistant."

# Arguments of `generate` that change nothing.
_NEUTRAL = {
    "min_new_tokens": 0,
    "num_beams": 1,
    "do_sample": False,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
}
_TASKS = {
    "caption": text_settings.CAPTION,
    "question": text_settings.QUESTION,
    "paragraph": text_settings.PARAGRAPH,
    "grounding": text_settings.CODE_DEFAULTS,
    "story": text_settings.INTERLEAVED,
}
# The original's settings of text generation for each task, as the arguments of `generate` that do the same.
SETTINGS: dict[str, dict] = {
    task: {name: value for name, value in settings.generate_arguments().items() if _NEUTRAL.get(name) != value}
    for task, settings in _TASKS.items()
}

# The instruction format as a Jinja chat template. Pictures stand where a message's content has them.
CHAT_TEMPLATE = "".join(
    [
        "{%- macro flat(content) %}{%- if content is string %}{{ content }}{%- else %}",
        "{%- for part in content %}{%- if part['type'] == 'image' %}{{ '<image>' }}",
        "{%- elif part['type'] == 'text' %}{{ part['text'] }}{%- endif %}{%- endfor %}",
        "{%- endif %}{%- endmacro %}",
        "{%- set own_system = messages[0]['role'] == 'system' %}",
        "{%- set turns = messages[1:] if own_system else messages %}",
        f"{{{{ flat(messages[0]['content']) if own_system else '{SYSTEM_TEXT}' }}}}",
        "{%- for message in turns %}",
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}",
        "{{ raise_exception('roles must alternate user, assistant, user, ... after an optional system message') }}",
        "{%- endif %}",
        "{%- set text = flat(message['content']) %}",
        "{%- if message['role'] == 'user' %}",
        "{%- if not text | trim %}{{ raise_exception('a user message is empty') }}{%- endif %}",
        "{{ ' USER: ' ~ text }}",
        "{%- else %}{{ ' ASSISTANT: ' ~ text ~ '</s>' }}{%- endif %}{%- endfor %}",
        "{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{%- endif %}",
    ]
)


def join_items(items: Iterable[Item]) -> tuple[str, list]:
    """The prompt of some items, and their pictures.

    Texts and pictures are joined by one blank, and the blanks beside a picture are left out, as in the original.

    Returns:
        The prompt with one `<image>` per picture, and the pictures in its order.

    Raises:
        PromptError: there are no items, an item is None, or a text holds `<image>`, which stands for a picture.
    """
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        raise PromptError(f"expected a list of texts and pictures, got {quoted(items)}")
    items = list(items)
    if not items:
        raise PromptError("expected a list of texts and pictures, got an empty one")
    pieces, pictures = [], []
    for i, item in enumerate(items):
        where = f"item {i + 1} of {len(items)}"
        if item is None:
            raise PromptError(f"{where}: expected a text or a picture, got None")
        if not isinstance(item, str):
            pieces.append(IMAGE_TAG)
            pictures.append(item)
            continue
        check_text(item, where)
        if IMAGE_TAG in item:
            raise PromptError(f"{where} holds {IMAGE_TAG}: put the picture itself between two texts instead")
        pieces.append(item)
    return re.sub(rf" *{IMAGE_TAG} *", IMAGE_TAG, " ".join(pieces)), pictures


def instruct(items: Sequence[Item]) -> list[Item]:
    """The same request in the instruction format, for checkpoints that were trained with it."""
    return [f"{SYSTEM_TEXT} USER:", *items, "ASSISTANT:"]


# ---- One picture, one answer


def caption(picture: Item) -> list[Item]:
    """Asks for a short caption."""
    return [picture, "a photo of"]


def paragraph(picture: Item) -> list[Item]:
    """Asks for a description of several sentences."""
    return [picture, "Please describe the image in detail. The image depicts"]


def question(picture: Item, question: str, *, may_be_unanswerable: bool = False) -> list[Item]:
    """Asks a question that one word answers.

    `may_be_unanswerable` adds the sentence for pictures that may not show the answer, as in VizWiz.
    """
    before, hint = "Based on the image, please answer the question.", ""
    if may_be_unanswerable:
        hint = " When the provided information is insufficient, respond with 'Unanswerable'."
    return [before, picture, f"{question}{hint} Please provide an accurate answer within one word. The answer is:"]


def few_shot(examples: Iterable[tuple[Item | None, str, str]], picture: Item, question: str) -> list[Item]:
    """Asks a question after some examples.

    Args:
        examples: (picture or None, question, answer) of each example, in order.
        picture: the picture of the question.
        question: the question.

    Returns:
        The items. Examples are concatenated without a separator, as in the original; a picture comes before its text.
    """
    items: list[Item] = []
    for shown, asked, answer in examples:
        text = f"Question: {asked} Short answer: {answer}"
        if shown is not None:
            items += [shown, text]
        elif items and isinstance(items[-1], str):
            items[-1] += text
        else:
            items.append(text)
    return [*items, picture, f"Question: {question} Short answer:"]


def dialog(picture: Item, caption: str, turns: Iterable[tuple[str, str]], question: str) -> list[Item]:
    """The context in which answers to the last question of a dialog are ranked.

    Args:
        picture: the picture that the dialog is about.
        caption: its caption, without a full stop.
        turns: the questions (without question marks) and answers (without full stops) so far.
        question: the last question, without a question mark.
    """
    told = "".join(f"question: {asked}? answer: {answer}. " for asked, answer in turns)
    return [picture, f"caption: {caption}. {told}question: {question}? answer:"]


# ---- Regions


def grounding(picture: Item, phrase: str) -> list[Item]:
    """Asks for the box of what a phrase describes. The answer has the form `(x1,y1)(x2,y2)</box>`: `parse_boxes`."""
    asked = "Provide the bounding box coordinate of the region this sentence describes."
    return [picture, f"{asked} {phrase}<box>"]


def region_caption(picture: Item, box: str) -> list[Item]:
    """Asks for a short description of a region, which `format_box` writes."""
    return [picture, f"Provide a short description for this <ref>region</ref><box>{box}</box>."]


def region_question(picture: Item, box: str, question: str) -> list[Item]:
    """Asks a question about a region, which `format_box` writes."""
    return [picture, f"Answer this question according to the <ref>region</ref><box>{box}</box>. {question}"]


def grounded_caption(picture: Item) -> list[Item]:
    """Asks for a caption with the boxes of what it names."""
    return [picture, "Generate the caption with grounding."]


def format_box(box: Sequence[float], size: tuple[int, int]) -> str:
    """A box as the prompts write it, such as `(007,040)(512,998)`.

    Args:
        box: left, upper, right and lower edge in pixels.
        size: width and height of the whole picture in pixels, even though only its central square is seen.

    Raises:
        PromptError: the box has no four numbers, its edges are in the wrong order, or it leaves the picture.
    """
    width, height = size
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError):
        raise PromptError(f"expected a box of four numbers in pixels (x1, y1, x2, y2), got {quoted(box)}") from None
    if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
        raise PromptError(
            f"expected a box 0 <= x1 <= x2 <= {width} and 0 <= y1 <= y2 <= {height} in pixels, got {quoted(box)}"
        )
    sides = (width, height, width, height)
    x1, y1, x2, y2 = (int(edge / side * _BOX_SCALE) for edge, side in zip((left, top, right, bottom), sides))
    return f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})"


def parse_boxes(answer: str, size: tuple[int, int]) -> list[Box]:
    """The boxes in an answer, in pixels.

    Args:
        answer: a text with boxes `(x1,y1)(x2,y2)`, with or without tags around them.
        size: width and height of the whole picture in pixels.

    Returns:
        The boxes in their order, each with its smaller coordinates first; an empty list where the answer has none.
    """
    width, height = size
    boxes = []
    for found in _BOX.finditer(answer):
        x1, y1, x2, y2 = (int(number) / _BOX_SCALE for number in found.groups())
        boxes.append((min(x1, x2) * width, min(y1, y2) * height, max(x1, x2) * width, max(y1, y2) * height))
    return boxes


# ---- Pictures to draw


def text_to_picture(text: str) -> list[Item]:
    """Asks for the picture that a text describes."""
    return [text]


def map_to_picture(segmentation_map: Item, caption: str, *, text_first: bool = False) -> list[Item]:
    """Asks for the picture of a coloured segmentation map.

    Args:
        segmentation_map: the map, in the colours that the checkpoint was trained with (ADE20K's in the original).
        caption: what the picture shows, without a full stop.
        text_first: put the caption before the map.
    """
    return [f"{caption}.", segmentation_map] if text_first else [segmentation_map, f"{caption}."]


def story(turns: Iterable[tuple[str, Item | None]], *, picture_first: bool = False) -> list[Item]:
    """A story so far: sentences with their pictures, in order. The last picture may be None, for the one to draw."""
    items: list[Item] = []
    for sentence, picture in turns:
        turn = [sentence] if picture is None else [sentence, picture]
        items += turn[::-1] if picture_first else turn
    return items
