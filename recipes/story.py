"""Tells a story in several turns, each with a picture, and writes it as a web page or as Markdown with pictures beside.

python -m recipes.story --model DIR --painter P --out story.html

The language model sees the prompts that it wrote before, so the pictures stay consistent in words. All of them have the
same seed, and with --like each one also starts from the picture before it. The default turns tell of a noble mouse.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import mg_fast
from mg_fast.cli.story_page import StoryPart, story_page, write_page

TURNS = (
    "Please tell a story about a noble mouse who lives in a castle. Begin with a picture of the mouse.",
    "The mouse sets out on a journey. Go on, and draw what it meets.",
    "A storm comes up at night. Go on, and draw where the mouse finds shelter.",
    "Let the story end well, and draw the last scene.",
)
SEED = 7


class Turn(NamedTuple):
    """What the user asked for, what the model wrote, its pictures, and the reason where there is none."""

    wish: str
    text: str
    images: list[Image.Image]
    reason: str | None


def tell(pipeline: mg_fast.Pipeline, wishes: Sequence[str], *, like: bool = False, **options) -> Iterator[Turn]:
    """Tells a story in a conversation of its own, turn by turn.

    Args:
        pipeline: with a painter.
        wishes: one for each turn.
        like: each picture starts from the one before it.
        **options: of `pipeline.chat`, such as `seed` and `max_new_tokens`.
    """
    conversation = pipeline.conversation()
    for wish in wishes:
        answer = conversation.chat(wish, draw={"like": "last"} if like else True, **options)
        yield Turn(wish, answer.text, answer.images, answer.no_image_reason)


def as_markdown(turns: Sequence[Turn], out: Path) -> str:
    """The story in Markdown; its pictures are saved beside it."""
    lines, number = [], 0
    for turn in turns:
        lines += [f"> {turn.wish}", "", turn.text.replace("<", "&lt;"), ""]
        for image in turn.images:
            number += 1
            file = out.with_name(f"{out.stem}-{number}.png")
            image.save(file)
            lines += [f"![picture {number}]({file.name})", ""]
        if turn.reason:
            lines += [f"*No picture: {turn.reason}.*", ""]
    return "\n".join(lines)


def as_page(turns: Sequence[Turn]) -> str:
    """The story as one web page that holds its pictures."""
    parts = []
    for turn in turns:
        parts += [StoryPart(turn.wish, True), StoryPart(turn.text, False)]
        parts += [StoryPart(image, False) for image in turn.images]
        if turn.reason:
            parts.append(StoryPart(f"(No picture: {turn.reason}.)", True))
    return story_page(parts, title="A story", note="Made by recipes.story of mg_fast. Grey parts are not the model's.")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.story", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a Mini-Gemini checkpoint")
    parser.add_argument("--painter", required=True, metavar="P", help="a text-to-image pipeline of diffusers")
    parser.add_argument("--template", help="prompt template (default: the checkpoint's own)")
    parser.add_argument("--turn", action="append", help="what to ask for in a turn; may be given several times")
    parser.add_argument("--like", action="store_true", help="start each picture from the one before it")
    parser.add_argument("--steps", type=int, help="steps of the diffusion")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of words and pictures (default: {SEED})")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a turn (default: 512)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .html or .md file")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    args = parser.parse_args()
    if args.out.suffix not in (".html", ".md") or not args.out.parent.is_dir():
        parser.error(f"--out: expected a .html or .md file in a folder that exists, got {args.out}")
    pictures = args.out.parent.glob(f"{args.out.stem}-*.png") if args.out.suffix == ".md" else ()
    if (taken := [file for file in (args.out, *pictures) if file.exists()]) and not args.force:
        parser.error(f"{taken[0]} exists: name another file with --out, or overwrite it with --force")
    try:
        painter = mg_fast.drawing.load_painter(args.painter, steps=args.steps)
        pipeline = mg_fast.load(args.model, painter=painter, template=args.template)
        options = {"seed": args.seed, "max_new_tokens": args.max_new_tokens}
        turns: list[Turn] = []
        for turn in tell(pipeline, args.turn or TURNS, like=args.like, **options):
            turns.append(turn)
            # The file is written after every turn, so that an interruption loses none of them.
            write_page(args.out, as_markdown(turns, args.out) if args.out.suffix == ".md" else as_page(turns))
    except mg_fast.MgFastError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
