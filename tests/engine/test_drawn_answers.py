"""Pictures in a conversation: what is asked, what is drawn, and what happens where nothing can be."""

import copy
import dataclasses

import pytest
from PIL import Image

from mg_fast.engine.answers import NOT_ASKED, Answer
from mg_fast.engine.conversation import Conversation
from mg_fast.engine.drawing import NO_PAINTER, drawing_options, with_pictures
from mg_fast.errors import CheckpointError, DrawingError, PictureError, PromptError
from mg_fast.hints import ocr
from mg_fast.models.templates import TEMPLATES

# What the original's command line sends in the first and in the second turn, where {} stands for the first question.
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
)
_LLAMA = (
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\n"
)
_GEMMA = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
_YI = "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n{}<|im_end|><|im_start|>assistant\n"
_AGAIN = "And now? <GEN>"
ASKED = {
    "vicuna_v1": _VICUNA,
    "gemma": _GEMMA,
    "mistral_instruct": "[INST] {} [/INST]",
    "chatml_direct": _YI,
    "llama_3": _LLAMA,
}
CONTINUED = {
    "vicuna_v1": f"{_VICUNA} no</s>USER: {_AGAIN} ASSISTANT:",
    "gemma": f"{_GEMMA}no<end_of_turn>\n<eos><start_of_turn>user\n{_AGAIN}<end_of_turn>\n<start_of_turn>model\n",
    "mistral_instruct": f"[INST] {{}} [/INST] no </s><s>[INST] {_AGAIN} [/INST]",
    "chatml_direct": f"{_YI}no<|im_end|><|im_start|>user\n{_AGAIN}<|im_end|><|im_start|>assistant\n",
    "llama_3": f"{_LLAMA}no<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{_AGAIN}<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\n",
}


class Painter:
    """Draws one grey pixel, remembers what it was asked for, and fails at prompts that say so."""

    def __init__(self):
        self.asked = []

    def draw(self, prompt, **options):
        self.asked.append((prompt, options))
        if "fail" in prompt:
            try:
                raise MemoryError
            except MemoryError as error:
                raise DrawingError("memory is short while drawing") from error
        if "stop" in prompt:
            raise KeyboardInterrupt
        return [Image.new("RGB", (1, 1), (len(self.asked),) * 3) for _ in range(options.get("count", 1))]


def answer(text: str) -> Answer:
    return Answer(text, [1], "stop", 3, 0)


@pytest.fixture
def talk(pipeline, monkeypatch):
    """A conversation with a painter, in which the model writes what a test puts into `says`."""
    given = Conversation(pipeline.vision, pipeline.answers, "vicuna_v1", Painter())
    given.says = "<h>a cat</h>"
    real = pipeline.answers.answer

    def speak(rows, sampling, **options):
        emit = options.pop("emit", lambda piece: None)
        (found,) = real(rows, sampling, **options)
        emit(given.says)
        return [dataclasses.replace(found, text=given.says)]

    monkeypatch.setattr(pipeline.answers, "answer", speak)
    return given


def test_nothing_is_drawn_when_nobody_asked(talk):
    given = talk.chat("hello", max_new_tokens=1)
    assert (given.images, given.image_prompts, given.no_image_reason) == ([], [], NOT_ASKED)
    assert talk.painter.asked == [] and talk.turns == [("hello", "<h>a cat</h>")]


def test_a_wish(talk):
    given = talk.chat("a cat, please", draw=True, seed=5, max_new_tokens=1)
    assert given.text == "<h>a cat</h>" and given.image_prompts == ["a cat"] and len(given.images) == 1
    assert given.no_image_reason is None and given.image_error is None
    assert talk.painter.asked == [("a cat", {"seed": 5})] and talk.picture_seed == 5
    assert talk.turns == [("a cat, please <GEN>", "<h>a cat</h>")]


def test_options_and_the_last_picture(talk):
    first = talk.chat("a cat", draw={"steps": 3, "like": "last", "strength": 0.5, "seed": 2}, seed=5, max_new_tokens=1)
    talk.says = "<h>a dog</h> <h>a cow</h>"
    second = talk.chat("more", draw={"like": "last"}, max_new_tokens=1)
    asked = talk.painter.asked
    assert asked[0] == ("a cat", {"steps": 3, "seed": 2})
    assert [options["like"] for _, options in asked[1:]] == [first.images[0], second.images[0]]
    assert second.image_prompts == ["a dog", "a cow"] and talk.last_drawn is second.images[1]
    talk.reset()
    assert talk.last_drawn is None


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_marker_ends_the_turn(pipeline, monkeypatch, template):
    asked = []
    monkeypatch.setattr(pipeline.answers, "request", lambda prompt, sampling: asked.append(prompt))
    monkeypatch.setattr(pipeline.answers, "answer", lambda rows, sampling, **options: [answer("no")])
    lines = [ocr.TextLine("<image>", 0.9), ocr.TextLine("?", 0.05)]
    monkeypatch.setattr(ocr, "read", lambda image: [ocr.TextLine(f"{image.width} wide", 0.9), *lines])
    pictures = [Image.new("RGB", (side, 10)) for side in (10, 12)]
    talk = Conversation(pipeline.vision, pipeline.answers, template, Painter())
    talk.chat("What is it?", pictures, draw=True, ocr=True)
    talk.chat("And now?", draw=True)
    first = (
        "Image 1:<image>\nImage 2:<image>\nWhat is it?\nReference OCR Token: 10 wide, < image>\n"
        "\nReference OCR Token: 12 wide, < image>\n <GEN>"
    )
    assert asked == [ASKED[template].format(first), CONTINUED[template].format(first)]


def test_a_seed_is_kept_for_the_pictures_that_follow(talk):
    for options in ({"seed": 5}, {}, {"draw": {"seed": 6}}, {}, {"draw": {"seed": None}}, {}):
        talk.chat("a cat", **{"draw": True, "max_new_tokens": 1, **options})
    assert [options["seed"] for _, options in talk.painter.asked] == [5, 5, 6, 6, None, 6]
    other = copy.copy(talk)
    talk.reset()
    assert (talk.picture_seed, other.picture_seed) == (None, 6)


def test_an_abandoned_stream_draws_nothing(talk):
    stream = talk.chat("a cat", draw=True, stream=True, max_new_tokens=1)
    next(stream)
    stream.close()
    assert talk.painter.asked == [] and talk.turns == [] and list(stream) == [] and stream.images == []


def test_a_stream_can_be_interrupted_while_it_draws(talk):
    talk.says = "<h>stop</h>"
    with pytest.raises(KeyboardInterrupt):
        list(talk.chat("one", draw=True, stream=True, max_new_tokens=1))
    assert talk.turns == [("one <GEN>", "<h>stop</h>")] and talk.last_drawn is None


def test_every_answer_of_a_batch_says_that_nothing_was_asked_for(pipeline):
    for given in pipeline.chat_batch(["hello", 3], max_new_tokens=1, progress=False):
        assert (given.images, given.image_prompts, given.no_image_reason) == ([], [], NOT_ASKED)
        assert given.image_error is None
    for option in ("draw", "ocr"):
        with pytest.raises(PromptError, match=f"{option} is not an option here"):
            pipeline.chat_batch(["hello"], progress=False, **{option: True})


def test_what_is_no_painter_is_refused(pipeline):
    with pytest.raises(CheckpointError, match="painter: expected"):
        pipeline.painter = 3
    pipeline.painter = Painter()
    assert pipeline.conversation().painter is pipeline.painter


def test_a_stream_carries_the_pictures(talk):
    stream = talk.chat("a cat", draw=True, stream=True, max_new_tokens=1)
    assert stream.images == [] and "not been read" in stream.no_image_reason
    assert "".join(stream) == "<h>a cat</h>"
    assert stream.image_prompts == ["a cat"] and len(stream.images) == 1 and stream.no_image_reason is None
    assert stream.answer.text == "<h>a cat</h>" and len(talk.turns) == 1


def test_the_text_survives_a_painter_that_fails(talk):
    talk.says = "<h>a cat</h> and <h>fail</h>"
    given = talk.chat("two", draw=True, max_new_tokens=1)
    assert given.text == talk.says and given.image_prompts == ["a cat"] and len(given.images) == 1
    assert given.no_image_reason == "drawing failed: memory is short while drawing"
    assert isinstance(given.image_error, DrawingError) and len(talk.turns) == 1
    # Frames would keep the tensors of the drawing.
    assert given.image_error.__traceback__ is given.image_error.__cause__.__traceback__ is None


def test_the_text_survives_an_interruption(talk):
    talk.says = "<h>stop</h>"
    with pytest.raises(KeyboardInterrupt):
        talk.chat("one", draw=True, max_new_tokens=1)
    assert talk.turns == [("one <GEN>", "<h>stop</h>")] and talk.last_drawn is None
    talk.says = "<h>a cat</h>"
    assert len(talk.chat("again", draw=True, max_new_tokens=1).images) == 1


@pytest.mark.parametrize(
    "text, painter, reason",
    [
        ("<h>a cat</h>", None, NO_PAINTER),
        ("a cat", Painter(), "the model wrote no prompt"),
        ("<H>a cat</H>", Painter(), "the model wrote no prompt"),
        ("<h> </h>", Painter(), "is empty"),
    ],
)
def test_reasons(text, painter, reason):
    given = with_pictures(answer(text), painter, {}, None)
    assert reason in given.no_image_reason and given.images == given.image_prompts == []


def test_options_are_checked_before_anything_is_generated(talk):
    for draw, message in (("yes", "True, False or a dict"), ({"sizes": 8}, "unknown option 'sizes'"), (1, "a dict")):
        with pytest.raises(PromptError, match=message):
            talk.chat("a cat", draw=draw, max_new_tokens=1)
    for draw, message in (
        ({"size": 30}, "multiples of 8"),
        ({"steps": 0}, "at least 1"),
        ({"strength": 2, "like": "last"}, "from 0 to 1"),
        ({"strength": 0.5}, "no picture came"),
        ({"on_step": 3}, "expected a function"),
    ):
        with pytest.raises(DrawingError, match=message):
            talk.chat("a cat", draw=draw, max_new_tokens=1)
    with pytest.raises(PictureError):
        talk.chat("a cat", draw={"like": "absent.png"}, max_new_tokens=1)
    assert talk.turns == [] and talk.painter.asked == []
    assert drawing_options(True, -3)["seed"] >= 0 and drawing_options(False, 3) is None
