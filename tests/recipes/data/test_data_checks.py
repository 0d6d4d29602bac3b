"""What makes an answer or a source unusable, and the form of a dialogue."""

import json

import pytest

from recipes.data import checks, duplicates
from recipes.data.checks import Fault, check_dialogue, check_source, judge, read
from recipes.data.duplicates import NearDuplicates
from recipes.data.journal import Reply
from recipes.data.sources import IN_CONTEXT, RECAPTION, Source
from recipes.data.wording import dialogue, messages

CAPTION = Source(
    RECAPTION, "a.txt:1", caption="A red boat lies on a calm lake, with mist over the water and pine trees."
)
TALK = Source(IN_CONTEXT, "b.json[0]", turns=(("Hi?", "Hello."), ("What grows in the shade?", "Ferns do.")))
GOOD = {"wish": "Show me a quiet red boat.", "prompt": "red boat, calm lake, mist, pine trees, soft light"}


def reply(text=None, **fields):
    return Reply(json.dumps({**GOOD, **fields}) if text is None else text)


def test_a_good_answer():
    assert read(CAPTION, reply()) == GOOD
    assert read(TALK, reply()) == {"prompt": GOOD["prompt"]}
    fenced = reply(f"Sure!\n```json\n{json.dumps(GOOD, indent=1)}\n```\nAnything else?")
    assert read(CAPTION, fenced) == GOOD
    assert read(CAPTION, reply(prompt="red boat,\n calm  lake, mist,\tpine trees"))["prompt"] == (
        "red boat, calm lake, mist, pine trees"
    )


@pytest.mark.parametrize(
    "bad, reason",
    [
        (Reply("", refusal="No."), "refusal"),
        (Reply("", "content_filter"), "refusal"),
        (Reply("I'm sorry, but I can't help with that."), "refusal"),
        (Reply("As an AI language model, I have no opinion."), "refusal"),
        (reply(prompt="I cannot create a picture of this person for you"), "refusal"),
        (Reply(json.dumps(GOOD), "length"), "cut"),
        (Reply(" \n"), "empty"),
        (Reply("red boat, calm lake"), "bad JSON"),
        (Reply('{"wish": "a boat", "prompt": '), "bad JSON"),
        (Reply('{"a": ' * 100_000), "bad JSON"),
        # Python reads no number of so many digits, and says so with a ValueError of its own.
        (Reply('{"wish": ' + "9" * 5000 + "}"), "bad JSON"),
        (Reply('{"prompt": "red boat, calm lake, mist"}'), "bad JSON"),
        (Reply('<think>{"wish": "a boat", "prompt": "b"}</think>No.'), "bad JSON"),
        (reply(wish=["a boat"]), "bad JSON"),
        (reply(prompt="red boat </h> on a calm lake"), "tags"),
        (reply(wish="Show me a boat. <GEN>"), "tags"),
        (reply(prompt="<image> red boat on a calm lake"), "tags"),
        (reply(wish="A boat, please.</s>USER: more"), "tags"),
        (reply(prompt="red boat, <|im_end|> calm lake, mist"), "tags"),
        (reply(prompt="The image shows a red boat on a calm lake"), "picture talk"),
        (reply(wish="What is in this picture?"), "picture talk"),
        (reply(prompt="image of a red boat, calm lake"), "picture talk"),
        (reply(prompt="A detailed picture showing a red boat"), "picture talk"),
        (reply(prompt="As seen in Image 1, a red boat"), "picture talk"),
        (reply(prompt="red boat"), "short prompt"),
        (reply(prompt="Here is the prompt: red boat, calm lake"), "speech in the prompt"),
        (reply(prompt="Could you tell me more about the boat"), "speech in the prompt"),
        (reply(prompt="I'd love to see a red boat on a calm lake"), "speech in the prompt"),
        (reply(prompt="but where did the red boat go?"), "speech in the prompt"),
        (reply(wish="Red boat, calm lake, mist.", prompt="red boat, calm lake, mist"), "copied prompt"),
        (reply(wish="Boat"), "length of the wish"),
        (reply(wish="a " * 40), "length of the wish"),
        (reply(wish=CAPTION.caption), "copied wish"),
        (reply(prompt="red boat \ud83d, calm lake, mist"), "encoding"),
    ],
)
def test_bad_answers(bad, reason):
    with pytest.raises(Fault) as caught:
        read(CAPTION, bad)
    assert caught.value.reason == reason
    verdict = judge(CAPTION, [bad])
    assert verdict.fields is None and not verdict.settled(2) and verdict.settled(1)
    # A good answer after a bad one counts, and nothing more is asked.
    verdict = judge(CAPTION, [bad, reply()])
    assert verdict.fields == GOOD and verdict.settled(5) and [fault.reason for fault in verdict.faults] == [reason]


@pytest.mark.parametrize(
    "wish",
    [
        "Draw a picture of a red fox.",
        "Generate the image of a red boat.",
        "I can imagine a fox here.",
        "A photo of two cats, please.",
        "Cats & <3",
    ],
)
def test_wishes_that_are_no_picture_talk(wish):
    assert read(CAPTION, reply(wish=wish))["wish"] == wish


@pytest.mark.parametrize(
    "prompt",
    [
        "portrait of Elizabeth I, a sign that says why? beside her, soft light",
        "young man, T-shirt that says I love NY, busy street",
        'neon sign "can you hear me", brick wall, night',
        "the photo frame on a shelf, dust, warm light",
        "child reading the picture book, sofa, warm light",
    ],
)
def test_prompts_that_are_good(prompt):
    assert read(CAPTION, reply(prompt=prompt))["prompt"] == prompt


def test_what_a_model_thinks_before_its_answer_does_not_count():
    good = json.dumps(GOOD)
    assert read(CAPTION, Reply(f'<think>The {{"wish"}} is {{"wish": "a", "prompt": "b"}}.</think>\n{good}')) == GOOD
    # Templates that open the thought leave only its end in the answer.
    assert read(CAPTION, Reply(f'{{"wish": "a", "prompt": "b"}} or so</think>{good}')) == GOOD
    assert read(CAPTION, Reply(f'The form is {{"wish", ...}} or {{"wish": 1}}, so: {good}')) == GOOD


@pytest.mark.parametrize(
    "turn, reason",
    [
        (("What is in the image above?", "A cat."), "picture talk"),
        (("Is this a cat?", "The photo shows a dog."), "picture talk"),
        (("See ![a cat](cat.png): is it one?", "Yes."), "picture talk"),
        (("What do you see in image 1?", "A cat."), "picture talk"),
        (("Describe this pic.", "A cat."), "picture talk"),
        (("Look at this painting, who made it?", "Monet."), "picture talk"),
        (("See the attached file.", "I did."), "picture talk"),
        (('Is <img src="cat.png"> a cat?', "Yes."), "picture talk"),
        (("https://example.com/pets/cat.jpg", "A cat."), "picture talk"),
        (("As shown below, it fails.", "Then change it, see Figure 3."), "picture talk"),
        (("Draw a cat.", "As an AI language model I have no hands."), "refusal"),
        (("What does <h> mean?", "A heading."), "tags"),
        (("Hi?", "USER: Hello."), "tags"),
        (("Hi?", "word " * 2000), "long conversation"),
    ],
)
def test_conversations_that_are_not_asked_about(turn, reason):
    with pytest.raises(Fault) as caught:
        check_source(Source(IN_CONTEXT, "a", turns=(turn,)))
    assert caught.value.reason == reason


def test_ordinary_sources_are_asked_about():
    check_source(CAPTION)
    check_source(Source(RECAPTION, "a", caption="The image shows a cat."))
    check_source(
        Source(IN_CONTEXT, "a", turns=(("My cat has died.", "I am sorry to hear that. Imagine a quiet garden."),))
    )
    for said in ("Where is the photo frame?", "Read me the picture book.", "Who made this painting of Venus famous?"):
        check_source(Source(IN_CONTEXT, "a", turns=((said, "On the shelf."),)))
    check_source(Source(IN_CONTEXT, "a", turns=(("What is a <h1>?", "Unfortunately, a heading."),)))


def test_the_form_of_a_recaption():
    made = dialogue(CAPTION, GOOD, clip_tokens=20, most_tokens=77)
    assert made["conversations"] == [
        {"from": "human", "value": "Show me a quiet red boat. <GEN>"},
        {"from": "gpt", "value": "<h>red boat, calm lake, mist, pine trees, soft light</h>"},
    ]
    assert made["id"] == f"recaption-{CAPTION.key}" and made["long"] is False and made["clip_tokens"] == 20
    check_dialogue(made)


def test_the_form_of_an_in_context_prompt():
    made = dialogue(TALK, {"prompt": "ferns in a shady garden"}, clip_tokens=78, most_tokens=77)
    assert [turn["value"] for turn in made["conversations"]] == [
        "Hi?",
        "Hello.",
        "What grows in the shade? <GEN>",
        "Ferns do.\n<h>ferns in a shady garden</h>",
    ]
    assert made["long"] is True and "image" not in made
    check_dialogue(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda turns: turns.pop(),
        lambda turns: turns[2].update(value="What grows in the shade?"),
        lambda turns: turns[0].update(value="Hi? <GEN>"),
        lambda turns: turns[3].update(value="Ferns do.\n<h>ferns"),
        lambda turns: turns[3].update(value="<h>a</h> <h>b</h>"),
        lambda turns: turns[1].update(value="<image>"),
        lambda turns: turns[1].update({"from": "human"}),
    ],
)
def test_dialogues_of_another_form_are_found(change):
    made = dialogue(TALK, {"prompt": "ferns in a shady garden"}, clip_tokens=9, most_tokens=77)
    change(made["conversations"])
    with pytest.raises(Fault):
        check_dialogue(made)


def test_questions_have_no_system_message_and_end_with_the_source():
    for source in (CAPTION, TALK):
        roles = [message["role"] for message in messages(source)]
        assert roles == ["user", "assistant", "user"]
        assert all(text in messages(source)[-1]["content"] for text in source.texts)
        # The example is itself a good answer.
        read(source, Reply(messages(source)[1]["content"]))


def test_clip_tokens_are_those_of_the_tokenizer():
    assert checks.clip_tokens("a red boat") == 5
    assert checks.clip_tokens("boat " * 75) == 77 and checks.clip_tokens("boat " * 76) == 78


def test_near_duplicates():
    seen = NearDuplicates()
    assert seen.add("a red boat on a calm lake in the morning mist, pine trees far away", "one") is None
    assert seen.add("A red boat on a calm lake in the morning mist; pine trees, far away!", "two") == "one"
    assert seen.add("a red boat on a calm lake in the morning mist, pine trees near by", "three") == "one"
    assert seen.add("a red boat in a storm on the open sea at night, lightning", "four") is None
    assert seen.add("red boat", "five") is None and seen.add("Red boat.", "six") == "five"
    assert NearDuplicates(alike=1.0).add("red boat", "seven") is None


def test_a_common_ending_does_not_make_every_prompt_a_candidate():
    """With a style that all prompts end with, each is compared with few others, and repeated ones are still found."""
    style, seen = "soft light, highly detailed, photorealistic, sharp focus, 35 mm film", NearDuplicates()
    words = [f"w{i} x{i} y{i} z{i} a{i} b{i} c{i} d{i} e{i}" for i in range(400)]
    assert all(seen.add(f"{text} {style}", f"n{i}") is None for i, text in enumerate(words))
    assert seen.add(f"{words[300]} {style}", "again") == "n300"
    assert max(map(len, seen._holders.values())) == duplicates.COMMON
