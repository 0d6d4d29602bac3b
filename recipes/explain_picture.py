"""Draws the picture of the README: a scene of nano, and beside it the heat map of `explain` for each of some questions.

python -m recipes.explain_picture docs/images/explain.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers.utils import logging as transformers_logging

import mg_fast

from .nano.scenes import draw_scene

SEED, NUMBER = 5, "4083"
QUESTIONS = ("What does the sign say?", "Where is the orange circle?")
# Pixels along a side of each picture, and between two of them.
SIDE, GAP = 400, 12


def draw(seed: int, number: str, questions: Sequence[str]) -> tuple[Image.Image, list[str]]:
    """The scene and the heat maps side by side, and nano's answers."""
    pipeline = mg_fast.load("nano")
    scene = draw_scene(seed, 0, split="unseen", number=number).image
    found = [pipeline.explain(scene, question) for question in questions]
    drawn = Image.new("RGB", ((SIDE + GAP) * (len(found) + 1) - GAP, SIDE), "white")
    for i, picture in enumerate((scene, *(explanation.image for explanation in found))):
        drawn.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (i * (SIDE + GAP), 0))
    return drawn, [explanation.answer.text for explanation in found]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m recipes.explain_picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("out", type=Path, help="where to write the picture")
    made.add_argument("--seed", type=int, default=SEED, help=f"seed of the scene; default {SEED}")
    made.add_argument("--number", default=NUMBER, help=f"the number in the scene; default {NUMBER}")
    made.add_argument("--question", action="append", help="may be given several times; default: the README's two")
    return made


def main() -> None:
    args = parser().parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    questions = args.question or QUESTIONS
    drawn, answers = draw(args.seed, args.number, questions)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(args.out, optimize=True)
    for question, answer in zip(questions, answers):
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
