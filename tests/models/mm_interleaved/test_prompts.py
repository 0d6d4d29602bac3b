"""The prompts of every task are the original's, character by character, and boxes go to text and back."""

from pathlib import Path

import pytest

from mg_fast import PromptError
from mg_fast.models.mm_interleaved import prompts
from mg_fast.models.mm_interleaved.prompts import format_box, instruct, join_items, parse_boxes
from tests.models.mm_interleaved.recorded import requests

PICTURE, OTHER = Path("photo.png"), Path("other.png")
QUESTION, BOX = "What is on the table?", "(007,040)(512,998)"
# What the original recorded for each task, and our request.
ASKED = {
    "visual question (default)": prompts.question(PICTURE, QUESTION),
    "visual question (vizwiz)": prompts.question(PICTURE, QUESTION, may_be_unanswerable=True),
    "caption (default)": prompts.caption(PICTURE),
    "paragraph": prompts.paragraph(PICTURE),
    "text to picture": [*prompts.text_to_picture("a red boat"), PICTURE],
    "map to picture": [*prompts.map_to_picture(PICTURE, "a street"), OTHER],
    "grounding": prompts.grounding(PICTURE, "the red hat"),
    "referring": prompts.region_caption(PICTURE, BOX),
    "region_vqa": prompts.region_question(PICTURE, BOX, "What is it?"),
    "grounded_caption": prompts.grounded_caption(PICTURE),
}


def test_prompts_are_the_originals():
    recorded = {prompt["what"]: prompt["prompt"] for prompt in requests("mmi-tiny")["prompts"]}
    instructed = {
        f"{what} (instruction format)": instruct(ASKED[what])
        for what in ("grounding", "referring", "region_vqa", "grounded_caption")
    }
    assert recorded.keys() == (ASKED | instructed).keys()
    for what, items in (ASKED | instructed).items():
        expected = recorded[what].replace("<|beginofimage|>{image}", "<image>")
        # Blanks beside a picture mean nothing: the tokenizer drops them.
        expected = expected.replace(" <image>", "<image>").replace("<image> ", "<image>")
        assert join_items(items)[0] == expected, what


def test_prompts_that_only_ids_were_recorded_of():
    shown = prompts.few_shot([(PICTURE, "Is it?", "yes")], OTHER, "How many?")
    assert join_items(shown) == (
        "<image>Question: Is it? Short answer: yes<image>Question: How many? Short answer:",
        [PICTURE, OTHER],
    )
    told = prompts.few_shot([(None, "a?", "b"), (None, "c?", "d")], PICTURE, "e?")
    assert told == [
        "Question: a? Short answer: bQuestion: c? Short answer: d",
        PICTURE,
        "Question: e? Short answer:",
    ]
    asked = prompts.dialog(PICTURE, "a cat on a chair", [("is it old", "no")], "is it red")
    assert asked == [
        PICTURE,
        "caption: a cat on a chair. question: is it old? answer: no. question: is it red? answer:",
    ]
    assert prompts.map_to_picture(PICTURE, "a street", text_first=True) == ["a street.", PICTURE]
    assert prompts.story([("One.", PICTURE), ("Two.", None)]) == ["One.", PICTURE, "Two."]
    assert prompts.story([("One.", PICTURE)], picture_first=True) == [PICTURE, "One."]


def test_settings_of_tasks():
    assert prompts.SETTINGS["question"] == {"max_new_tokens": 10, "num_beams": 3, "length_penalty": 0.0}
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3}
    assert prompts.SETTINGS["story"] == {"max_new_tokens": 90, "min_new_tokens": 7, **sampled}
    beams = {"min_new_tokens": 89, "num_beams": 5, "length_penalty": 1.0, "repetition_penalty": 1.2}
    assert prompts.SETTINGS["paragraph"] == {"max_new_tokens": 90, **beams}


def test_boxes_go_to_text_and_back():
    assert format_box((70, 20, 512, 499.9), (1000, 500)) == "(069,039)(511,998)"
    assert format_box((0, 0, 1000, 500), (1000, 500)) == "(000,000)(999,999)"
    [box] = parse_boxes(BOX + "</box>", (640, 480))
    # Whole thousandths are cut, not rounded, so a box may shrink by one of them on its way back.
    assert all(abs(a - b) <= 640 / 999 for a, b in zip(box, parse_boxes(format_box(box, (640, 480)), (640, 480))[0]))
    found = parse_boxes("<ref>a hat</ref><box>(999,0)(0, 999)</box> and (1,2)", (10, 20))
    assert found == [(0, 0, 10, 20)]
    for wrong in ((1, 2, 3), (5, 0, 4, 1), (0, 0, 1001, 1), (0, float("nan"), 1, 1)):
        with pytest.raises(PromptError, match="expected a box"):
            format_box(wrong, (1000, 500))


@pytest.mark.parametrize(
    "items, message",
    [
        ("a text", "expected a list of texts and pictures"),
        ([], "got an empty one"),
        (["a", None], "item 2 of 2: expected a text or a picture, got None"),
        (["an <image>"], "item 1 of 1 holds <image>"),
        (["\ud800"], "item 1 of 1 cannot be encoded as UTF-8"),
    ],
)
def test_items_that_are_refused(items, message):
    with pytest.raises(PromptError, match=message):
        join_items(items)
