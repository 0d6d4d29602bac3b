"""How texts are chosen and pictures are drawn: the original's settings, and what a caller says instead."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import PromptError, quoted
from ...models.mm_interleaved.prompts import SETTINGS
from ...models.mm_interleaved.tokenization import IMAGE_TOKEN, SOI_TOKEN
from ...models.templates import IMAGE_TAG
from ...runtime.arguments import check_text, whole_number
from ..options import Sampling

# Most tokens of an answer if neither a task nor the caller says, as in the original's inference.
DEFAULT_NEW_TOKENS = 90
# Options of `generate` that are arguments of `Sampling` under the same name.
_OF_SAMPLING = ("max_new_tokens", "temperature", "top_p")
# What only matters to sampled tokens.
_OF_SAMPLED = ("temperature", "top_p", "top_k")

# Options of Mini-Gemini's `chat`, and what a caller can do instead.
_OF_MINI_GEMINI = {
    "draw": "MM-Interleaved draws by itself, with `draw` and `interleave` of a pipeline, or with mg-fast story",
    "ocr": "`mg_fast.hints.ocr` reads the text of a picture, which can be an item of its own",
}
# What stands for a picture in a prompt.
_PICTURE_MARKS = (IMAGE_TAG, SOI_TOKEN, IMAGE_TOKEN)


def sampling_for(task: str | None, *, seed: int | None = None, allow_long: bool | None = None, **given) -> Sampling:
    """How the tokens of a text are chosen.

    Args:
        task: a task of `SETTINGS`, whose settings are the original's. None decodes greedily and without penalties, at
            most 90 tokens.
        seed: as in `Sampling`.
        allow_long: not an option of this family. It is refused, so that it is not ignored; so are `draw` and `ocr`.
        **given: `max_new_tokens`, `temperature`, `top_p`, and further options of `generate`. They take the place of the
            task's. A `temperature` of 0 decodes without sampling, and one above 0 without beams. Where fewer tokens are
            wanted than the task's least number, the latter is lowered. None stands for an option that was not given.

    Raises:
        PromptError: the task is unknown, or an option is out of range or would be ignored.
    """
    if task is not None and task not in SETTINGS:
        raise PromptError(f"task: expected one of {', '.join(sorted(SETTINGS))}, or None, got {quoted(task)}")
    if allow_long is not None:
        raise PromptError("allow_long is not an option here: MM-Interleaved has one limit, its number of positions")
    given = {name: value for name, value in given.items() if value is not None}
    for name, instead in _OF_MINI_GEMINI.items():
        if given.pop(name, False) is not False:
            raise PromptError(f"{name} is not an option here, but one of Mini-Gemini: {instead}")
    options = dict(SETTINGS[task]) if task is not None else {"max_new_tokens": DEFAULT_NEW_TOKENS}
    options.pop("do_sample", None)
    if "temperature" in given:
        dropped = ("num_beams", "length_penalty") if given["temperature"] else _OF_SAMPLED
        options = {name: value for name, value in options.items() if name not in dropped}
    options |= given
    least, most = (whole_number(options.get(name)) for name in ("min_new_tokens", "max_new_tokens"))
    if "min_new_tokens" not in given and None not in (least, most) and least > most:
        options["min_new_tokens"] = most
    of_sampling = {name: options.pop(name) for name in _OF_SAMPLING if name in options}
    return Sampling(seed=seed, generate_options=options, **of_sampling)


def check_task(task: str | None, pictures: Sequence) -> None:
    """Raises PromptError where a task, which is about a picture, has none."""
    if task is not None and not pictures:
        raise PromptError(f"task {task} is about a picture: expected at least one, got a text alone")


@dataclass(frozen=True)
class Loop:
    """How texts and pictures follow each other. The defaults are the original's.

    Attributes:
        rounds: number of rounds, each a text or a picture. None: twice `max_pictures`, or 2 without such a limit.
        max_pictures: the loop ends where a further picture would be drawn; None: no limit.
        force_pictures: draw a picture after every text, whether the model asks for one or not (the original's
            `force_gen_image_next`).
        texts: for each round, a text in the place of the one that the model would write. An empty one, and rounds
            after the last, let the model write. Rounds of pictures count, too (`force_replace_gen_text` with
            `multiround_context`).
        auto_end: end the loop where the model ends a text by its end-of-sequence token. Otherwise the next round goes
            on behind the text.
        start_with_picture: begin by drawing (`generate_mode: generate_images`).

    Raises:
        PromptError: a value is out of range, or one of `texts` holds a mark or token of pictures.
    """

    rounds: int | None = None
    max_pictures: int | None = None
    force_pictures: bool = False
    texts: tuple[str, ...] | None = None
    auto_end: bool = False
    start_with_picture: bool = False

    def __post_init__(self):
        for name, least in (("rounds", 1), ("max_pictures", 0)):
            given = getattr(self, name)
            value = whole_number(given)
            if given is not None and (value is None or value < least):
                raise PromptError(f"{name}: expected a whole number of {least} or more, got {quoted(given)}")
            object.__setattr__(self, name, value)
        if self.rounds is None:
            object.__setattr__(self, "rounds", 2 * self.max_pictures if self.max_pictures else 2)
        texts = () if self.texts is None else self.texts
        if not isinstance(texts, (list, tuple)):
            raise PromptError(f"texts: expected a list with a text for each round, got {quoted(texts)}")
        for number, text in enumerate(texts):
            check_text(text, f"texts[{number}]")
            if mark := next((mark for mark in _PICTURE_MARKS if mark in text), None):
                raise PromptError(f"texts[{number}] holds {mark}: a text of a loop has no pictures")
        object.__setattr__(self, "texts", tuple(texts))

    def text_of(self, number: int) -> str:
        """The text that was given for a round, counted from 0; empty where the model writes."""
        return self.texts[number] if number < len(self.texts) else ""
