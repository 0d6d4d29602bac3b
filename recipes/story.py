"""Tells a story in several turns, each with a picture, and writes it as a web page or as Markdown with pictures beside.

python -m recipes.story --model DIR --painter P --out story.html

The language model sees the prompts that it wrote before, so the pictures stay consistent in words. All of them have the
same seed, and with --like each one also starts from the picture before it. The default turns tell of a noble mouse.
"""

import argparse
import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import mg_fast

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


def tell(pipeline: mg_fast.Pipeline, wishes: Sequence[str], *, like: bool = False, **options) -> list[Turn]:
    """Tells a story in a conversation of its own.

    Args:
        pipeline: with a painter.
        wishes: one for each turn.
        like: each picture starts from the one before it.
        **options: of `pipeline.chat`, such as `seed` and `max_new_tokens`.
    """
    conversation, told = pipeline.conversation(), []
    for wish in wishes:
        answer = conversation.chat(wish, draw={"like": "last"} if like else True, **options)
        told.append(Turn(wish, answer.text, answer.images, answer.no_image_reason))
    return told


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
    body = []
    for turn in turns:
        body += [f"<blockquote>{html.escape(turn.wish)}</blockquote>", f"<p>{html.escape(turn.text)}</p>"]
        for image in turn.images:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            body.append(f'<img alt="" width="{image.width}" src="data:image/png;base64,{data}">')
        if turn.reason:
            body.append(f"<p><em>No picture: {html.escape(turn.reason)}.</em></p>")
    style = (
        ":root { color-scheme: light dark } body { max-width: 40rem; margin: 2rem auto; padding: 0 1rem; "
        "font: 1.1rem/1.6 Georgia, serif } img { max-width: 100%; height: auto; border-radius: 6px } "
        "p { white-space: pre-wrap; overflow-wrap: anywhere } blockquote { color: gray; margin: 2rem 0 1rem }"
    )
    head = f'<meta charset="utf-8"><title>A story</title><style>{style}</style>'
    return f"<!doctype html>\n<html lang=en>\n<head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"


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
    args = parser.parse_args()
    if args.out.suffix not in (".html", ".md"):
        parser.error(f"--out: expected a .html or .md file, got {args.out}")
    try:
        painter = mg_fast.drawing.load_painter(args.painter, steps=args.steps)
        pipeline = mg_fast.load(args.model, painter=painter, template=args.template)
        options = {"seed": args.seed, "max_new_tokens": args.max_new_tokens}
        turns = tell(pipeline, args.turn or TURNS, like=args.like, **options)
    except mg_fast.MgFastError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    text = as_markdown(turns, args.out) if args.out.suffix == ".md" else as_page(turns)
    args.out.write_text(text, encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
