"""mg-fast draw: draws a picture of a prompt, without a language model."""

import sys

from ..errors import DrawingError
from . import drawing
from .options import add_debug, positive


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "draw",
        parents=[drawing.drawing_options(required=True)],
        help="draw a picture of a prompt",
        description="Draws pictures of a prompt with a text-to-image pipeline of diffusers.",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    parser.add_argument("--count", type=positive, default=1, metavar="N", help="number of pictures (default: 1)")
    parser.add_argument("--seed", type=int, help="seed of the first picture; the others have the seeds after it")
    parser.add_argument("--like", metavar="FILE", help="a picture to start from")
    parser.add_argument("--strength", type=float, metavar="S", help="with --like, how much is redrawn, 0 to 1")
    parser.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
    add_debug(parser)
    parser.set_defaults(action=command)


def command(args) -> int:
    drawing.check_free(args, args.count)
    options = drawing.of_each_picture(args) | {"count": args.count}
    if args.like is not None:
        from ..models.pictures import open_picture

        options["like"] = open_picture(args.like)
    if args.strength is not None:
        if args.like is None:
            raise DrawingError("--strength says how far to depart from a picture: name it with --like")
        options["strength"] = args.strength
    painter = drawing.load_painter(args)
    with drawing.progress() as on_step:
        pictures = painter.draw(args.prompt, on_step=on_step, **options)
    for picture, file in zip(pictures, drawing.save(pictures, args)):
        print(f"{file} (seed {picture.info['seed']})")
        sys.stdout.flush()
    return 0
