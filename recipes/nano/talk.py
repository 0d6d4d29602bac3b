"""The questions about a scene, in several phrasings, and the one right answer to each."""

import random
from collections.abc import Iterator, Sequence

from .scenes import BACKGROUNDS, COLOURS, KINDS, SIDE, THIRDS, WORDS, Scene, Shape

GEN = " <GEN>"
STYLE = "simple shapes, flat colours"
NO_NUMBER = "There is no number."

PHRASINGS = {
    "number": (
        "What does the sign say?",
        "What number is it?",
        "What is the number?",
        "Read the number.",
        "Which number is printed in the picture?",
        "Can you read the small print?",
        "What is written there?",
    ),
    "where": (
        "Where is the {}?",
        "In which part of the picture is the {}?",
        "Where do you see the {}?",
    ),
    "colour": (
        "What colour is the {}?",
        "What color is the {}?",
        "Which colour does the {} have?",
        "Tell me the colour of the {}.",
    ),
    "count": (
        "How many {} are there?",
        "How many {} do you see?",
        "How many {} are in the picture?",
        "Count the {}.",
    ),
    "background": (
        "What colour is the background?",
        "What color is the background?",
        "Which colour does the background have?",
        "Tell me the colour of the background.",
    ),
    "describe": (
        "Describe the picture.",
        "What is in the picture?",
        "What do you see?",
        "What is this?",
        "Tell me about the picture.",
    ),
    "draw": (
        "Draw this again.",
        "Draw the same picture.",
        "Make a picture like this.",
    ),
    "wish": (
        "Draw {}.",
        "Make a picture of {}.",
        "Please draw {}.",
        "I want a picture of {}.",
    ),
}
# Types of questions, each as many times as its relative frequency: those with short answers, all types, and the types
# that, beside the number, a description does not answer.
SHORT = ("number", "where", "where", "colour", "colour", "count", "count", "count", "background")
MIXED = (*SHORT, "describe", "describe", "draw")
PLACES = ("where",)
TEXT_ONLY = (
    ("Hello.", "Hello! Show me a picture."),
    ("Hi!", "Hello! Show me a picture."),
    ("Who are you?", "I am nano, a very small Mini-Gemini."),
    ("What can you do?", "I read small numbers and name simple shapes."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
)


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of one of `TYPES` and its answer, or None where the scene allows no question of that type."""
    phrase = rng.choice(PHRASINGS[kind])
    single = [k for k in KINDS if len(scene.of(k)) == 1]
    if kind == "number":
        return phrase, f"The number is {scene.print.text}." if scene.print else NO_NUMBER
    if kind == "where":
        things = [*single, *(["number"] * max(1, len(single)) if scene.print else [])]
        if not things:
            return None
        thing = rng.choice(things)
        found = scene.print if thing == "number" else scene.of(thing)[0]
        return phrase.format(thing), f"The {thing} is {region(found.x, found.y)}."
    if kind == "colour":
        if not single:
            return None
        thing = rng.choice(single)
        return phrase.format(thing), f"The {thing} is {scene.of(thing)[0].colour}."
    if kind == "count":
        # Most of the time, the kind is one that the scene contains.
        thing = rng.choice((*KINDS, "shape", *(shape.kind for shape in scene.shapes)))
        return phrase.format(thing + "s"), count(thing, scene.shapes if thing == "shape" else scene.of(thing))
    if kind == "background":
        return phrase, f"The background is {scene.background}."
    if kind == "describe":
        return phrase, _capital(describe(scene)) + "."
    return phrase + GEN, f"<h>{describe(scene)}, {STYLE}</h>"


def region(x: float, y: float) -> str:
    """Where a point lies, in words for the thirds of the picture, down and across."""
    return f"at the {THIRDS[0][int(3 * y / SIDE)]} {THIRDS[1][int(3 * x / SIDE)]}"


def count(thing: str, shapes: Sequence[Shape]) -> str:
    """How many shapes of one kind there are. Each shape is named before the number is said.

    A small model counts its own words, not pixels.
    """
    if not shapes:
        return f"There are {WORDS[0]} {thing}s."
    named = _listed([(shape.kind, shape.colour) for shape in shapes])
    return f"{_capital(named)}: {WORDS[len(shapes)]} {thing}{'' if len(shapes) == 1 else 's'}."


def describe(scene: Scene) -> str:
    """All that is in a scene except the digits of the print, in one fixed order."""
    return wish([(shape.kind, shape.colour) for shape in scene.shapes], scene.background, scene.print is not None)


def wish(shapes: list[tuple[str, str]], background: str, number: bool = False) -> str:
    """Shapes (kind, colour) on a background, in words, with a mention of a number if there is one."""
    return f"{_listed(shapes) if shapes else 'nothing'} on a {background} background{', with a number' * number}"


def _listed(shapes: list[tuple[str, str]]) -> str:
    """Shapes (kind, colour) in words, equal ones together, in one fixed order.

    The order is that of the words, colour before kind, and no "and" stands before the last: a small model predicts the
    next word well, but not what comes two things later.
    """
    named = []
    for colour, kind in sorted({(colour, kind) for kind, colour in shapes}):
        number = shapes.count((kind, colour))
        named.append(
            f"a{'n' * (colour == 'orange')} {colour} {kind}" if number == 1 else f"{WORDS[number]} {colour} {kind}s"
        )
    return ", ".join(named)


def _capital(said: str) -> str:
    return said[0].upper() + said[1:]


def text_only(rng: random.Random) -> tuple[str, str]:
    """A turn without a picture: small talk, or a request for a drawing."""
    if rng.random() < 0.2:
        return rng.choice(TEXT_ONLY)
    shapes = [(rng.choice(KINDS), rng.choice(list(COLOURS))) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    said = wish(shapes, rng.choice(list(BACKGROUNDS)))
    # Requests may have an "and", as people say it, but always keep the answer's order: other orders are not learned.
    asked = " and ".join(said.rsplit(", ", 1)) if rng.random() < 0.5 else said
    return rng.choice(PHRASINGS["wish"]).format(asked) + GEN, f"<h>{said}, {STYLE}</h>"


def careless(question: str, rng: random.Random) -> str:
    """The question as people type it: sometimes without a capital, sometimes without a mark at the end."""
    if rng.random() < 0.3:
        question = question[0].lower() + question[1:]
    body, marker, _ = question.partition(GEN)
    if rng.random() < 0.3:
        body = body.rstrip("?.")
    return body + marker


def conversation(
    scene: Scene, rng: random.Random, turns: int = 4, *, others: Sequence[str] = MIXED
) -> list[tuple[str, str]]:
    """A conversation about a scene: the question for the number early or late, other questions in any order.

    No answer is given twice.

    Args:
        turns: the largest number of turns.
        others: the types of the questions other than that for the number.
    """
    kinds = ["number", *rng.choices(others, k=turns - 1)]
    rng.shuffle(kinds)
    asked = {turn[1]: turn for turn in (ask(scene, kind, rng) for kind in kinds) if turn is not None}
    return [(careless(question, rng), answer) for question, answer in asked.values()]


def bare(question: str, answer: str) -> tuple[str, str]:
    """The text that stands before an answer where answers follow one another, and the answer.

    Nothing stands before an answer that names its subject before what it says about it. For counts and places, the
    question stands before the answer, because they name their subject too late ("A red circle" may begin the count of
    circles or of shapes, "The circle is" may lead to a colour).
    """
    counts = ": " in answer or answer.startswith(f"There are {WORDS[0]} ")
    asks = counts or " is at the " in answer
    return (question, answer) if asks else ("", answer)


def every_sentence() -> Iterator[str]:
    """Sentences with every word and every phrasing of this language, from which the tokenizer is made."""
    for kind, phrases in PHRASINGS.items():
        for phrase in phrases:
            things = {"where": (*KINDS, "number"), "colour": KINDS, "count": [k + "s" for k in (*KINDS, "shape")]}.get(
                kind, ("nothing",)
            )
            for thing in things:
                yield phrase.format(thing)
                yield phrase.format(thing)[0].lower() + phrase.format(thing)[1:]
    for question, answer in TEXT_ONLY:
        yield question
        yield answer
    rng = random.Random("sentences")
    for background in BACKGROUNDS:
        yield f"The background is {background}."
        for kind in KINDS:
            for colour in COLOURS:
                yield f"The {kind} is {colour}."
                for number in (False, True):
                    yield wish([(kind, colour)] * rng.randint(1, 4), background, number) + f", {STYLE}"
    for thing in (*KINDS, "number"):
        for x in (0, SIDE / 2, SIDE - 1):
            for y in (0, SIDE / 2, SIDE - 1):
                yield f"The {thing} is {region(x, y)}."
    for thing in (*KINDS, "shape"):
        for number in range(len(WORDS)):
            some = rng.sample(list(COLOURS), number)
            yield count(
                thing, [Shape(rng.choice(KINDS) if thing == "shape" else thing, colour, 0, 0, 0) for colour in some]
            )
    # "and" occurs only in requests for drawings.
    yield from (text_only(rng)[0] for _ in range(100))
    yield from (NO_NUMBER, *(f"The number is {number}." for number in range(10, 100)))
