"""The programs of MM-Interleaved's tasks run on a tiny checkpoint and ask what the original asks."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mg_fast
from mg_fast.models.mm_interleaved.prompts import parse_boxes
from recipes.interleaved import captions, few_shot, grounding, map_to_picture, questions, ranking, storytelling
from tests.models.mm_interleaved.recorded import answers, folder_of, requests

NAME = "mmi-tiny"


@pytest.fixture(scope="module")
def pipeline():
    return mg_fast.load(folder_of(NAME), device="cpu")


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
    """Each picture begins with the recorded seed. The recording holds the pixels before they are cut to 8 bits."""
    turns = [("A dog runs.", photos[0]), ("It stops under the tree.", photos[1])]
    for request, drawn in (
        (
            "segm.steps4",
            map_to_picture.draw(pipeline, photos[0], "a street with a tree and a house", num_inference_steps=4),
        ),
        ("story.steps4", storytelling.draw_next(pipeline, turns, "Then the moon shines.", num_inference_steps=4)),
    ):
        expected = answers(NAME)[f"{request}.picture"][0].permute(1, 2, 0) * 255
        found = torch.from_numpy(np.array(drawn)).float()
        assert (found - expected).abs().max() <= 0.5 + 255 * 1e-4, request
    # Another order of text and map gives another picture.
    other = map_to_picture.draw(pipeline, photos[0], "a street", text_first=True, seed=42, num_inference_steps=2)
    same = map_to_picture.draw(pipeline, photos[0], "a street", seed=42, num_inference_steps=2)
    assert np.asarray(other).tolist() != np.asarray(same).tolist()


def test_grounding_and_few_shot_run(pipeline, photos):
    answer, boxes = grounding.find(pipeline, photos[0], "the red hat", squeeze=True, instruction=True)
    assert boxes == parse_boxes(answer, photos[0].size)
    drawn = grounding.draw(photos[0], [(10, 20, 60, 70)])
    assert drawn.getpixel((10, 45)) == (255, 0, 0) and drawn.getpixel((35, 45)) == photos[0].getpixel((35, 45))
    told = few_shot.answer(pipeline, [(photos[1], "Is it red?", "yes"), (None, "Is it?", "no")], photos[0], "How many?")
    assert isinstance(told, str)


@pytest.mark.parametrize(
    "program, arguments, shown",
    [
        ("captions", ["PICTURE", "PICTURE"], "PICTURE: "),
        ("questions", ["PICTURE", "What?", "--unanswerable"], ""),
        ("few_shot", ["PICTURE", "What?", "--example", "PICTURE", "Is it?", "yes"], ""),
        ("grounding", ["PICTURE", "the hat", "--out", "OUT"], ""),
        ("map_to_picture", ["PICTURE", "a street", "--steps", "2", "--out", "OUT"], ""),
        ("storytelling", ["It rests.", "--turn", "A dog.", "PICTURE", "--steps", "2", "--out", "OUT"], ""),
        ("ranking", ["PICTURE", "a cat", "is it red", "--option", "yes", "--option", "no"], "  yes\n"),
    ],
)
def test_programs(program, arguments, shown, pipeline, tmp_path, monkeypatch, capsys):
    picture, out = folder_of(NAME) / "image0.png", tmp_path / "out.png"
    given = [{"PICTURE": str(picture), "OUT": str(out)}.get(argument, argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [program, "--model", str(folder_of(NAME)), *given])
    # All programs load in the same way, which the test of the command line covers.
    monkeypatch.setattr(mg_fast, "load", lambda *_, **__: pipeline)
    importlib.import_module(f"recipes.interleaved.{program}").main()
    printed = capsys.readouterr().out
    assert shown.replace("PICTURE", str(picture)) in printed
    if "OUT" in arguments:
        with Image.open(out) as drawn:
            assert drawn.mode == "RGB"


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
