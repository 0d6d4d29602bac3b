"""mg-fast explain: draws which pixels were mined over the picture."""

import sys

from ..errors import PromptError
from ..runtime.arguments import check_text
from . import loading
from .options import answer_options, model_options, picture_file


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "explain", parents=[model_options(), answer_options()], help="draw which pixels were mined over the picture"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="a question: show what its answer came from; without it all queries count alike",
    )
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture")
    parser.add_argument(
        "--out", required=True, type=picture_file, metavar="FILE", help="where to write: .png, .jpg or .webp"
    )
    parser.add_argument("--allow-urls", action="store_true", help="fetch a picture given as URL")
    parser.add_argument("--windows", action="store_true", help="draw the borders of the queries' windows")
    parser.set_defaults(action=command)


def command(args) -> int:
    if args.prompt is not None and not args.prompt.strip():
        raise PromptError("--prompt is empty: leave it out, and all queries count alike")
    check_text(args.prompt or "", "--prompt")
    [picture] = loading.open_pictures(args, [args.image])
    pipeline = loading.load_to_answer(args)
    explanation = pipeline.explain(picture, args.prompt, max_new_tokens=args.max_new_tokens, windows=args.windows)
    explanation.image.save(args.out)
    if explanation.answer is not None:
        print(explanation.answer.text)
    print(f"drawn to {args.out}", file=sys.stderr)
    return 0
