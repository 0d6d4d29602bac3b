"""The programs of MM-Interleaved's tasks run on a tiny checkpoint and ask what the original asks."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import mg_fast
from mg_fast.models.mm_interleaved.prompts import join_items, parse_boxes
from recipes.interleaved import captions, few_shot, grounding, map_to_picture, questions, ranking, storytelling
from tests.models.mm_interleaved.recorded import answers, folder_of, requests

NAME = "mmi-tiny"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline():
    return mg_fast.load(folder_of(NAME), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def photos():
    found = []
    for i in range(3):
        with Image.open(folder_of(NAME) / f"image{i}.png") as picture:
            found.append(picture.convert("RGB"))
    return found


def test_captions_are_the_originals(pipeline, photos):
    """Beam search with the original's own settings, compared with what the original wrote."""
    recorded = requests(NAME)["caption"]["generations"]["default"]["text"]
    assert captions.captions(pipeline, photos[1:]) == recorded


def test_answers_are_the_originals(pipeline, photos):
    asked = "What color is the cat under the table?"
    [recorded] = requests(NAME)["vqa"]["generations"]["default"]["text"]
    # The second question does not know of the first.
    assert questions.answers(pipeline, photos[0], [asked, asked]) == [recorded] * 2
    assert isinstance(questions.answers(pipeline, photos[0], [asked], may_be_unanswerable=True)[0], str)


def test_ranking_is_the_originals(pipeline, photos):
    recorded = answers(NAME)
    options = pipeline.processor.batch_decode(recorded["scores.options_ids"], skip_special_tokens=True)
    ranked = ranking.rank(pipeline, photos[0], "a cat on a chair", [], "is it red", options)
    scores = dict(zip(options, recorded["scores.scores"].flatten().tolist(), strict=True))
    assert [option for option, _ in ranked] == sorted(scores, key=lambda option: -scores[option])
    found = torch.tensor([score for _, score in ranked])
    torch.testing.assert_close(found, torch.tensor([scores[option] for option, _ in ranked]), rtol=5e-5, atol=0)


def test_pictures_are_the_originals(pipeline, photos):
    """The seed is the checkpoint's. The recording holds the pixels before they are cut to 8 bits."""
    caption, sentence = "a street with a tree and a house", "a red cat sits on the small table, near the window."
    drawn = {
        "segm.steps4": map_to_picture.draw(pipeline, photos[0], caption, num_inference_steps=4),
        "t2i.steps4": storytelling.draw_next(pipeline, [], sentence, num_inference_steps=4),
    }
    for request, picture in drawn.items():
        expected = answers(NAME)[f"{request}.picture"][0].permute(1, 2, 0) * 255
        assert (torch.from_numpy(np.array(picture)).float() - expected).abs().max() <= 0.5 + 255 * 1e-4, request


def test_grounding_and_few_shot_run(pipeline, photos):
    answer, boxes = grounding.find(pipeline, photos[0], "the red hat", squeeze=True, instruction=True)
    assert boxes == parse_boxes(answer, photos[0].size)
    drawn = grounding.draw(photos[0], [(10, 20, 60, 70)])
    assert drawn.getpixel((10, 45)) == (255, 0, 0) and drawn.getpixel((35, 45)) == photos[0].getpixel((35, 45))
    told = few_shot.answer(pipeline, [(photos[1], "Is it red?", "yes"), (None, "Is it?", "no")], photos[0], "How many?")
    assert isinstance(told, str)


class Recorder:
    """A pipeline in whose place the programs' command lines are tested: it keeps what it is asked."""

    def __init__(self):
        self.asked = []

    def conversation(self) -> "Recorder":
        return self

    def chat(self, items, *, task):
        self.asked.append((join_items(items)[0], {"task": task}))
        return SimpleNamespace(text="(000,000)(999,500)</box>")

    def draw(self, items, **options):
        self.asked.append((join_items(items)[0], options))
        return [Image.new("RGB", (8, 8), "red")]

    def score(self, items, options):
        self.asked.append((join_items(items)[0], {}))
        return [-2.5, -1.25][: len(options)]


DRAWN = {"seed": 5, "num_inference_steps": 2}
PROGRAMS = {
    "captions": (["PICTURE"], "<image>a photo of", {"task": "caption"}, "PICTURE: (000,000)(999,500)</box>\n"),
    "questions": (
        ["PICTURE", "What?", "--unanswerable"],
        "Based on the image, please answer the question.<image>What? When the provided information is insufficient, "
        "respond with 'Unanswerable'. Please provide an accurate answer within one word. The answer is:",
        {"task": "question"},
        "(000,000)(999,500)</box>\n",
    ),
    "few_shot": (
        ["PICTURE", "What?", "--example", "PICTURE", "Is it?", "yes"],
        "<image>Question: Is it? Short answer: yes<image>Question: What? Short answer:",
        {"task": "question"},
        "(000,000)(999,500)</box>\n",
    ),
    "grounding": (
        ["PICTURE", "the hat", "--out", "OUT"],
        "<image>Provide the bounding box coordinate of the region this sentence describes. the hat<box>",
        {"task": "grounding"},
        "x1 0.0, y1 0.0, x2 331.0, y2 128.6\n",
    ),
    "map_to_picture": (
        ["PICTURE", "a street", "--text-first", "--steps", "2", "--seed", "5", "--out", "OUT"],
        "a street.<image>",
        DRAWN,
        "",
    ),
    "storytelling": (
        ["It rests.", "--turn", "A dog.", "PICTURE", "--steps", "2", "--seed", "5", "--out", "OUT"],
        "A dog.<image>It rests.",
        DRAWN,
        "",
    ),
    "ranking": (
        ["PICTURE", "a cat", "is it red", "--turn", "is it", "no", "--option", "yes", "--option", "no"],
        "<image>caption: a cat. question: is it? answer: no. question: is it red? answer:",
        {},
        "   -1.250  no\n   -2.500  yes\n",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, tmp_path, monkeypatch, capsys):
    arguments, prompt, options, shown = PROGRAMS[program]
    names = {"PICTURE": str(folder_of(NAME) / "image0.png"), "OUT": str(tmp_path / "out.png")}
    monkeypatch.setattr(sys, "argv", [program, "--model", NAME, *(names.get(given, given) for given in arguments)])
    module, recorder = importlib.import_module(f"recipes.interleaved.{program}"), Recorder()
    monkeypatch.setattr(module.common, "load", lambda args: recorder)
    module.main()
    assert recorder.asked == [(prompt, options)]
    assert capsys.readouterr().out == shown.replace("PICTURE", names["PICTURE"])
    assert (tmp_path / "out.png").is_file() == ("OUT" in arguments)


@pytest.mark.parametrize(
    "model, picture, message",
    [
        ("/nonexistent/model", "/nonexistent.png", "/nonexistent.png: no such file"),
        ("nano", "PICTURE", "nano is no MM-Interleaved checkpoint, which these programs need"),
    ],
)
def test_an_error_is_one_line(model, picture, message, photo, monkeypatch, capsys):
    file = str(photo) if picture == "PICTURE" else picture
    monkeypatch.setattr(sys, "argv", ["captions", "--model", model, file])
    with pytest.raises(SystemExit) as ended:
        captions.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"python -m recipes.interleaved.captions: error: {message}\n"
