"""The questions about a scene, in several phrasings, and the one right answer to each."""

import random
from collections.abc import Iterator, Sequence

from .scenes import BACKGROUNDS, COLOURS, KINDS, SIDE, THIRDS, WORDS, Scene, Shape

GEN = " <GEN>"
STYLE = "simple shapes, flat colours"
NO_NUMBER = "There is no number."
# How near to the border between two thirds of the picture nobody is asked where a number lies, in pixels of 192.
UNCLEAR = 6.5

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
    "there": (
        "Is there {}?",
        "Do you see {}?",
        "Is there {} in the picture?",
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
# Questions that name a shape by its colour, ask whether there is one, or ask about something that is not there.
NAMED = ("named", "named", "there", "absent", "absent")
TEXT_ONLY = (
    ("Hello.", "Hello! Show me a picture."),
    ("Hi!", "Hello! Show me a picture."),
    ("Who are you?", "I am nano, a very small Mini-Gemini."),
    ("What can you do?", "I read small numbers and name simple shapes."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
)


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question and its answer, or None where the scene allows no question of that type.

    Args:
        kind: one of `TYPES` or of `NAMED`.
    """
    if kind in NAMED:
        return _ask_by_name(scene, kind, rng)
    phrase = rng.choice(PHRASINGS[kind])
    single = [k for k in KINDS if len(scene.of(k)) == 1]
    if kind == "number":
        return phrase, f"The number is {scene.print.text}." if scene.print else NO_NUMBER
    if kind == "where":
        sign = scene.print
        # Varied scenes also print numbers so near to the border between two thirds that there is no right answer.
        told = sign is not None and all(abs(at - SIDE * i / 3) > UNCLEAR for at in (sign.x, sign.y) for i in (1, 2))
        things = [*single, *(["number"] * max(1, len(single)) if told else [])]
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


def _ask_by_name(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of one of the types in `NAMED` and its answer, or None."""
    there = [(shape.colour, shape.kind) for shape in scene.shapes]
    if kind == "named":
        single = [shape for shape in scene.shapes if there.count((shape.colour, shape.kind)) == 1]
        if not single:
            return None
        shape = rng.choice(single)
        named = f"{shape.colour} {shape.kind}"
        return rng.choice(PHRASINGS["where"]).format(named), f"The {named} is {region(shape.x, shape.y)}."
    if kind == "there" and rng.random() < 0.5:
        things = [f"{colour} {shape}" for colour, shape in there] + [shape for _, shape in there]
        things += ["number"] * (1 + len(there)) if scene.print else []
        if not things:
            return None
        thing = with_article(rng.choice(things))
        return rng.choice(PHRASINGS["there"]).format(thing), f"Yes, there is {thing}."
    thing = _absent(scene, rng)
    if kind == "there":
        return rng.choice(PHRASINGS["there"]).format(with_article(thing)), f"No, there is no {thing}."
    asks = "colour" if thing in KINDS and rng.random() < 0.5 else "where"
    return rng.choice(PHRASINGS[asks]).format(thing), f"There is no {thing}."


def _absent(scene: Scene, rng: random.Random) -> str:
    """Something that the scene does not show: a kind, a kind in a colour, or the number."""
    there = {(shape.colour, shape.kind) for shape in scene.shapes}
    kinds = {kind for _, kind in there}
    if scene.print is None and rng.random() < 0.3:
        return "number"
    if len(kinds) < len(KINDS) and rng.random() < 0.4:
        return rng.choice([kind for kind in KINDS if kind not in kinds])
    others = [(colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) not in there]
    # Most of the time its colour, its kind or both are there, in other shapes. That is the hardest to deny.
    colours = {colour for colour, _ in there}
    near = [(colour, kind) for colour, kind in others if colour in colours or kind in kinds]
    both = [(colour, kind) for colour, kind in near if colour in colours and kind in kinds]
    return " ".join(rng.choice(rng.choice([some for some in (others, near, both) if some])))


def with_article(thing: str) -> str:
    """The thing with "a" or "an" before it."""
    return f"a{'n' * (thing[0] in 'aeiou')} {thing}"


def region(x: float, y: float) -> str:
    """Where a point lies, in words for the thirds of the picture, down and across."""
    return f"at the {THIRDS[0][int(3 * y / SIDE)]} {THIRDS[1][int(3 * x / SIDE)]}"


def count(thing: str, shapes: Sequence[Shape]) -> str:
    """How many shapes of one kind there are. Each shape is named before the number is said.

    A small model counts its own words, not pixels.
    """
    if not shapes:
        return f"There are {WORDS[0]} {thing}s."
    named = _one_by_one([(shape.kind, shape.colour) for shape in shapes])
    return f"{_capital(named)}: {WORDS[len(shapes)]} {thing}{'' if len(shapes) == 1 else 's'}."


def describe(scene: Scene) -> str:
    """All that is in a scene except the digits of the print, in one fixed order."""
    return described([(shape.kind, shape.colour) for shape in scene.shapes], scene.background, scene.print is not None)


def described(shapes: list[tuple[str, str]], background: str, number: bool = False) -> str:
    """Shapes (kind, colour) on a background, as nano describes a picture: shapes that are alike one by one."""
    return _on(_one_by_one(shapes), background, number)


def wish(shapes: list[tuple[str, str]], background: str, number: bool = False) -> str:
    """Shapes (kind, colour) on a background, as people wish for them: shapes that are alike together."""
    return _on(", ".join(together(shapes)), background, number)


def _on(things: str, background: str, number: bool) -> str:
    return f"{things or 'nothing'} on a {background} background{', with a number' * number}"


def _one_by_one(shapes: list[tuple[str, str]]) -> str:
    """Shapes (kind, colour) in words, in one fixed order; a second one that is alike is "another".

    The order is that of the words, colour before kind, and no "and" stands before the last: a small model predicts the
    next word well, but not what comes two things later. This is why it does not say "two red stars": at the "two" it
    would have to know of the stars and of their number at once.
    """
    ordered = sorted((colour, kind) for kind, colour in shapes)
    return ", ".join(
        f"another {colour} {kind}" if (colour, kind) in ordered[:i] else with_article(f"{colour} {kind}")
        for i, (colour, kind) in enumerate(ordered)
    )


def together(shapes: list[tuple[str, str]]) -> list[str]:
    """Shapes (kind, colour) in words, in the same order, and those that are alike together."""
    named = []
    for colour, kind in sorted({(colour, kind) for kind, colour in shapes}):
        number = shapes.count((kind, colour))
        named.append(with_article(f"{colour} {kind}") if number == 1 else f"{WORDS[number]} {colour} {kind}s")
    return named


def _capital(said: str) -> str:
    return said[0].upper() + said[1:]


def text_only(rng: random.Random) -> tuple[str, str]:
    """A turn without a picture: small talk, or a request for a drawing."""
    if rng.random() < 0.2:
        return rng.choice(TEXT_ONLY)
    return asked_wish(rng)


def asked_wish(rng: random.Random) -> tuple[str, str]:
    """A request for a drawing, with its shapes in any order, and the answer, which has them in nano's own order."""
    shapes = [(rng.choice(KINDS), rng.choice(list(COLOURS))) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))]
    background, number = rng.choice(list(BACKGROUNDS)), rng.random() < 0.2
    things = together(shapes)
    rng.shuffle(things)
    listed = ", ".join(things)
    # About half of the people say "and" before the last shape.
    asked = _on(" and ".join(listed.rsplit(", ", 1)) if rng.random() < 0.5 else listed, background, number)
    return rng.choice(PHRASINGS["wish"]).format(asked) + GEN, f"<h>{wish(shapes, background, number)}, {STYLE}</h>"


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
    denies = "here is no " in answer and answer != NO_NUMBER
    asks = counts or denies or answer.startswith("Yes, ") or " is at the " in answer
    return (question, answer) if asks else ("", answer)


def every_sentence() -> Iterator[str]:
    """Sentences with every word and every phrasing of this language, from which the tokenizer is made."""
    kinds = {"where": (*KINDS, "number"), "colour": KINDS, "count": [kind + "s" for kind in (*KINDS, "shape")]}
    kinds["there"] = [with_article(kind) for kind in (*KINDS, "number")]
    for kind, phrases in PHRASINGS.items():
        for phrase in phrases:
            for thing in kinds.get(kind, ("nothing",)):
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
                    shapes = [(kind, colour)] * rng.randint(1, 6)
                    yield wish(shapes, background, number) + f", {STYLE}"
                    yield described(shapes, background, number)
                    yield count(kind, [Shape(*shape, 0, 0, 0) for shape in shapes])
                yield f"No, there is no {colour} {kind}."
                yield f"Yes, there is {with_article(f'{colour} {kind}')}."
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
    # Questions that name one of two pictures.
    for kind in ("number", "where", "describe"):
        for phrase in PHRASINGS[kind]:
            for ordinal in ("first", "second"):
                yield f"{phrase.format('number')} In the {ordinal} picture, there is a number."
    # "and" occurs only in requests for drawings.
    yield from (text_only(rng)[0] for _ in range(100))
    yield from (NO_NUMBER, *(f"The number is {number}." for number in range(10, 100)))
