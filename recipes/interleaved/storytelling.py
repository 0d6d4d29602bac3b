"""Draws the next picture of a story: earlier sentences with their pictures, and the sentence to draw.

python -m recipes.interleaved.storytelling --model DIR "It rests." --turn "A dog runs." dog.jpg --out next.png

`mg-fast story` lets the model write and draw a whole story by itself.
"""

import argparse
from pathlib import Path

from PIL import Image

from mg_fast.models.mm_interleaved.prompts import story

from . import common


def draw_next(pipeline, turns: list[tuple], sentence: str, **options) -> Image.Image:
    """The picture of the sentence. `options` are those of `pipeline.draw`, such as `seed`."""
    return pipeline.conversation().draw(story([*turns, (sentence, None)]), **options)[0]


def main() -> None:
    parser = common.make_parser("storytelling", __doc__)
    parser.add_argument("sentence", metavar="TEXT", help="the sentence to draw")
    parser.add_argument(
        "--turn", nargs=2, action="append", default=[], metavar=("TEXT", "FILE"), help="an earlier one; repeatable"
    )
    parser.add_argument("--seed", type=int, help="seed of the picture")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="denoising steps (default: 30)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the picture")

    def action(args: argparse.Namespace) -> None:
        shown = common.pictures([Path(file) for _, file in args.turn])
        turns = [(text, picture) for (text, _), picture in zip(args.turn, shown)]
        options = {"seed": args.seed, "num_inference_steps": args.steps}
        draw_next(common.load(args), turns, args.sentence, **options).save(args.out)

    common.run(parser, action)


if __name__ == "__main__":
    main()
