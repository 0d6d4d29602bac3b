"""What is asked about a scene, in several phrasings, and the one right answer to each."""

import random
from collections.abc import Iterator

from .scenes import BACKGROUNDS, COLOURS, KINDS, SIDE, WORDS, Scene

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
TEXT_ONLY = (
    ("Hello.", "Hello! Show me a picture."),
    ("Hi!", "Hello! Show me a picture."),
    ("Who are you?", "I am nano, a very small Mini-Gemini."),
    ("What can you do?", "I read small numbers and name simple shapes."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
)


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of one of `TYPES`, and its answer; None where the scene allows none of that type."""
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
        # one that is there, most of the time
        thing = rng.choice((*KINDS, "shape", *(shape.kind for shape in scene.shapes)))
        number = len(scene.shapes) if thing == "shape" else len(scene.of(thing))
        return phrase.format(thing + "s"), f"There {'is' if number == 1 else 'are'} {WORDS[number]} {thing}{'' if number == 1 else 's'}."
    if kind == "background":
        return phrase, f"The background is {scene.background}."
    if kind == "describe":
        said = describe(scene)
        return phrase, said[0].upper() + said[1:] + "."
    return phrase + GEN, f"<h>{describe(scene)}, {STYLE}</h>"


def region(x: float, y: float) -> str:
    """Where a point lies, in words: the picture's thirds."""
    down, across = int(3 * y / SIDE), int(3 * x / SIDE)
    if (down, across) == (1, 1):
        return "in the middle"
    if down == 1:
        return f"on the {('left', '', 'right')[across]}"
    return f"at the {('top', '', 'bottom')[down]}{(' left', '', ' right')[across]}"


def describe(scene: Scene) -> str:
    """All that is in a scene but the print's own digits, in one fixed order."""
    return wish([(shape.kind, shape.colour) for shape in scene.shapes], scene.background, scene.print is not None)


def wish(shapes: list[tuple[str, str]], background: str, number: bool = False) -> str:
    """Shapes (kind, colour) on a background, in words."""
    parts = []
    for kind, colour in sorted(set(shapes)):
        count = shapes.count((kind, colour))
        parts.append(f"a{'n' * (colour == 'orange')} {colour} {kind}" if count == 1 else f"{WORDS[count]} {colour} {kind}s")
    if number:
        parts.append("a number")
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) if parts else "nothing"
    return f"{listed} on a {background} background"


def text_only(rng: random.Random) -> tuple[str, str]:
    """A turn without a picture: small talk, or a wish for a drawing."""
    if rng.random() < 0.2:
        return rng.choice(TEXT_ONLY)
    shapes = [(rng.choice(KINDS), rng.choice(list(COLOURS))) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    said = wish(shapes, rng.choice(list(BACKGROUNDS)))
    return rng.choice(PHRASINGS["wish"]).format(said) + GEN, f"<h>{said}, {STYLE}</h>"


def careless(question: str, rng: random.Random) -> str:
    """The question as people type it: some without a capital, some without a mark at the end."""
    if rng.random() < 0.3:
        question = question[0].lower() + question[1:]
    body, marker, _ = question.partition(GEN)
    if rng.random() < 0.3:
        body = body.rstrip("?.")
    return body + marker


def conversation(scene: Scene, rng: random.Random, turns: int = 4, *, short: bool = False) -> list[tuple[str, str]]:
    """A conversation about a scene: the number early or late, other questions in any order, none with an answer that was given before.

    Args:
        turns: at most so many.
        short: nothing is described or drawn, which would tell what later questions ask for.
    """
    others = ["number", "where", "where", "colour", "colour", "count", "count", "count", "background"]
    kinds = ["number", *rng.choices(others if short else [*others, "describe", "describe", "draw"], k=turns - 1)]
    rng.shuffle(kinds)
    asked = {turn[1]: turn for turn in (ask(scene, kind, rng) for kind in kinds) if turn is not None}
    return [(careless(question, rng), answer) for question, answer in asked.values()]


def bare(question: str, answer: str) -> tuple[str, str]:
    """What goes before an answer among answers alone, and the answer.

    Nothing goes before answers that say what they are about before what they say of it. Counts and places do not ("There are two circles.";
    "The circle is" may as well lead to a colour): their questions go before them.
    """
    asks = (answer.startswith("There ") and answer != NO_NUMBER) or any(f" is {at} the " in answer for at in ("at", "on", "in"))
    return (question, answer) if asks else ("", answer)


def every_sentence() -> Iterator[str]:
    """Sentences that hold every word and every phrasing of this language: what the tokenizer is made from."""
    for kind, phrases in PHRASINGS.items():
        for phrase in phrases:
            things = {"where": (*KINDS, "number"), "colour": KINDS, "count": [k + "s" for k in (*KINDS, "shape")]}.get(kind, ("nothing",))
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
                yield wish([(kind, colour)] * rng.randint(1, 4), background, number=True) + f", {STYLE}"
    for thing in (*KINDS, "number"):
        for x in (0, SIDE / 2, SIDE - 1):
            for y in (0, SIDE / 2, SIDE - 1):
                yield f"The {thing} is {region(x, y)}."
    for thing in (*KINDS, "shape"):
        for count, word in enumerate(WORDS):
            yield f"There {'is' if count == 1 else 'are'} {word} {thing}{'' if count == 1 else 's'}."
    yield from (NO_NUMBER, *(f"The number is {number}." for number in range(10, 100)))
