"""Writes a caption for each picture, or with --long a description of several sentences.

python -m recipes.interleaved.captions --model DIR photo.jpg another.jpg
"""

import argparse
from pathlib import Path

from mg_fast.models.mm_interleaved.prompts import caption, paragraph

from . import common


def captions(pipeline, pictures: list, *, long: bool = False) -> list[str]:
    """A caption of each picture, with the original's prompt and beams."""
    ask, task = (paragraph, "paragraph") if long else (caption, "caption")
    return [pipeline.conversation().chat(ask(picture), task=task).text for picture in pictures]


def main() -> None:
    parser = common.make_parser("captions", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a picture")
    parser.add_argument("--long", action="store_true", help="describe each picture in several sentences")

    def action(args: argparse.Namespace) -> None:
        pictures = common.pictures(args.files)
        for file, text in zip(args.files, captions(common.load(args), pictures, long=args.long)):
            print(f"{file}: {text}")

    common.run(parser, action)


if __name__ == "__main__":
    main()
