"""Pictures in a conversation: what is asked, what is drawn, and what happens where nothing can be."""

import dataclasses

import pytest
from PIL import Image

from mg_fast.engine.answers import NOT_ASKED, Answer
from mg_fast.engine.conversation import Conversation
from mg_fast.engine.drawing import NO_PAINTER, drawing_options, with_pictures
from mg_fast.errors import DrawingError, PromptError
from mg_fast.hints import ocr
from mg_fast.models.templates import TEMPLATES, render


class Painter:
    """Draws one grey pixel, remembers what it was asked for, and fails at prompts that say so."""

    def __init__(self):
        self.asked = []

    def draw(self, prompt, **options):
        self.asked.append((prompt, options))
        if "fail" in prompt:
            raise DrawingError("memory is short while drawing")
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
    assert talk.painter.asked == [("a cat", {"seed": 5})]
    assert talk.turns == [("a cat, please <GEN>", "<h>a cat</h>")]


def test_options_and_the_last_picture(talk):
    first = talk.chat("a cat", draw={"steps": 3, "like": "last", "seed": 2}, seed=5, max_new_tokens=1)
    talk.says = "<h>a dog</h> <h>a cow</h>"
    second = talk.chat("more", draw={"like": "last"}, max_new_tokens=1)
    asked = talk.painter.asked
    assert asked[0] == ("a cat", {"steps": 3, "like": None, "seed": 2})
    assert [options["like"] for _, options in asked[1:]] == [first.images[0], second.images[0]]
    assert second.image_prompts == ["a dog", "a cow"] and talk.last_drawn is second.images[1]
    talk.reset()
    assert talk.last_drawn is None


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_marker_ends_the_turn(pipeline, monkeypatch, template):
    asked = []
    monkeypatch.setattr(pipeline.answers, "request", lambda prompt, sampling: asked.append(prompt))
    monkeypatch.setattr(pipeline.answers, "answer", lambda rows, sampling, **options: [answer("no")])
    monkeypatch.setattr(ocr, "read", lambda image: [ocr.TextLine(f"{image.width} wide", 0.9), ocr.TextLine("?", 0.05)])
    pictures = [Image.new("RGB", (side, 10)) for side in (10, 12)]
    talk = Conversation(pipeline.vision, pipeline.answers, template, Painter())
    talk.chat("What is it?", pictures, draw=True, ocr=True)
    talk.chat("And now?", draw=True)
    first = "<image>\n<image>\nWhat is it?\nReference OCR Token: 10 wide\n\nReference OCR Token: 12 wide\n <GEN>"
    assert asked == [
        render(template, [(first, None)]),
        render(template, [(first, "no"), ("And now? <GEN>", None)]),
    ]


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
    assert talk.turns == [] and talk.painter.asked == []
    assert drawing_options(True, -3)["seed"] >= 0 and drawing_options(False, 3) is None
