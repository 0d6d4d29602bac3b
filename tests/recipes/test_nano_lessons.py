"""What nano learns beyond ordinary scenes: varied scenes, what is not there, two pictures, and wishes in any order."""

import importlib.util
import random
import re

import pytest
import torch

import mg_fast
from mg_fast.models.templates import IMAGE_TAG, render
from recipes.nano import data, fonts
from recipes.nano.losses import alike_numbers, chat_loss, picture_numbers
from recipes.nano.pairs import about, conversation_about_two, questions_about_both
from recipes.nano.scenes import CELL, MAX_DIGITS, SIDE, held_out
from recipes.nano.stages import FACTS, TALK
from recipes.nano.talk import GEN, MIXED, NAMED, NO_NUMBER, ask, asked_wish, count, wish
from recipes.nano.varied import draw_varied, on_border

SCENES = [draw_varied(5, i, split="unseen" if i % 2 else "train") for i in range(80)]


@pytest.fixture(scope="module")
def nano():
    return mg_fast.load("nano", device="cpu")


def named(scene) -> list[tuple[str, str]]:
    return [(shape.colour, shape.kind) for shape in scene.shapes]


# ---- Scenes


def test_a_seed_draws_the_same_varied_scene():
    first, again, other = draw_varied(3, 7), draw_varied(3, 7), draw_varied(3, 8)
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()


def test_varied_scenes_show_what_ordinary_ones_do_not():
    counts = {len(scene.shapes) for scene in SCENES}
    assert counts == set(range(7))
    alike = [scene for scene in SCENES if len(set(named(scene))) < len(scene.shapes)]
    assert 10 <= len(alike) <= 50
    prints = [scene.print for scene in SCENES if scene.print]
    assert {len(p.text) for p in prints} == {1, 2, 3, 4, 5}
    assert min(p.height for p in prints) < 9 and max(p.height for p in prints) > 14
    assert sum(on_border(p.x, p.y) for p in prints) >= 10


def test_what_is_asked_for_is_drawn():
    for i in range(12):
        scene = draw_varied(1, i, shapes=3, alike=True, numbers=1, digits=(5,), height=8.0, across=True)
        assert len(set(named(scene))) < len(scene.shapes) == 3
        assert len(scene.print.text) == 5 and scene.print.height == 8 and on_border(scene.print.x, scene.print.y)
        assert not held_out(scene.print.text)
        plain = draw_varied(1, i, shapes=6, alike=False, numbers=1, across=False)
        assert len(set(named(plain))) == len(plain.shapes) >= 5 and not on_border(plain.print.x, plain.print.y)
        assert not draw_varied(1, i, shapes=0, numbers=0).prints


def test_many_shapes_are_drawn_as_far_as_there_is_room():
    """Few colours can be seen on some grounds, so one kind runs out of them."""
    for i in range(40):
        scene = draw_varied(2, i, shapes=14, alike=False, numbers=0)
        assert len(scene.shapes) >= 6 and len(set(named(scene))) == len(scene.shapes)


def test_the_digits_of_print_lie_inside_the_picture():
    for scene in SCENES:
        for x, y in scene.print.digits if scene.print else ():
            assert 0 < x < SIDE and 0 < y < SIDE


def test_a_digit_is_as_high_as_asked_for_in_every_font():
    for name in (*fonts.FONTS, *fonts.MORE_FONTS, *fonts.UNKNOWN_FONTS):
        _, top, _, bottom = fonts.font_of(name, 24).getbbox("0123456789")
        assert abs(bottom - top - 24) <= 2, name


def test_unknown_fonts_are_not_trained():
    assert not set(fonts.UNKNOWN_FONTS) & {*fonts.FONTS, *fonts.MORE_FONTS}
    assert {name.split("/")[0] for name in fonts.UNKNOWN_FONTS}.isdisjoint(
        {str(name).split("/")[0] for name in fonts.MORE_FONTS}
    )


def test_a_missing_font_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="package font-manrope, which is missing: pip install font-manrope"):
        fonts.font_file("font_manrope/Manrope-Regular.ttf")


# ---- Questions


@pytest.mark.parametrize("scene", SCENES[:40])
def test_what_is_there_is_told_by_name(scene):
    there = named(scene)
    rng = random.Random(0)
    for _ in range(12):
        turn = ask(scene, "named", rng)
        if turn is not None:
            colour, kind = turn[1].split()[1:3]
            (shape,) = [shape for shape in scene.shapes if (shape.colour, shape.kind) == (colour, kind)]
            assert f"{colour} {kind}" in turn[0] and (" left." in turn[1]) == (shape.x < SIDE / 3)
        question, answer = ask(scene, "absent", rng)
        thing = answer.removeprefix("There is no ").rstrip(".")
        assert thing in question
        if thing == "number":
            assert not scene.prints
        else:
            assert thing not in {kind for _, kind in there} | {" ".join(both) for both in there}
        turn = ask(scene, "there", rng)
        if turn is not None:
            said = re.fullmatch(r"(Yes|No), there is (?:an?|no) (.+)\.", turn[1])
            thing = said[2]
            shown = (
                {kind for _, kind in there}
                | {" ".join(both) for both in there}
                | ({"number"} if scene.prints else set())
            )
            assert (thing in shown) == (said[1] == "Yes"), turn


def test_nobody_is_asked_for_an_unclear_place():
    asked = 0
    for scene in SCENES:
        for attempt in range(6):
            question, answer = ask(scene, "where", random.Random(attempt)) or ("", "")
            if "number" in question:
                asked += 1
                assert all(abs(at - edge) > 6 for at in (scene.print.x, scene.print.y) for edge in (64, 128))
    assert asked > 20


def test_shapes_alike_are_named_one_by_one():
    scene = next(scene for scene in SCENES if len(set(named(scene))) == 1 and len(scene.shapes) == 2)
    colour, kind = named(scene)[0]
    _, answer = ask(scene, "describe", random.Random(0))
    assert re.match(f"An? {colour} {kind}, another {colour} {kind} on a ", answer), answer
    assert count(kind, scene.shapes) == f"{answer.split(' on a ')[0]}: two {kind}s."
    # People wish for them together, and the wish is given on as they said it.
    assert wish([(kind, colour)] * 3, "pink") == f"three {colour} {kind}s on a pink background"


def test_wishes_come_in_any_order_and_are_answered_in_one():
    orders = set()
    for i in range(200):
        question, answer = asked_wish(random.Random(i))
        things = answer.removeprefix("<h>").split(" on a ")[0].split(", ")
        assert question.endswith(GEN) and all(thing in question for thing in things)
        places = [question.find(thing) for thing in things]
        orders.add(places == sorted(places))
        assert things == sorted(things, key=lambda thing: thing.split(" ", 1)[1].split(" ")[0])
    assert orders == {True, False}


# ---- Two pictures


def test_a_question_names_its_picture():
    assert about(1, ("What does the sign say?", "The number is 52.")) == (
        "What does the sign say in the second picture?",
        "In the second picture, the number is 52.",
    )
    assert about(0, ("Describe the picture.", "A red star on a pink background.")) == (
        "Describe the first picture.",
        "In the first picture, a red star on a pink background.",
    )
    assert about(0, ("Is there a star?", "Yes, there is a star.")) == (
        "Is there a star in the first picture?",
        "Yes, there is a star in the first picture.",
    )
    assert about(1, ("Draw this again. <GEN>", "<h>a</h>")) == ("Draw the second picture again. <GEN>", "<h>a</h>")
    with pytest.raises(ValueError, match="cannot name a picture"):
        about(1, ("What is this?", "A red star."))


def test_answers_are_about_the_picture_that_is_named():
    for i in range(0, 40, 2):
        pair = SCENES[i : i + 2]
        for which, (_, answer) in questions_about_both(pair, random.Random(i), (*MIXED, *NAMED), 8):
            if answer.startswith("The number is ") and " at " not in answer:
                assert answer == f"The number is {pair[which].print.text}."
            if answer == NO_NUMBER:
                assert pair[which].print is None
            if " on a " in answer:
                assert f" on a {pair[which].background} background" in answer


def test_a_conversation_brings_two_pictures_and_an_unnamed_question_is_about_the_newest():
    shown_at = set()
    for i in range(0, 80, 2):
        pair = SCENES[i : i + 2]
        said = conversation_about_two(pair, random.Random(i), 6, (*MIXED, *NAMED))
        tags = [question.count(IMAGE_TAG) for question, _ in said]
        assert sum(tags) == 2 and tags[0] >= 1 and len(said) <= 6
        second = 0 if tags[0] == 2 else tags.index(1, 1)
        shown_at.add(second)
        for at, (question, answer) in enumerate(said):
            if answer.startswith("The number is ") and " at the " not in answer and "first" not in question:
                assert answer == f"The number is {pair[at >= second].print.text}.", said
            if at < second:
                assert "first" not in question and "second" not in question
            else:
                assert tags[0] == 1 or "first picture" in question or "second picture" in question
    assert shown_at == {0, 1, 2}


def test_training_writes_two_pictures_as_the_pipeline_does(nano):
    """The ids of a training row are those of a conversation with the pipeline, up to the answer."""
    pair = SCENES[:2]
    question = "What does the sign say in the second picture?"
    ids, marks, answers = data.encode(nano.processor, [(f"{IMAGE_TAG}\n{IMAGE_TAG}\n{question}", "It.")])
    asked = nano.conversation().chat(question, [scene.image for scene in pair], max_new_tokens=1)
    assert asked.prompt_tokens == answers.index(1) and sum(marks) == 2 * data.CELLS
    prompt = nano.processor.encode(render("chatml_direct", [(f"{IMAGE_TAG}\n{IMAGE_TAG}\n{question}", None)]))[0]
    assert list(prompt) == list(ids[: answers.index(1)])


# ---- Batches


@pytest.mark.parametrize("lesson", [FACTS | {"cells": 8}, FACTS, TALK], ids=["few cells", "facts", "talk"])
def test_pictures_follow_one_another_in_the_order_of_their_marks(nano, lesson):
    batch = data.told(nano.processor, 3, 0, 8, **lesson, pictures=(0.0, 0.4, 0.6))
    cells = lesson["cells"]
    pictures = (batch["marks"].sum(1) // cells).tolist()
    assert set(pictures) == {1, 2} and sum(pictures) == len(batch["kind"]) == len(batch["cells"])
    first = compared = 0
    for row, shown in enumerate(pictures):
        text = nano.processor.tokenizer.decode(batch["ids"][row][batch["mask"][row] == 1])
        numbers = []
        for k in range(first, first + shown):
            digits = batch["digits"][k][batch["digits"][k][..., 0] != data.IGNORED]
            numbers.append("".join(str(int(d) - 1) for d in digits[0] if d > 0) if len(digits) else None)
        first += shown
        for which, ordinal in enumerate(("first", "second")[: shown if shown == 2 else 0]):
            told = text.split(f"In the {ordinal} picture, the number is ")[1:]
            read = [rest.split(".")[0] for rest in told if not rest.startswith("at ")]
            assert set(read) <= {numbers[which]}, text
            compared += len(read)
    assert compared


def test_image_tokens_are_asked_for_their_picture_and_for_shapes_alike(nano):
    batch = data.told(nano.processor, 3, 0, 12, **FACTS | {"cells": 8}, pictures=(0.0, 0.4, 0.6))
    order, alike = picture_numbers(batch), alike_numbers(batch)
    pictures = iter(range(len(batch["kind"])))
    seen = set()
    for row, marks in enumerate(batch["marks"]):
        at = torch.nonzero(marks)[:, 0].split(8)
        for which, tokens in enumerate(at):
            assert order[row, tokens].tolist() == [which if len(at) == 2 else -1] * 8
            k = next(pictures)
            shapes = []
            for token, cell in zip(tokens, batch["cells"][k]):
                shape = batch["kind"][k].flatten()[cell].item(), batch["colour"][k].flatten()[cell].item()
                assert alike[row, token] == (-1 if shape[1] == data.IGNORED else shapes.count(shape))
                shapes.append(shape)
                seen.add(alike[row, token].item())
        assert (order[row][marks == 0] == -1).all() and (alike[row][marks == 0] == -1).all()
    assert seen >= {-1, 0, 1}


def test_a_batch_may_have_no_picture(nano):
    batch = data.told(nano.processor, 0, 0, 3, **TALK, pictures=(1.0, 0.0, 0.0))
    assert not batch["marks"].any() and "kind" not in batch and batch["answers"].any()


def test_a_number_of_five_digits_has_a_label_for_each():
    scene = draw_varied(0, 2, numbers=1, digits=(5,))
    labels = data.label(scene.prints, scene.shapes, scene.background, SIDE)
    cell = int(scene.print.y // CELL), int(scene.print.x // CELL)
    assert labels["digits"][cell].tolist() == [1 + int(d) for d in scene.print.text] and MAX_DIGITS == 5


def test_an_answer_is_right_only_as_a_whole(nano):
    """The share of right answers that the log shows, against a count answer by answer."""
    batch = data.told(nano.processor, 4, 0, 4, **TALK, pictures=(1.0, 0.0, 0.0))
    content = {name: torch.tensor(ids) for name, ids in data.content_ids(nano.processor).items()}
    with torch.no_grad():
        seen = torch.zeros(0, nano.model.config.text_config.hidden_size)
        _, shares = chat_loss(nano.model, batch, content, seen)
        embeds = nano.model.get_input_embeddings()(batch["ids"])
        hidden = nano.model.model.language_model(inputs_embeds=embeds, attention_mask=batch["mask"]).last_hidden_state
        best = nano.model.lm_head(hidden).argmax(-1)
    right = []
    for ids, answers, said in zip(batch["ids"], batch["answers"], best):
        begins = [i for i in range(1, len(ids)) if answers[i] and not answers[i - 1]]
        for begin in begins:
            end = next(i for i in range(begin, len(ids) + 1) if i == len(ids) or not answers[i])
            right.append(bool((said[begin - 1 : end - 1] == ids[begin:end]).all()))
    assert len(right) >= 8 and shares["answer"] == pytest.approx(sum(right) / len(right))
