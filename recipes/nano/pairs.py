"""Conversations about two pictures, in which a question names the picture that it is about.

The second picture comes together with the first one, or later. A question that comes with a later picture, or after it,
and names no picture is about the newest one.
"""

import random
from collections.abc import Iterator, Sequence

from mg_fast.models.templates import IMAGE_TAG

from .scenes import Scene
from .talk import GEN, ask, careless

ORDINALS = ("first", "second")
# "What is this?" would not say which picture is meant.
UNNAMEABLE = ("What is this?",)


def about(which: int, turn: tuple[str, str]) -> tuple[str, str]:
    """The same question and answer about the first (0) or second (1) picture.

    Raises:
        ValueError: the question has no form that names a picture.
    """
    question, answer = turn
    ordinal = ORDINALS[which]
    if question in UNNAMEABLE:
        raise ValueError(f"the question {question!r} cannot name a picture")
    if question.endswith(GEN):
        return f"Draw the {ordinal} picture again.{GEN}", answer
    if "the picture" in question:
        question = question.replace("the picture", f"the {ordinal} picture")
    else:
        question = f"{question[:-1]} in the {ordinal} picture{question[-1]}"
    if answer.startswith(("Yes, ", "No, ")):
        return question, f"{answer[:-1]} in the {ordinal} picture."
    return question, f"In the {ordinal} picture, {answer[0].lower()}{answer[1:]}"


def questions_about_both(
    scenes: Sequence[Scene], rng: random.Random, kinds: Sequence[str], turns: int
) -> list[tuple[int, tuple[str, str]]]:
    """At most `turns` questions of these types with their answers, none twice, each after the number of its picture.

    They do not name their pictures yet; see `about`.
    """
    said: dict[tuple[int, str], tuple[str, str]] = {}
    for i, kind in enumerate(["number", "number", *rng.choices(kinds, k=turns - 2)]):
        which = i if i < 2 else rng.randrange(2)
        turn = ask(scenes[which], kind, rng)
        if turn is not None and turn[0] not in UNNAMEABLE:
            said[which, turn[1]] = turn
    turned = [(which, turn) for (which, _), turn in said.items()]
    rng.shuffle(turned)
    return turned


def conversation_about_two(
    scenes: Sequence[Scene], rng: random.Random, turns: int, kinds: Sequence[str]
) -> list[tuple[str, str]]:
    """A conversation about two scenes, with a tag in each user text that brings a picture."""
    both = [about(*which) for which in questions_about_both(scenes, rng, kinds, turns)]
    early = [] if rng.random() < 0.4 else list(_plain(scenes[0], rng, kinds, rng.choice((1, 1, 2))))
    late = list(_plain(scenes[1], rng, kinds, rng.choice((0, 1)))) if early else []
    after = [*late, *both][: max(1, turns - len(early))]
    said = [(careless(question, rng), answer) for question, answer in (*early, *after)]
    for at in (0, len(early)):
        said[at] = (f"{IMAGE_TAG}\n{said[at][0]}", said[at][1])
    return said


def _plain(scene: Scene, rng: random.Random, kinds: Sequence[str], turns: int) -> Iterator[tuple[str, str]]:
    """Questions that name no picture. Of these, a scene always allows those for the background."""
    for kind in rng.choices(("number", "number", *kinds), k=turns):
        yield ask(scene, kind, rng) or ask(scene, "background", rng)
