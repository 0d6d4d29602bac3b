"""Nano's scenes, what is asked and said about them, and how they are told in codes."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from mg_fast import MiniGeminiProcessor
from mg_fast.models.mini_gemini.geometry import check_geometry
from recipes.nano import data
from recipes.nano.model import LR_SIDE, VOCABULARY, make_model, save
from recipes.nano.scenes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    DRAWN,
    KINDS,
    MAX_DIGITS,
    PRINT_HEIGHT,
    SIDE,
    TYPES,
    WORDS,
    draw_number,
    draw_scene,
    held_out,
)
from recipes.nano.talk import (
    GEN,
    NO_NUMBER,
    SHORT,
    ask,
    bare,
    careless,
    conversation,
    describe,
    described,
    every_sentence,
    text_only,
    wish,
)
from recipes.nano.towers import Codes
from recipes.nano.varied import draw_lines, draw_numbers, draw_varied

SCENES = [draw_scene(5, i, split="unseen" if i % 2 else "train") for i in range(60)]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    save(make_model(0), folder)
    return folder


@pytest.fixture(scope="module")
def processor(untrained):
    return MiniGeminiProcessor.from_pretrained(untrained)


def test_a_seed_draws_the_same_scene_and_another_seed_another():
    first, again, other = draw_scene(3, 7), draw_scene(3, 7), draw_scene(4, 7)
    assert first.image.tobytes() == again.image.tobytes() and (first.shapes, first.prints) == (
        again.shapes,
        again.prints,
    )
    assert first.image.tobytes() != other.image.tobytes()


def test_unseen_scenes_are_not_those_of_training():
    train_scenes = {draw_scene(0, i).image.tobytes() for i in range(20)}
    assert not train_scenes & {draw_scene(0, i, split="unseen").image.tobytes() for i in range(20)}


def test_training_never_shows_a_number_that_is_held_out():
    rng = random.Random(0)
    trained = {draw_number(rng, training=True) for _ in range(3000)}
    assert not any(map(held_out, trained))
    assert {len(number) for number in trained} == {2, 3, 4}
    pages = [draw(1, i)[1] for draw in (draw_lines, draw_numbers) for i in range(20)]
    pages += [
        draw(1, i, numbers=count).prints for draw in (draw_scene, draw_varied) for i in range(20) for count in (1, 6)
    ]
    assert not any(held_out(number) for prints in pages for line in prints for number in line.text.split())
    assert any(held_out(draw_number(rng, training=False)) for _ in range(100))


def test_a_number_can_be_asked_for():
    scene = draw_scene(0, 1, split="unseen", number="8052")
    assert scene.print.text == "8052" and ask(scene, "number", random.Random(0))[1] == "The number is 8052."


@pytest.mark.parametrize("scene", SCENES[:20])
def test_what_is_drawn_is_what_the_scene_says(scene):
    pixels = np.asarray(scene.image, np.float64)
    assert pixels.shape == (SIDE * DRAWN, SIDE * DRAWN, 3)
    for shape in scene.shapes:
        seen = pixels[round(shape.y * DRAWN), round(shape.x * DRAWN)]
        assert min(COLOURS, key=lambda name: np.abs(seen - COLOURS[name]).sum()) == shape.colour
    corner = np.median(pixels[:6, :6].reshape(-1, 3), axis=0)
    assert min(BACKGROUNDS, key=lambda name: np.abs(corner - BACKGROUNDS[name]).sum()) == scene.background
    if scene.print is not None:
        assert len(scene.print.digits) == len(scene.print.text)
        xs = [x for x, _ in scene.print.digits]
        assert xs == sorted(xs) and min(xs) > 0 and max(xs) < SIDE
        for x, y in scene.print.digits:
            # Ink and ground both lie within half a digit of the digit's centre.
            around = pixels[round(y * DRAWN) - 9 : round(y * DRAWN) + 9, round(x * DRAWN) - 6 : round(x * DRAWN) + 6]
            assert np.ptp(around, axis=(0, 1)).max() > 60


def test_print_is_less_than_half_as_high_for_the_low_resolution_tower():
    config = make_model(0).config
    check_geometry(config, "nano")
    assert config.vision_config.image_size == LR_SIDE == 84
    assert PRINT_HEIGHT[1] * LR_SIDE / SIDE < 5.5 < 10 <= PRINT_HEIGHT[0]


@pytest.mark.parametrize("scene", SCENES)
def test_answers_agree_with_what_was_drawn(scene):
    for attempt in range(4):
        rng = random.Random(attempt)
        for kind in TYPES:
            turn = ask(scene, kind, rng)
            if turn is None:
                continue
            question, said = turn
            if kind == "number":
                assert said == (f"The number is {scene.print.text}." if scene.print else "There is no number.")
            elif kind == "background":
                assert said.split()[-1] == f"{scene.background}."
            elif kind == "colour":
                (shape,) = [s for s in scene.shapes if s.kind in question]
                assert said == f"The {shape.kind} is {shape.colour}."
            elif kind == "count":
                thing = next(k for k in (*KINDS, "shape") if k + "s" in question)
                there = [s for s in scene.shapes if thing in (s.kind, "shape")]
                assert said.endswith(f"{WORDS[len(there)]} {thing}{'' if len(there) == 1 else 's'}.")
                assert all(f"{s.colour} {s.kind}" in said for s in there)
            elif kind == "where":
                found = scene.print if "number" in question else next(s for s in scene.shapes if s.kind in question)
                assert ("left" in said) == (found.x < SIDE / 3) and ("right" in said) == (found.x > 2 * SIDE / 3)
                assert ("top" in said) == (found.y < SIDE / 3) and ("bottom" in said) == (found.y > 2 * SIDE / 3)
            else:
                assert sum(said.count(k) for k in KINDS) == len({(s.kind, s.colour) for s in scene.shapes})
                assert ("a number" in said) == (scene.print is not None) and scene.background in said


def test_every_shape_has_a_name_of_its_own():
    for scene in [*SCENES, *(draw_scene(0, i, shapes=10) for i in range(30))]:
        assert len({(shape.kind, shape.colour) for shape in scene.shapes}) == len(scene.shapes)


def test_a_crowded_scene_has_many_numbers_and_no_two_things_in_a_cell():
    for i in range(20):
        scene = draw_scene(1, i, shapes=6, numbers=6)
        labels = data.label(scene.prints, scene.shapes, scene.background, SIDE)
        assert len(scene.prints) >= 5 and len(scene.shapes) >= 3
        assert (labels["kind"] > 0).sum() == len(scene.prints) + len(scene.shapes)
        told = {tuple(cell) for cell in labels["digits"][labels["digits"][..., 0] != data.IGNORED]}
        assert told == {tuple([1 + int(d) for d in p.text] + [0] * (MAX_DIGITS - len(p.text))) for p in scene.prints}
    assert draw_scene(1, 0, numbers=0).print is None


def test_a_wish_for_a_drawing_is_answered_with_a_prompt():
    question, said = ask(SCENES[0], "draw", random.Random(0))
    assert question.endswith(GEN) and said.startswith(f"<h>{describe(SCENES[0])}") and said.endswith("</h>")


def test_lists_go_in_the_order_of_their_words():
    shapes = [("star", "red"), ("circle", "red"), ("circle", "blue"), ("square", "orange"), ("square", "orange")]
    assert (
        wish(shapes, "pink", True)
        == "a blue circle, two orange squares, a red circle, a red star on a pink background, with a number"
    )
    wishes = [text_only(random.Random(i)) for i in range(60)]
    asked, said = (" ".join(texts) for texts in zip(*(turn for turn in wishes if "<GEN>" in turn[0])))
    # "and" occurs in requests, as people speak, but never before the last item of an answer.
    assert " and " in asked and ", a" in said and " and " not in said


def test_every_sentence_survives_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for sentence in every_sentence():
        assert tokenizer.decode(tokenizer(sentence).input_ids, skip_special_tokens=True) == sentence
    rng = random.Random(0)
    for scene in SCENES:
        for question, said in [*conversation(scene, rng, turns=8), text_only(rng)]:
            for text in (careless(question, rng), said):
                assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_digit_is_a_token(processor):
    pieces = processor.tokenizer.tokenize("The number is 9041.")
    assert [piece for piece in pieces if piece.isdigit()] == list("9041")
    assert processor.template == "chatml_direct"


def test_answers_and_their_ends_are_what_is_learned(processor):
    turns = [("<image>\nWhat is the number?", "The number is 52."), ("Draw this again. <GEN>", "<h>a red circle</h>")]
    ids, marks, answers = data.encode(processor, turns)
    said = processor.tokenizer.decode([i for i, wanted in zip(ids, answers) if wanted])
    assert said.replace(" ", "") == "".join(f"{answer}<|im_end|>" for _, answer in turns).replace(" ", "")
    assert sum(marks) == processor.image_processor.tokens_per_picture == 36


def test_labels_lie_where_things_lie():
    scene = next(s for s in SCENES if s.print and len(s.print.text) == 3 and s.shapes)
    labels = data.label([scene.print], scene.shapes, scene.background, SIDE)
    cell = int(scene.print.y // CELL), int(scene.print.x // CELL)
    assert data.CELL_KINDS[labels["kind"][cell]] == "number"
    assert labels["digits"][cell].tolist() == [1 + int(d) for d in scene.print.text] + [0] * (MAX_DIGITS - 3)
    assert (labels["kind"] > 0).sum() == 1 + len(scene.shapes)
    assert sorted(labels["character"][labels["character"] > 0]) == sorted(1 + int(d) for d in scene.print.text)
    assert sorted(labels["rank"][labels["rank"] > 0]) == [1, 2, 3]


@pytest.mark.parametrize(("cells", "answers_only"), [(8, True), (8, False), (36, False)])
def test_a_scene_is_told_in_the_cells_that_hold_things(processor, cells, answers_only):
    batch = data.told(processor, 0, 1, 6, cells=cells, turns=4, answers_only=answers_only)
    assert batch["marks"].sum(1).tolist() == [cells] * 6 == [len(set(row.tolist())) for row in batch["cells"]]
    for kind, standing in zip(batch["kind"].flatten(1), batch["cells"]):
        assert set(torch.nonzero(kind)[:, 0].tolist()) <= set(standing.tolist())
    codes = Codes(processor.tokenizer, 16, 0.3)
    words = torch.nn.Embedding(VOCABULARY, 16)
    seen = codes(batch, words)
    whole = codes({name: value for name, value in batch.items() if name != "cells"}, words)
    assert seen.shape == (6, cells, 16) and torch.equal(seen[2, 3], whole[2, batch["cells"][2, 3]])


def test_of_bare_answers_only_what_depends_on_the_scene_is_to_be_said(processor):
    batch = data.told(processor, 0, 2, 8, cells=8, turns=20, answers_only=True)
    said, given = (
        {
            token.lstrip("▁")
            for token in processor.tokenizer.convert_ids_to_tokens(batch["ids"][batch["answers"] == flag].tolist())
        }
        for flag in (1, 0)
    )
    # Nothing before the answer says that the background's colour is asked for.
    assert "background" in given and "background" not in said
    assert said & set("0123456789") and not given & {*"0123456789", "pink", "teal"}
    # Questions about counts and places determine the answer to the last word.
    assert {"There", "at", "many"} <= said | given and {"There", "at"} <= said and "many" not in said


@pytest.mark.parametrize(
    ("answer", "asks"),
    [
        ("A blue circle, a red circle: two circles.", True),
        ("There are no circles.", True),
        ("The circle is at the top left.", True),
        ("The number is at the middle centre.", True),
        ("The star is orange.", False),
        ("The number is 4711.", False),
        ("The background is pink.", False),
        ("The red circle is at the top left.", True),
        ("There is no red circle.", True),
        ("Yes, there is a number.", True),
        ("No, there is no number.", True),
        (NO_NUMBER, False),
    ],
)
def test_a_bare_answer_has_its_question_where_it_does_not_say_it_itself(answer, asks):
    assert bare("What?", answer) == ("What?" if asks else "", answer)


def told_by(batch: data.Batch, row: int) -> str:
    """The description of a scene, made from its labels."""
    kinds, colours = (batch[name][row].flatten().tolist() for name in ("kind", "colour"))
    things = [data.CELL_KINDS[kind] for kind in kinds]
    shapes = [(thing, list(COLOURS)[colour]) for thing, colour in zip(things, colours) if thing in KINDS]
    text = described(shapes, list(BACKGROUNDS)[batch["background"][row]], "number" in things)
    return text[0].upper() + text[1:] + "."


def test_some_scenes_are_described_first(processor):
    told = dict(cells=36, turns=20, answers_only=True, shown=True)
    plain, telling = (data.told(processor, 0, 3, 8, **told, described=share) for share in (0.0, 1.0))
    assert plain["pixels"].shape == telling["pixels"].shape == (8, SIDE, SIDE, 3)
    for batch, share in ((plain, 0), (telling, 8)):
        said = [
            processor.tokenizer.decode(ids[answers == 1]).strip()
            for ids, answers in zip(batch["ids"], batch["answers"])
        ]
        assert sum(text.startswith(told_by(batch, row)) for row, text in enumerate(said)) == share, said
        if share:
            # Nothing follows that could be copied from the description.
            follows = [text.split(".", 1)[1] for text in said]
            assert not any(word in text for text in follows for word in (":", *COLOURS, *BACKGROUNDS)) and any(
                follows
            ), follows
    # Scenes with and without a number are described. Otherwise every description would mention one.
    assert 2 <= (telling["kind"] == data.CELL_KINDS.index("number")).flatten(1).any(1).sum() <= 7


def test_the_code_of_a_number_tells_the_order_of_its_digits(processor):
    codes, words = Codes(processor.tokenizer, 16, 0.3), torch.nn.Embedding(VOCABULARY, 16)
    scene = draw_scene(0, 1, split="unseen", number="407")

    def told(number: str) -> torch.Tensor:
        labels = data.label([dataclasses.replace(scene.print, text=number)], [], scene.background, SIDE)
        return codes({name: torch.from_numpy(value)[None] for name, value in labels.items()}, words)

    assert (told("407") - told("470")).abs().max() > 0.1


def test_questions_of_a_conversation_do_not_ask_for_what_was_said():
    for i, scene in enumerate(SCENES):
        said = conversation(scene, random.Random(i), turns=12, others=SHORT)
        answers = [answer for _, answer in said]
        assert len(set(answers)) == len(answers) and not any(" on a " in answer for answer in answers)
