"""Finds what a phrase describes in a picture, prints its box in pixels, and draws the box with --out.

python -m recipes.interleaved.grounding --model DIR photo.jpg "the red hat" --out found.png

The published configurations show the model the central square of a picture, although boxes are written in parts of the
whole picture. --squeeze shows it the whole picture, squeezed to a square, which the original's code can do as well.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from mg_fast.models.mm_interleaved.configuration import PICTURE_SIDE
from mg_fast.models.mm_interleaved.prompts import Box, grounding, instruct, parse_boxes

from . import common


def find(
    pipeline, picture: Image.Image, phrase: str, *, squeeze: bool = False, instruction: bool = False
) -> tuple[str, list[Box]]:
    """The model's answer, and the boxes in it, in pixels of the picture; an empty list where it names none."""
    shown = picture
    if squeeze:
        shown = picture.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    items = grounding(shown, phrase)
    answer = pipeline.conversation().chat(instruct(items) if instruction else items, task="grounding").text
    return answer, parse_boxes(answer, picture.size)


def draw(picture: Image.Image, boxes: list[Box]) -> Image.Image:
    """The picture with the boxes."""
    drawn = picture.copy()
    for box in boxes:
        ImageDraw.Draw(drawn).rectangle(box, outline="red", width=max(1, min(picture.size) // 100))
    return drawn


def main() -> None:
    parser = common.make_parser("grounding", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture")
    parser.add_argument("phrase", metavar="PHRASE", help="what to look for")
    parser.add_argument("--squeeze", action="store_true", help="show the whole picture, squeezed to a square")
    parser.add_argument("--instruction", action="store_true", help="ask in the instruction format")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the picture with the boxes")

    def action(args: argparse.Namespace) -> None:
        [picture] = common.pictures([args.file])
        options = {"squeeze": args.squeeze, "instruction": args.instruction}
        answer, boxes = find(common.load(args), picture, args.phrase, **options)
        for box in boxes:
            print("x1 {:.1f}, y1 {:.1f}, x2 {:.1f}, y2 {:.1f}".format(*box))
        if not boxes:
            print(f"no box in the answer: {answer}")
        if args.out is not None:
            draw(picture, boxes).save(args.out)

    common.run(parser, action)


if __name__ == "__main__":
    main()
