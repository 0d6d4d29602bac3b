"""The evaluation's questions beyond those of ordinary scenes: varied scenes, two pictures, and wishes in any order."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from .fonts import FONTS, MORE_FONTS, UNKNOWN_FONTS
from .pairs import UNNAMEABLE, about
from .scenes import DIGITS, PRINT_HEIGHT, Scene
from .talk import PHRASINGS, ask, asked_wish, careless, count
from .varied import HEIGHTS, draw_varied

# What is asked about one of two pictures.
OF_TWO = ("number", "number", "where", "colour", "count", "background", "describe")


class VariedQuestion(NamedTuple):
    """A question, with what was said and shown before it.

    Attributes:
        number: the number of the question among those of its kind.
        kind: what the answer counts for, one of `VARIED_KINDS`.
        turns: the turns of the conversation, each a text and the pictures that come with it. Only the answer to the
            last one counts.
        answer: the one right answer to the last turn.
    """

    number: int
    kind: str
    turns: list[tuple[str, list[Image.Image]]]
    answer: str


def varied_questions(seed: int, first: int, last: int) -> Iterator[VariedQuestion]:
    """The questions `first` to `last - 1` of every kind, about unseen scenes. A few scenes allow no question."""
    for i in range(first, last):
        for kind, make in VARIED_KINDS.items():
            rng = random.Random(f"{kind}/{seed}/{i}")
            # Every question has scenes of its own.
            made = make(rng, int.from_bytes(rng.randbytes(4), "big"), i)
            if made is not None:
                yield VariedQuestion(i, kind, *made)


Made = tuple[list[tuple[str, list[Image.Image]]], str] | None


def _one(scene: Scene, turn: tuple[str, str] | None) -> Made:
    return None if turn is None else ([(turn[0], [scene.image])], turn[1])


def _asking(kind: str) -> Callable[[random.Random, int, int], Made]:
    """A question of one type about any varied scene."""

    def make(rng: random.Random, seed: int, i: int) -> Made:
        scene = draw_varied(seed, i, split="unseen")
        return _one(scene, ask(scene, kind, rng))

    return make


def _no_shapes(rng: random.Random, seed: int, i: int) -> Made:
    scene = draw_varied(seed, i, split="unseen", shapes=0)
    return _one(scene, ask(scene, rng.choice(("describe", "count", "draw")), rng))


def _alike(rng: random.Random, seed: int, i: int) -> Made:
    """A description, a count or a wish where two shapes or more are alike."""
    scene = draw_varied(seed, i, split="unseen", shapes=rng.choice((2, 3, 4)), alike=True)
    alike = [
        shape
        for shape in scene.shapes
        if [(s.kind, s.colour) for s in scene.shapes].count((shape.kind, shape.colour)) > 1
    ]
    if not alike:
        return None
    asks = rng.choice(("describe", "count", "draw"))
    if asks != "count":
        return _one(scene, ask(scene, asks, rng))
    kind = alike[0].kind
    return _one(scene, (rng.choice(PHRASINGS["count"]).format(kind + "s"), count(kind, scene.of(kind))))


def _many(rng: random.Random, seed: int, i: int) -> Made:
    scene = draw_varied(seed, i, split="unseen", shapes=rng.choice((5, 6)), alike=False)
    return _one(scene, ask(scene, "describe", rng)) if len(scene.shapes) >= 5 else None


def _of_two(which: int | None) -> Callable[[random.Random, int, int], Made]:
    """A question about the first (0) or second (1) picture, or, without a name, about the newest (None).

    Half of the named questions come with both pictures at once; all others come with the second picture, after a
    question about the first one.
    """

    def make(rng: random.Random, seed: int, i: int) -> Made:
        scenes = [draw_varied(seed, 2 * i + k, split="unseen") for k in range(2)]
        turn = None
        while turn is None or turn[0] in UNNAMEABLE:
            turn = ask(scenes[1 if which is None else which], rng.choice(OF_TWO), rng)
        question, answer = turn if which is None else about(which, turn)
        if which is not None and i % 2:
            return [(question, [scene.image for scene in scenes])], answer
        before = ask(scenes[0], rng.choice(("number", "background", "describe")), rng)
        return [(before[0], [scenes[0].image]), (question, [scenes[1].image])], answer

    return make


def _wish(rng: random.Random, seed: int, i: int) -> Made:
    """A wish whose shapes do not come in nano's own order."""
    while True:
        question, answer = asked_wish(rng)
        things = answer[3:].split(" on a ")[0].split(", ")
        places = [question.find(thing) for thing in things]
        if places != sorted(places):
            return [(careless(question, rng), [])], answer


def _print(
    *,
    heights: tuple[float, float] = PRINT_HEIGHT,
    digits: Sequence[int] = DIGITS,
    fonts: Sequence[str | None] = FONTS,
    across: bool = False,
) -> Callable[[random.Random, int, int], Made]:
    """The question for a number."""

    def make(rng: random.Random, seed: int, i: int) -> Made:
        printed = dict(numbers=1, height=rng.uniform(*heights), digits=digits, fonts=fonts, across=across)
        scene = draw_varied(seed, i, split="unseen", **printed)
        return _one(scene, ask(scene, "number", rng)) if scene.print is not None else None

    return make


VARIED_KINDS: dict[str, Callable[[random.Random, int, int], Made]] = {
    "not there": _asking("absent"),
    "there or not": _asking("there"),
    "named by colour": _asking("named"),
    "no shapes": _no_shapes,
    "shapes alike": _alike,
    "five or six shapes": _many,
    "second picture": _of_two(1),
    "first of two pictures": _of_two(0),
    "new picture, not named": _of_two(None),
    "wish, any order": _wish,
    "print of 8 to 16 pixels": _print(heights=HEIGHTS),
    "number across a border": _print(across=True),
    "one digit": _print(digits=(1,)),
    "five digits": _print(digits=(5,)),
    "another font": _print(fonts=MORE_FONTS),
    "unknown font": _print(fonts=UNKNOWN_FONTS),
}
