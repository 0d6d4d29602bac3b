"""Draws the picture of a coloured segmentation map and a caption.

python -m recipes.interleaved.map_to_picture --model DIR map.png "a street with a tree" --out street.png

The model learned ADE20K's colours, one for each kind of thing.
"""

import argparse
from pathlib import Path

from PIL import Image

from mg_fast.models.mm_interleaved.prompts import map_to_picture

from . import common


def draw(pipeline, segmentation_map, caption: str, *, text_first: bool = False, **options) -> Image.Image:
    """The picture. `options` are those of `pipeline.draw`, such as `seed` and `num_inference_steps`."""
    items = map_to_picture(segmentation_map, caption, text_first=text_first)
    return pipeline.conversation().draw(items, **options)[0]


def main() -> None:
    parser = common.make_parser("map_to_picture", __doc__)
    parser.add_argument("map", type=Path, metavar="FILE", help="the segmentation map")
    parser.add_argument("caption", metavar="CAPTION", help="what the picture shows, without a full stop")
    parser.add_argument("--text-first", action="store_true", help="put the caption before the map")
    parser.add_argument("--seed", type=int, help="seed of the picture")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="denoising steps (default: 30)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the picture")

    def action(args: argparse.Namespace) -> None:
        [segmentation_map] = common.pictures([args.map])
        options = {"text_first": args.text_first, "seed": args.seed, "num_inference_steps": args.steps}
        draw(common.load(args), segmentation_map, args.caption, **options).save(args.out)

    common.run(parser, action)


if __name__ == "__main__":
    main()
